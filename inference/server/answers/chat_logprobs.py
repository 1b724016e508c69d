"""Log-probabilities in the shape of OpenAI's chat API.

    {'content': [{'token': ..., 'logprob': ..., 'bytes': [...],
                  'top_logprobs': [{'token': ..., ...}, ...]}, ...]}

`content` has one entry per token of the text that the user reads, in its order.
Tokens of reasoning, of calls and of the end have no entry. The `bytes` of all
entries join to the text. A token of incomplete characters is `bytes:\\xe2`,
as at OpenAI. A special token is named by its string and has no bytes.
"""

from collections.abc import Iterable
from typing import Any

from inference.sampling import logprobs
from inference.server.answers import logprobs_json
from text import tokenizer as tokenizer_lib


class ChatLogprobs:
  """Writes the entries of tokens."""

  def __init__(self, tokenizer: tokenizer_lib.Tokenizer, *, as_ids: bool):
    """Takes the tokenizer; with `as_ids`, tokens are named `token_id:ID`."""
    self._tokenizer, self._as_ids = tokenizer, as_ids
    self._specials = {i: text for text, i in tokenizer.special_tokens.items()}

  def write(
    self, tokens: Iterable[tuple[int, logprobs.TokenLogprobs]]
  ) -> dict[str, Any]:
    """Returns the entries of tokens, each an id and its log-probabilities."""
    return {
      'content': [self._entry(*token) for token in tokens],
      'refusal': None,
    }

  def _entry(
    self, token_id: int, found: logprobs.TokenLogprobs
  ) -> dict[str, Any]:
    # A vocabulary smaller than the number asked for pads with negative ids.
    top = [
      (each, value)
      for each, value in zip(found.ids, found.values, strict=True)
      if each >= 0
    ]
    return {
      **self._named(token_id, found.chosen),
      'top_logprobs': [self._named(*each) for each in top],
    }

  def _named(self, token_id: int, value: float) -> dict[str, Any]:
    data = self._tokenizer.token_bytes(token_id)
    return {
      'token': self._name(token_id, data),
      'logprob': logprobs_json.spelled(value),
      'bytes': list(data),
    }

  def _name(self, token_id: int, data: bytes) -> str:
    special = self._specials.get(token_id, '')
    if self._as_ids or not (data or special):
      return f'token_id:{token_id}'
    try:
      return data.decode('utf-8') or special
    except UnicodeDecodeError:
      return 'bytes:' + ''.join(f'\\x{byte:02x}' for byte in data)
