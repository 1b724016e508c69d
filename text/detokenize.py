"""Streaming detokenization: token ids in one by one, whole characters out.

A token may end inside a character, so the bytes are decoded incrementally and
an unfinished character waits for its rest. Unlike comparing decoded prefixes
and looking for U+FFFD, this lets a genuine U+FFFD through at once.
"""

import codecs

from text import tokenizer as tokenizer_lib


class StreamDecoder:
  """Decodes one sequence; the pieces join to `tokenizer.decode(ids)`."""

  def __init__(self, tokenizer: tokenizer_lib.Tokenizer):
    self._tokenizer = tokenizer
    self._decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')

  def push(self, token_id: int) -> str:
    """Returns the characters that `token_id` completes, possibly none."""
    return self._decoder.decode(self._tokenizer.token_bytes(token_id))

  def finish(self) -> str:
    """Returns what is left: U+FFFD for an unfinished character, else ''."""
    return self._decoder.decode(b'', final=True)
