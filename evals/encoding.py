"""The token ids of prompts, and of contexts with their continuations.

A text is cut into context and continuation as the LM Evaluation Harness cuts it
(`TemplateLM._encode_pair`), so that scores can be compared with published ones.
"""

from collections.abc import Callable
import re
from typing import NamedTuple

from evals import ports
from text import tokenizer as tokenizer_lib


class Pair(NamedTuple):
  """A context and the continuation that is scored after it.

  The context is never empty. The continuation of a prompt is empty.
  """

  context: list[int]
  continuation: list[int]
  num_dropped: int = 0  # tokens cut from the left of the context


def encode(model: ports.Model, text: str) -> list[int]:
  """Returns the ids of a text, after BOS if the model was trained with BOS."""
  return bos(model) + model.tokenizer.encode(text)


def encode_pair(model: ports.Model, context: str, continuation: str) -> Pair:
  """Returns the ids of a context and of the continuation after it.

  The text is encoded as a whole and then cut at the length of the encoded
  context. White space at the end of the context moves to the continuation,
  since most tokenizers join a space to the word after it. An empty context is
  replaced by the model's prefix.

  Raises:
    ValueError: the continuation adds no token, or is longer than the model's
      context.
  """
  if context:
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    whole = encode(model, stripped + continuation)
    context_ids = encode(model, stripped)
    continuation_ids = whole[len(context_ids) :]
    # The context was only white space, and the model has no BOS.
    context_ids = context_ids or [model.prefix]
  else:
    context_ids = [model.prefix]
    continuation_ids = model.tokenizer.encode(continuation)
  if not continuation_ids:
    raise ValueError(
      f'got a continuation {continuation[:60]!r} that adds no token to its'
      ' context, expected at least one'
    )
  return fit(model, context_ids, continuation_ids)


def fit(
  model: ports.Model, context: list[int], continuation: list[int]
) -> Pair:
  """Drops tokens from the left of a context that is too long.

  Raises:
    ValueError: the continuation is empty, or longer than the model's context.
  """
  if not 1 <= len(continuation) <= model.max_length:
    raise ValueError(
      f'got a continuation of {len(continuation)} tokens, expected 1 to'
      f' max_length = {model.max_length}'
    )
  # The model predicts the last token without reading it.
  room = model.max_length + 1 - len(continuation)
  num_dropped = max(len(context) - room, 0)
  return Pair(context[num_dropped:], continuation, num_dropped)


def encode_trusted(model: ports.Model, text: str) -> list[int]:
  """Returns the ids of a text whose names of special tokens are special tokens.

  For trusted text, such as a chat that the model's template rendered. A text
  that begins with BOS gets no second BOS.
  """
  ids = (model.encode_prompt or model.tokenizer.encode)(text)
  first = bos(model)
  return ids if ids[:1] == first else first + ids


def naming_special_tokens(
  tokenizer: tokenizer_lib.Tokenizer,
) -> Callable[[str], list[int]]:
  """Returns an `encode_prompt` that turns names of special tokens into ids."""
  # The longest name first, since one name may begin with another.
  names = sorted(tokenizer.special_tokens, key=lambda name: (-len(name), name))
  finder = re.compile('|'.join(map(re.escape, names)) or '(?!)')  # no match

  def encode_prompt(text: str) -> list[int]:
    spans = [match.span() for match in finder.finditer(text)]
    return tokenizer.encode_marked(text, spans)[0]

  return encode_prompt


def fit_prompt(model: ports.Model, ids: list[int], max_tokens: int) -> Pair:
  """Drops tokens from the left of a prompt, to leave room for `max_tokens`.

  Raises:
    ValueError: `max_tokens` fill the model's context.
  """
  room = model.max_length - max_tokens
  if room < 1:
    raise ValueError(
      f'max_tokens: got {max_tokens}, expected less than the {model.max_length}'
      ' tokens that the model can read: the prompt needs room too'
    )
  ids = ids or [model.prefix]
  num_dropped = max(len(ids) - room, 0)
  return Pair(ids[num_dropped:], [], num_dropped)


def bos(model: ports.Model) -> list[int]:
  """Returns the ids before every text: [BOS], or []."""
  return [model.tokenizer.bos_id] if model.adds_bos else []
