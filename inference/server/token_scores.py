"""Log-probabilities in the shape of OpenAI's completions API.

    {'tokens': [...], 'token_logprobs': [...], 'top_logprobs': [{...}, ...],
     'text_offset': [...]}

One entry per token, in the order of the text. A token is named by its text if
that says which token it is: if its bytes are characters, whole ones. A part of
a character, a special token that has no text, and the second of two tokens with
the same text are named `token_id:ID`, so that no two ever share an entry.

The chosen token is in `top_logprobs` too, as in OpenAI's answers, and there its
value is the same to the bit: clients compare the largest with it to learn
whether decoding was greedy. The first token of a prompt follows nothing and has
null in both. A log-probability of -inf, which JSON cannot spell, is -9999, as
it is at OpenAI.
"""

from collections.abc import Sequence
from typing import Any

from inference.sampling import logprobs
from text import detokenize, tokenizer as tokenizer_lib

_LOWEST = -9999.0
_NAMES = 'tokens', 'token_logprobs', 'top_logprobs', 'text_offset'


class TokenScores:
  """Writes the tokens of one text down, as they come."""

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
      as_ids: whether all tokens are named by their ids.
      offset: characters of the answer in front of the text.
    """
    self._tokenizer, self._as_ids, self._offset = tokenizer, as_ids, offset
    self._decoder = detokenize.StreamDecoder(tokenizer)

  def write(
    self,
    token_ids: Sequence[int],
    scores: Sequence[logprobs.TokenLogprobs | None],
    *,
    end: int,
  ) -> dict[str, Any]:
    """Returns the entries of the next tokens.

    Args:
      token_ids: the tokens.
      scores: of each; None for one that follows nothing.
      end: characters of the answer that are out with these. Tokens that have no
        part in it, of EOS or of a stop string, are placed there.
    """
    rows = []
    for token_id, score in zip(token_ids, scores, strict=True):
      offset = min(self._offset, end)
      self._offset += len(self._decoder.push(token_id))
      if score is None:
        rows.append((self._name(token_id), None, None, offset))
        continue
      top = self._top(token_id, score)
      name = next(name for name, (each, _) in top.items() if each == token_id)
      values = {name: value for name, (_, value) in top.items()}
      rows.append((name, values[name], values, offset))
    columns = zip(*rows, strict=True) if rows else [()] * len(_NAMES)
    return dict(zip(_NAMES, map(list, columns), strict=True))

  def _top(
    self, token_id: int, score: logprobs.TokenLogprobs
  ) -> dict[str, tuple[int, float]]:
    """Returns the alternatives, most probable first, and the token, by name."""
    found = zip(score.ids, score.values, strict=True)
    # Of a vocabulary smaller than the number asked for there are fewer.
    pairs = [pair for pair in found if pair[0] >= 0]
    if token_id not in score.ids:
      pairs.append((token_id, score.chosen))
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
  # What is not a number stays so: the answer fails, it is nobody's score.
  return _LOWEST if value < _LOWEST else value
