"""Rows of one source: its tokens, laid out by a row plan.

A row has the arrays tokens, targets, positions and segment_ids, int32 [T], and
weights, float32 [T]. A weight is 1 where the target is trained and 0 in
padding. Segments, which are pieces of documents, count from 1 in each row, and
segment 0 is padding. Positions restart at 0 in each segment.
"""

from collections.abc import Iterable
import dataclasses
from typing import Any

import numpy as np

from data import (
  data_config,
  packing as packing_lib,
  row_order,
  sources,
  token_store,
)
from text import tokenizer as tokenizer_lib

Batch = dict[str, np.ndarray]
Pieces = tuple[np.ndarray, np.ndarray]  # first ids, numbers of pairs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
  """The rows of one source. Its pickle is small."""

  store: token_store.TokenStore
  plan: packing_lib.RowPlan
  row_length: int
  pad_id: int
  # True for windows packing: training rows start at random tokens, and only
  # evaluation takes the rows of the plan.
  is_random: bool

  @property
  def name(self) -> str:
    """Returns the source's name."""
    return self.store.name

  @property
  def num_rows(self) -> int:
    """Returns the number of rows of one epoch."""
    return self.plan.num_rows

  @property
  def fill_rate(self) -> float:
    """Returns the share of row positions that are trained, not padding."""
    if self.is_random:
      return 1.0
    return self.store.num_pairs / (self.num_rows * self.row_length)

  def epochs(self, num_rows: int) -> float:
    """Returns how often `num_rows` rows train each pair, on average."""
    if self.is_random:
      return num_rows * self.row_length / (self.store.num_ids - 1)
    return num_rows / self.num_rows

  def describe(self) -> dict[str, Any]:
    """Returns name, sizes and digest of the source, as JSON values."""
    return {
      'name': self.name,
      'documents': self.store.num_documents,
      'tokens': self.store.num_ids,
      'rows': self.num_rows,
      'fill_rate': self.fill_rate,
      'digest': self.store.digest,
    }

  def shuffled_pieces(self, indices_N: np.ndarray, seed: int) -> list[Pieces]:
    """Returns the pieces of rows at places of an endless, shuffled order."""
    if self.is_random:
      # A row of T pairs needs T + 1 ids: the last start is num_ids - T - 1.
      num_starts = self.store.num_ids - self.row_length
      length_1 = np.array([self.row_length])
      starts_N = row_order.drawn(indices_N, num_starts, seed)
      return [(start_1, length_1) for start_1 in starts_N[:, None]]
    rows_N = row_order.shuffled(indices_N, self.num_rows, seed)
    return [self.plan.pieces(row) for row in rows_N.tolist()]


def open_rows(
  source: sources.Source,
  tokenizer: tokenizer_lib.Tokenizer,
  config: data_config.DataConfig,
  *,
  name: str,
  say: token_store.Say = lambda _: None,
) -> Rows:
  """Returns the rows of `source`; tokens and plan are made if not on disk.

  Raises:
    ValueError: no document has text, a document cannot be read, or the data
      directory cannot be written.
  """
  joined = config.packing == 'windows'
  store = token_store.open_or_write(
    source,
    tokenizer,
    config.data_dir,
    name=name,
    joined=joined,
    num_threads=config.num_threads,
    say=say,
  )
  return Rows(
    store=store,
    plan=packing_lib.row_plan(store, config.packing, config.row_length),
    row_length=config.row_length,
    pad_id=tokenizer.pad_id,
    is_random=joined,
  )


def max_documents(sources_of_rows: Iterable[Rows]) -> int:
  """Returns the most segments of a row: pieces, and padding after several."""
  most = max(rows.plan.max_pieces() for rows in sources_of_rows)
  return most + 1 if most > 1 else 1


def batch_of(
  rows: Iterable[tuple[Rows, Pieces]],
  *,
  num_rows: int,
  row_length: int,
  pad_id: int,
) -> Batch:
  """Returns a batch of [B, T] arrays.

  Args:
    rows: a source and the pieces of one row, for each row.
    num_rows: B; missing rows are padding of weight 0.
    row_length: T.
    pad_id: token id of padding.
  """
  shape = num_rows, row_length
  batch = {
    'tokens': np.full(shape, pad_id, np.int32),
    'targets': np.full(shape, pad_id, np.int32),
    'positions': np.zeros(shape, np.int32),
    'segment_ids': np.zeros(shape, np.int32),
    'weights': np.zeros(shape, np.float32),
  }
  for b, (source, (starts, lengths)) in enumerate(rows):
    row = {name: array[b] for name, array in batch.items()}
    _fill(row, source, starts, lengths)
  return batch


def _fill(
  row: Batch, source: Rows, starts: np.ndarray, lengths: np.ndarray
) -> None:
  """Writes the pieces of one row side by side, from the left."""
  ids_N = source.store.ids_N
  # A single piece is contiguous: slices are faster than an array of indices.
  if len(starts) == 1:
    start, used = int(starts[0]), int(lengths[0])
    row['tokens'][:used] = ids_N[start : start + used]
    row['targets'][:used] = ids_N[start + 1 : start + used + 1]
    row['positions'][:used] = np.arange(used)
    row['segment_ids'][:used] = 1
  else:
    ends = np.cumsum(lengths)
    used = int(ends[-1])
    slots_T = np.arange(used)
    # Distance to the start of the piece, as ends - lengths are the starts.
    positions_T = slots_T - np.repeat(ends - lengths, lengths)
    ids_T = np.repeat(starts, lengths) + positions_T
    row['tokens'][:used] = ids_N[ids_T]
    row['targets'][:used] = ids_N[ids_T + 1]
    row['positions'][:used] = positions_T
    segments = np.arange(1, len(starts) + 1)
    row['segment_ids'][:used] = np.repeat(segments, lengths)
  row['weights'][:used] = 1
