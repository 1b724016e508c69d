"""Markers: the strings that open and close calls and reasoning.

Many markers are special tokens, which the decoded text leaves out. The parser
sees such a token as one symbol, and the same string in ordinary tokens is text.
A symbol is a lone surrogate: no decoded text has one. A marker that is no
special token is found by its string.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence

from text import detokenize, tokenizer as tokenizer_lib

_FIRST_SYMBOL = 0xD800


class Markers:
  """The markers of a format, with a tokenizer."""

  def __init__(
    self, markers: Collection[str], special_tokens: Mapping[str, int]
  ):
    found = sorted(set(markers) & special_tokens.keys())
    self._symbols = {
      marker: chr(_FIRST_SYMBOL + i) for i, marker in enumerate(found)
    }
    self._spelling = {
      ord(symbol): marker for marker, symbol in self._symbols.items()
    }
    self.by_id = {special_tokens[m]: s for m, s in self._symbols.items()}

  def form(self, marker: str) -> str:
    """Returns the symbol of a special token, or else the marker itself."""
    return self._symbols.get(marker, marker)

  def spelled(self, text: str) -> str:
    """Returns text in which every symbol is the string of its token."""
    return text.translate(self._spelling)


class Pieces:
  """Cuts the text of an answer into the pieces of its tokens."""

  def __init__(self, tokenizer: tokenizer_lib.Tokenizer, markers: Markers):
    self._markers = markers
    self._decoder = detokenize.StreamDecoder(tokenizer, is_continued=True)
    self._num_tokens = 0

  def cut(
    self,
    text: str,
    token_ids: Iterable[int],
    num_text_ids: int | None = None,
  ) -> list[str]:
    """Returns a piece for each token; they join to the text, and markers.

    Args:
      text: the next text of the answer.
      token_ids: the next tokens. Before the end they spell the text.
      num_text_ids: at the end of the answer, the number of its tokens that
        spell the text: the others belong to a stop string or end the answer.
    """
    pieces: list[str] = []
    start = 0
    for token_id in token_ids:
      piece = self._decoder.push(token_id)
      is_text = num_text_ids is None or self._num_tokens < num_text_ids
      if is_text and token_id in self._markers.by_id:
        pieces.append(self._markers.by_id[token_id])
      else:
        pieces.append(text[start : start + len(piece)])
        start += len(pieces[-1])
      self._num_tokens += 1
    if start < len(text):
      # An unfinished character at the end belongs to the last token with text.
      _append(pieces, text[start:], self._num_tokens, num_text_ids)
    return pieces


def _append(
  pieces: list[str], rest: str, num_tokens: int, num_text_ids: int | None
) -> None:
  if not pieces:
    pieces.append(rest)
    return
  num_before = num_tokens - len(pieces)
  last = len(pieces) if num_text_ids is None else num_text_ids - num_before
  pieces[max(min(last, len(pieces)) - 1, 0)] += rest


def pending(text: str, markers: Sequence[str]) -> int:
  """Returns the length of the longest end of `text` that begins a marker."""
  longest = max(map(len, markers), default=0) - 1
  return next(
    (
      n
      for n in range(min(longest, len(text)), 0, -1)
      if any(len(m) > n and m.startswith(text[-n:]) for m in markers)
    ),
    0,
  )
