"""Streaming detokenization: one token id in, the completed characters out.

A token may end inside a character. So bytes are decoded incrementally, and an
unfinished character waits for its last bytes. The common alternative compares
decoded prefixes and waits at U+FFFD, so it delays a U+FFFD that is in the text.
"""

import codecs

from text import tokenizer as tokenizer_lib, utf8


class StreamDecoder:
  """Decodes one sequence; its outputs join to `tokenizer.decode(ids)`."""

  def __init__(
    self, tokenizer: tokenizer_lib.Tokenizer, *, is_continued: bool = False
  ):
    """Starts a sequence.

    Args:
      tokenizer: tokenizer of the ids.
      is_continued: whether the ids continue a text. If so, a space before the
        first word is kept. If not, it may be a space that `encode` has added,
        which is removed.
    """
    self._tokenizer = tokenizer
    self._is_continued = is_continued
    self._is_start = not is_continued
    self._decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')

  def copy(self) -> 'StreamDecoder':
    """Returns a decoder that continues from here, apart from this one."""
    made = StreamDecoder(self._tokenizer, is_continued=self._is_continued)
    made._is_start = self._is_start
    made._decoder.setstate(self._decoder.getstate())
    return made

  @property
  def is_whole(self) -> bool:
    """Whether the last token did not end inside a character."""
    return not self._decoder.getstate()[0]

  def bytes_of(self, token_id: int) -> bytes:
    """Returns the bytes that `token_id` would add here."""
    if self._is_start:
      return self._tokenizer.first_bytes(token_id)
    return self._tokenizer.token_bytes(token_id)

  def num_broken(self, token_id: int) -> int:
    """Returns the number of U+FFFD that `push` would return before `token_id`.

    They stand for an unfinished character that the token does not continue.
    """
    unfinished, _ = self._decoder.getstate()
    first = self.bytes_of(token_id)[:1]
    if unfinished and first:
      try:
        codecs.getincrementaldecoder('utf-8')().decode(unfinished + first)
      except UnicodeDecodeError:
        return len(utf8.decode(unfinished))
    return 0

  def push(self, token_id: int) -> str:
    """Returns the characters that `token_id` completes, possibly none."""
    data = self.bytes_of(token_id)
    if self._is_start:
      # A special id has no bytes: the text starts at a later id.
      self._is_start = not (data or self._tokenizer.token_bytes(token_id))
    return self._decoder.decode(data)

  def finish(self) -> str:
    """Ends the sequence; returns U+FFFD for an unfinished character, or ''."""
    self._is_start = not self._is_continued
    return self._decoder.decode(b'', final=True)
