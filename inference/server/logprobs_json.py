"""Log-probabilities in the shape of OpenAI's completions API.

    {'tokens': [...], 'token_logprobs': [...], 'top_logprobs': [{...}, ...],
     'text_offset': [...]}

Each list has one entry per token, in the order of the text. A token whose bytes
are whole characters is named by its text. Other tokens are named `token_id:ID`:
a part of a character, a special token without text, and the second of two
tokens with the same text. So no two tokens share an entry.

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
  ):
    """Begins a text.

    Args:
      tokenizer: of the model.
      as_ids: whether all tokens are named `token_id:ID`.
      offset: characters of the answer in front of the text.
    """
    self._tokenizer, self._as_ids, self._offset = tokenizer, as_ids, offset
    self._decoder = detokenize.StreamDecoder(tokenizer)

  def write(
    self,
    token_ids: Sequence[int],
    found: Sequence[logprobs.TokenLogprobs | None],
    *,
    end: int,
  ) -> dict[str, Any]:
    """Returns the entries of the next tokens.

    Args:
      token_ids: the tokens.
      found: log-probabilities of each token; None for the first of a prompt.
      end: characters of the answer, these tokens included. Tokens without text
        in the answer, such as EOS or a stop string, have this offset.
    """
    rows = []
    for token_id, each in zip(token_ids, found, strict=True):
      offset = min(self._offset, end)
      self._offset += len(self._decoder.push(token_id))
      if each is None:
        rows.append((self._name(token_id), None, None, offset))
        continue
      top = self._top(token_id, each)
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
      named[name] = each, _spelled(value)
    return named

  def _name(self, token_id: int) -> str:
    if not self._as_ids:
      try:
        if text := self._tokenizer.token_bytes(token_id).decode('utf-8'):
          return text
      except UnicodeDecodeError:
        pass
    return _id_name(token_id)


def joined(*parts: dict[str, Any]) -> dict[str, Any]:
  """Returns the entries of one text after those of another."""
  return {name: [x for part in parts for x in part[name]] for name in _NAMES}


def _id_name(token_id: int) -> str:
  return f'token_id:{token_id}'


def _spelled(value: float) -> float:
  # NaN stays NaN: the answer then fails, since JSON has no NaN.
  return _LOWEST if value < _LOWEST else value
