"""Streaming detokenization: token ids in one by one, whole characters out.

A token may end inside a character, so the bytes are decoded incrementally and
an unfinished character waits for its rest. Unlike comparing decoded prefixes
and looking for U+FFFD, this lets a genuine U+FFFD through at once.
"""

import codecs

from text import tokenizer as tokenizer_lib


class StreamDecoder:
  """Decodes one sequence; the pieces join to `tokenizer.decode(ids)`."""

  def __init__(
    self, tokenizer: tokenizer_lib.Tokenizer, *, is_continued: bool = False
  ):
    """Starts a sequence.

    Args:
      tokenizer: of the ids.
      is_continued: the ids continue a text, so that a space in front of the
        first word is one; otherwise it may be one that `encode` puts there.
    """
    self._tokenizer = tokenizer
    self._is_continued = is_continued
    self._is_start = not is_continued
    self._decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')

  def push(self, token_id: int) -> str:
    """Returns the characters that `token_id` completes, possibly none."""
    data = self._tokenizer.token_bytes(token_id)
    if self._is_start:
      first = self._tokenizer.first_bytes(token_id)
      self._is_start = not (data or first)  # a special id starts no text
      data = first
    return self._decoder.decode(data)

  def finish(self) -> str:
    """Returns what is left: U+FFFD for an unfinished character, else ''."""
    self._is_start = not self._is_continued
    return self._decoder.decode(b'', final=True)
