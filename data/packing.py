"""Row plans: the pieces of documents in each row, by document lengths alone.

A piece is a run of consecutive pairs of one document. The kinds of packing:

  concat_then_split  all pairs of all documents are joined and cut into rows.
                     Only the last row has padding. Nothing is stored.
  first_fit          each document goes into the first row that has room for
                     it. Longer documents are cut into row-sized pieces first.
  best_fit           the longest pieces first, each into the fullest row that
                     has room for it.
  none               one piece per row.
  windows            the joined text is cut into rows, in order.

Documents of a unit (`data/example_store.py`) go into one row, side by side, and
are never cut. `first_fit`, `best_fit` and `none` pack units.

A plan has every pair exactly once. Fitting works on `_GROUP` documents at a
time. This bounds its memory and costs about one row of padding per group.

Reference: Ding et al. 2024 (arXiv:2404.10830) for best fit.
"""

import atexit
from collections.abc import Callable, Iterator
import dataclasses
import functools
import pathlib
import shutil
import tempfile
from typing import Protocol

import numpy as np

from data import token_store
from storage import derived

# Documents that are fitted together.
_GROUP = 2**16
_STARTS, _LENGTHS, _ROWS = 'starts.bin', 'lengths.bin', 'rows.bin'


class RowPlan(Protocol):
  """The pieces of every row of a source."""

  @property
  def num_rows(self) -> int: ...

  def pieces(self, row: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns int64 [pieces] each: index of the first id, number of pairs."""
    ...

  def max_pieces(self) -> int:
    """Returns the most pieces of a row, or an upper bound."""
    ...


@dataclasses.dataclass(frozen=True)
class Concatenated:
  """Row r has the pairs r T to (r + 1) T, counted over all documents."""

  store: token_store.TokenStore
  row_length: int

  @property
  def num_rows(self) -> int:
    """Returns the rows of an epoch."""
    return -(-self.store.num_pairs // self.row_length)

  def pieces(self, row: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the starts of the pieces, and their lengths."""
    starts_D = self.store.starts_D
    first = row * self.row_length
    end = min(first + self.row_length, self.store.num_pairs)
    # Documents low to high - 1 have pairs of this row.
    low = int(np.searchsorted(starts_D, first, side='right')) - 1
    high = int(np.searchsorted(starts_D, end, side='left'))
    edges = starts_D[low : high + 1].copy()
    edges[0], edges[-1] = first, end
    lengths = np.diff(edges)
    # Pair i of document d begins at id i + d (`TokenStore`).
    starts = edges[:-1] + np.arange(low, high)
    # A document of one id has no pair; only joined stores have such documents.
    return starts[lengths > 0], lengths[lengths > 0]

  def max_pieces(self) -> int:
    """Returns the most documents that a row touches."""
    starts_D, most = self.store.starts_D, 1
    for row in range(0, self.num_rows, _GROUP):
      edges = np.arange(row, min(row + _GROUP, self.num_rows) + 1)
      edges = np.minimum(edges * self.row_length, self.store.num_pairs)
      low = np.searchsorted(starts_D, edges[:-1], side='right') - 1
      high = np.searchsorted(starts_D, edges[1:], side='left')
      most = max(most, int(np.max(high - low)))
    return most


@dataclasses.dataclass(frozen=True)
class Windows:
  """Row r has the pairs r T to (r + 1) T of a joined text."""

  num_pairs: int
  row_length: int

  @property
  def num_rows(self) -> int:
    """Returns the number of rows that cover the text."""
    return -(-self.num_pairs // self.row_length)

  def pieces(self, row: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the start of the only piece, and its length."""
    start = row * self.row_length
    length = min(self.row_length, self.num_pairs - start)
    return np.array([start]), np.array([length])

  def max_pieces(self) -> int:
    """Returns 1: a row is one piece."""
    return 1


@dataclasses.dataclass(frozen=True)
class Fitted:
  """A plan on disk. Only its path is pickled."""

  directory: pathlib.Path

  @property
  def num_rows(self) -> int:
    """Returns the rows of an epoch."""
    return len(self._rows) - 1

  def pieces(self, row: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the starts of the pieces, and their lengths."""
    which = slice(*self._rows[row : row + 2].tolist())
    return self._starts[which], self._lengths[which].astype(np.int64)

  def max_pieces(self) -> int:
    """Returns the most pieces of a row."""
    return int(np.max(np.diff(self._rows), initial=1))

  @functools.cached_property
  def _rows(self) -> np.ndarray:
    return token_store.mapped(self.directory / _ROWS, 'int64')

  @functools.cached_property
  def _starts(self) -> np.ndarray:
    return token_store.mapped(self.directory / _STARTS, 'int64')

  @functools.cached_property
  def _lengths(self) -> np.ndarray:
    return token_store.mapped(self.directory / _LENGTHS, 'int32')

  def __getstate__(self) -> dict[str, object]:
    """Returns the path only: mapped arrays would be copied into the pickle."""
    return {'directory': self.directory}


def row_plan(
  store: token_store.TokenStore, packing: str, row_length: int
) -> RowPlan:
  """Returns the row plan of a source.

  A fitted plan is stored beside the tokens when it is first made. If that
  directory is read-only, the plan goes into a temporary directory.

  Args:
    store: the documents; a joined store for windows.
    packing: one of `data.data_config.PACKINGS`.
    row_length: T, pairs per row.

  Raises:
    derived.DamagedError: the plan on disk was damaged.
  """
  if packing == 'concat_then_split':
    return Concatenated(store, row_length)
  if packing == 'windows':
    return Windows(store.num_ids - 1, row_length)
  fit = {'first_fit': first_fit, 'best_fit': best_fit, 'none': _alone}[packing]
  directory = store.directory / f'{packing}-{row_length}'

  def write(partial: pathlib.Path) -> None:
    groups = _groups(store, row_length)
    _write(partial, groups, fit, row_length, store.documents_per_unit)

  try:
    derived.open_or_write(directory, write)
  except OSError:
    # The store is read-only: this process makes a plan of its own.
    directory = pathlib.Path(tempfile.mkdtemp(prefix='two_lives_plan_'))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    write(directory)
  return Fitted(directory)


def first_fit(lengths_P: np.ndarray, row_length: int) -> np.ndarray:
  """Returns the first row with room for each piece, in order, int64 [P].

  `lengths_P` are the lengths of the pieces, 1 to `row_length`.
  """
  size = 1 << max(1, int(len(lengths_P) - 1).bit_length())
  # A tournament tree over rows: node i has the larger room of its children 2i
  # and 2i + 1. A search takes log2(P) steps instead of P.
  room = [row_length] * (2 * size)
  rows = []
  for length in lengths_P.tolist():
    node = 1
    while node < size:
      node *= 2
      node += room[node] < length
    rows.append(node - size)
    room[node] -= length
    while node > 1:
      node //= 2
      room[node] = max(room[2 * node], room[2 * node + 1])
  return np.array(rows, np.int64)


def best_fit(lengths_P: np.ndarray, row_length: int) -> np.ndarray:
  """Returns the fullest row with room for each piece, the longest piece first.

  Arguments and result have the form of `first_fit`'s.
  """
  # Rows by their room. Bit r of `rooms` is set if some row has room r, so that
  # the smallest sufficient room is found by bit operations.
  by_room: list[list[int]] = [[] for _ in range(row_length + 1)]
  rooms = 0
  num_rows = 0
  rows_P = np.zeros(len(lengths_P), np.int64)
  by_length = np.argsort(-lengths_P, kind='stable')
  lengths = lengths_P[by_length].tolist()
  for piece, length in zip(by_length.tolist(), lengths, strict=True):
    fitting = rooms >> length
    if fitting:
      room = length + (fitting & -fitting).bit_length() - 1
      row = by_room[room].pop()
      if not by_room[room]:
        rooms ^= 1 << room
    else:
      room, row, num_rows = row_length, num_rows, num_rows + 1
    rows_P[piece] = row
    if room > length:  # a full row is not needed again
      by_room[room - length].append(row)
      rooms |= 1 << (room - length)
  return rows_P


def _alone(lengths_P: np.ndarray, row_length: int) -> np.ndarray:
  """Returns a separate row for every piece."""
  del row_length
  return np.arange(len(lengths_P))


def _groups(
  store: token_store.TokenStore, row_length: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields first ids and lengths of the pieces of a group of documents.

  Both are int64 [P]. Documents of more than `row_length` pairs are cut.
  """
  # _GROUP is a multiple of the documents of any unit, 1 or 2.
  for first in range(0, store.num_documents, _GROUP):
    edges = store.starts_D[first : first + _GROUP + 1]
    num_pairs_D = np.diff(edges)
    num_pieces_D = -(-num_pairs_D // row_length)
    document_P = np.repeat(np.arange(len(num_pairs_D)), num_pieces_D)
    before_D = np.cumsum(num_pieces_D) - num_pieces_D
    offset_P = (np.arange(len(document_P)) - before_D[document_P]) * row_length
    lengths_P = np.minimum(num_pairs_D[document_P] - offset_P, row_length)
    yield edges[document_P] + offset_P + first + document_P, lengths_P


def _write(
  directory: pathlib.Path,
  groups: Iterator[tuple[np.ndarray, np.ndarray]],
  fit: Callable[[np.ndarray, int], np.ndarray],
  row_length: int,
  pieces_per_unit: int,
) -> None:
  """Writes the plan; rows are in the order of their first documents."""
  num_pieces = 0
  with (
    (directory / _STARTS).open('wb') as starts,
    (directory / _LENGTHS).open('wb') as lengths,
    (directory / _ROWS).open('wb') as rows,
  ):
    rows.write(np.zeros(1, np.int64).data)
    for starts_P, lengths_P in groups:
      # Pieces that fill a row need no fitting: each has a row of its own.
      lengths_U = lengths_P.reshape(-1, pieces_per_unit).sum(axis=1)
      is_full_U = lengths_U == row_length
      rows_U = np.zeros(len(lengths_U), np.int64)
      rows_U[~is_full_U] = fit(lengths_U[~is_full_U], row_length)
      rows_U[is_full_U] = len(rows_U) + np.arange(is_full_U.sum())
      rows_P = np.repeat(rows_U, pieces_per_unit)
      # Number the rows by the first piece that each contains.
      _, firsts, rows_P = np.unique(
        rows_P, return_index=True, return_inverse=True
      )
      rows_P = np.argsort(np.argsort(firsts))[rows_P]
      order_P = np.argsort(rows_P, kind='stable')
      starts.write(starts_P[order_P].astype(np.int64).data)
      lengths.write(lengths_P[order_P].astype(np.int32).data)
      ends_R = num_pieces + np.cumsum(np.bincount(rows_P))
      rows.write(ends_R.astype(np.int64).data)
      num_pieces += len(lengths_P)
