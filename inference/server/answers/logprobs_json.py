"""Log-probabilities in the shape of OpenAI's completions API.

    {'tokens': [...], 'token_logprobs': [...], 'top_logprobs': [{...}, ...],
     'text_offset': [...]}

Each list has one entry per token, in the order of the text. A token whose bytes
are whole characters is named by its text. Other tokens are named `token_id:ID`:
a part of a character, a special token without text, and the second of two
tokens with the same text. So no two tokens share an entry. `text_offset` is the
character of the answer's text where the token begins. A token that is named by
its text has that text there.

As in OpenAI's answers, the sampled token is in `top_logprobs` too. Its value
there is the same to the bit: clients compare it with the largest value to see
whether decoding was greedy. The first token of a prompt has null in both lists,
since no token comes before it. JSON has no -inf, so a log-probability of -inf
is -9999, as at OpenAI.
"""

from collections.abc import Sequence
from typing import Any

from inference.sampling import logprobs
from text import detokenize, tokenizer as tokenizer_lib

_LOWEST = -9999.0
_NAMES = 'tokens', 'token_logprobs', 'top_logprobs', 'text_offset'


class LogprobsWriter:
  """Writes the entries of one text, as its tokens arrive."""

  def __init__(
    self,
    tokenizer: tokenizer_lib.Tokenizer,
    *,
    as_ids: bool = False,
    offset: int = 0,
    is_continued: bool = False,
  ):
    """Begins a text.

    Args:
      tokenizer: tokenizer of the model.
      as_ids: whether all tokens are named `token_id:ID`.
      offset: characters of the answer in front of the text.
      is_continued: whether the tokens continue a text, as a completion does.
    """
    self._as_ids, self._offset = as_ids, offset
    self._decoder = detokenize.StreamDecoder(
      tokenizer, is_continued=is_continued
    )

  def write(
    self,
    token_ids: Sequence[int],
    found: Sequence[logprobs.TokenLogprobs | None],
    *,
    end: int,
    places: Sequence[int] | None = None,
  ) -> dict[str, Any]:
    """Returns the entries of the next tokens.

    Args:
      token_ids: the tokens.
      found: log-probabilities of each token; None for the first of a prompt.
      end: characters of the answer, these tokens included. Tokens without text
        in the answer, such as EOS or a stop string, have this offset.
      places: offset of each token, from `prompt_places`.
    """
    rows = []
    for index, (token_id, each) in enumerate(
      zip(token_ids, found, strict=True)
    ):
      start = self._offset + self._decoder.num_broken(token_id)
      offset = min(start if places is None else places[index], end)
      name = self._name(token_id)
      top = {} if each is None else self._top(token_id, each)
      self._offset += len(self._decoder.push(token_id))
      if each is None:
        rows.append((name, None, None, offset))
        continue
      name = next(
        name for name, (top_id, _) in top.items() if top_id == token_id
      )
      values = {name: value for name, (_, value) in top.items()}
      rows.append((name, values[name], values, offset))
    columns = zip(*rows, strict=True) if rows else [()] * len(_NAMES)
    return dict(zip(_NAMES, map(list, columns), strict=True))

  def _top(
    self, token_id: int, found: logprobs.TokenLogprobs
  ) -> dict[str, tuple[int, float]]:
    """Returns (id, logprob) by name: the most probable tokens and this one."""
    # A vocabulary smaller than the number asked for pads with negative ids.
    pairs = [
      pair for pair in zip(found.ids, found.values, strict=True) if pair[0] >= 0
    ]
    if token_id not in found.ids:
      pairs.append((token_id, found.chosen))
    named: dict[str, tuple[int, float]] = {}
    for each, value in pairs:
      name = self._name(each)
      if name in named:
        name = _id_name(each)
      named[name] = each, spelled(value)
    return named

  def _name(self, token_id: int) -> str:
    if not self._as_ids:
      try:
        if text := self._decoder.bytes_of(token_id).decode('utf-8'):
          return text
      except UnicodeDecodeError:
        pass
    return _id_name(token_id)


def prompt_places(
  tokenizer: tokenizer_lib.Tokenizer, text: str, token_ids: Sequence[int]
) -> list[int] | None:
  """Returns where each token of a text prompt begins in the text.

  None if the tokens decode to the text: then `LogprobsWriter` counts
  characters. Otherwise the tokenizer has changed the text, for example to lower
  case, and the tokenizer itself gives the places.

  Args:
    tokenizer: tokenizer of the model.
    text: text of the prompt.
    token_ids: ids of the prompt, perhaps with BOS in front.
  """
  if tokenizer.decode(token_ids) == text:
    return None
  ids, offsets = tokenizer.encode_marked(text, [])
  num_before = len(token_ids) - len(ids)
  return [0] * num_before + [start for start, _ in offsets]


def joined(*parts: dict[str, Any]) -> dict[str, Any]:
  """Returns the entries of several texts, joined in order."""
  return {name: [x for part in parts for x in part[name]] for name in _NAMES}


def _id_name(token_id: int) -> str:
  return f'token_id:{token_id}'


def spelled(value: float) -> float:
  """Returns a log-probability that JSON can represent."""
  # NaN stays NaN: the answer then fails, since JSON has no NaN.
  return _LOWEST if value < _LOWEST else value
