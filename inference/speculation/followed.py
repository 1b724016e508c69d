"""What the KV cache of a draft model holds of each sequence.

A draft model has as many pages as the model that it drafts for, and reads the
page tables of that model: page 7 of one has the same tokens as page 7 of the
other. So prefix hits, preemptions and rejected drafts need no plan of their
own. But the draft model computes tokens late, and only where drafts are worth
their time. This file says which tokens of a sequence it has computed, so that
it computes the others first. A page counts as computed if it holds the tokens
of the sequence; they may have been computed for another sequence.

A mistake here would cost acceptance, and never change a token.
"""

from collections.abc import Hashable, Sequence
import dataclasses


@dataclasses.dataclass
class _Record:
  """What is known of one sequence."""

  num_preemptions: int = 0
  pages: tuple[int, ...] = ()
  num_computed: int = 0
  guess: tuple[int, ...] = ()  # computed behind them, and maybe wrong
  # Of each full page, a hash of all tokens up to its end.
  hashes: list[int] = dataclasses.field(default_factory=list)


class Followed:
  """The tokens that a draft model has computed; host numbers alone."""

  def __init__(self, page_size: int):
    """Starts with empty pages.

    Args:
      page_size: Q, tokens per page.
    """
    self._page_size = page_size
    self._records: dict[Hashable, _Record] = {}
    # The hash of the tokens up to the end of a page that is full.
    self._contents: dict[int, int] = {}

  def num_computed(
    self,
    id: Hashable,
    tokens: Sequence[int],
    pages: tuple[int, ...],
    num_preemptions: int,
  ) -> int:
    """Returns how many of the first tokens are computed; never the last one.

    Args:
      id: of the sequence.
      tokens: all known tokens; they only grow from call to call.
      pages: that the sequence holds now.
      num_preemptions: how often it has lost its pages.
    """
    record = self._records.setdefault(id, _Record())
    before, most = record.num_computed, len(tokens) - 1
    for token in record.guess:
      if record.num_computed >= most or tokens[record.num_computed] != token:
        break
      record.num_computed += 1
    record.guess = ()
    if record.num_preemptions != num_preemptions:
      record.num_computed = 0
    elif pages[: len(record.pages)] != record.pages:
      same = next(
        (
          index
          for index, (one, other) in enumerate(
            zip(pages, record.pages, strict=False)
          )
          if one != other
        ),
        min(len(pages), len(record.pages)),
      )
      held = same * self._page_size
      record.num_computed = min(record.num_computed, held)
    record.num_preemptions, record.pages = num_preemptions, pages
    self._fill(record, tokens, before)
    # Pages that another sequence has filled, as a prefix hit has them.
    size, most = self._page_size, min(most, len(pages) * self._page_size)
    index = record.num_computed // size
    while (index + 1) * size <= most and (
      self._contents.get(pages[index]) == self._hash(record, tokens, index)
    ):
      index += 1
      record.num_computed = index * size
    return record.num_computed

  def wrote(self, id: Hashable, tokens: Sequence[int], stop: int) -> None:
    """Notes that the tokens before `stop` are computed.

    Args:
      id: of the sequence, after a call of `num_computed`.
      tokens: all known tokens.
      stop: a number of tokens for which the sequence has pages.
    """
    record = self._records[id]
    before, record.num_computed = record.num_computed, stop
    self._empty(record.pages, before, stop)
    self._fill(record, tokens, before)

  def guessed(
    self, id: Hashable, pages: tuple[int, ...], guess: Sequence[int]
  ) -> None:
    """Notes tokens that are computed behind all known ones, and may be wrong.

    Args:
      id: of the sequence, after a call of `wrote`.
      pages: that hold them.
      guess: the tokens.
    """
    record = self._records[id]
    record.pages, record.guess = pages, tuple(guess)
    start = record.num_computed
    self._empty(pages, start, start + len(guess))

  def forget(self, id: Hashable) -> None:
    """Drops the record of a sequence; pages keep their contents."""
    self._records.pop(id, None)

  def _empty(self, pages: tuple[int, ...], start: int, stop: int) -> None:
    """Forgets the contents of pages that tokens are written to."""
    size = self._page_size
    for page in pages[start // size : -(-stop // size)]:
      self._contents.pop(page, None)

  def _fill(self, record: _Record, tokens: Sequence[int], start: int) -> None:
    """Notes the contents of the pages that are full since `start`."""
    size = self._page_size
    for index in range(start // size, record.num_computed // size):
      page = record.pages[index]
      self._contents[page] = self._hash(record, tokens, index)

  def _hash(self, record: _Record, tokens: Sequence[int], index: int) -> int:
    size, hashes = self._page_size, record.hashes
    while len(hashes) <= index:
      start = len(hashes) * size
      before = hashes[-1] if hashes else 0
      hashes.append(hash((before, *tokens[start : start + size])))
    return hashes[index]
