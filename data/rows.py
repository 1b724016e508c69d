"""Rows of one source: its tokens, laid out by a row plan.

A row has the arrays tokens, targets, positions and segment_ids, int32 [T], and
weights, float32 [T]. A weight is 1 where the target is trained, and 0 in
padding and where a store says so (its stream `trained`). Further arrays,
float32 [T], are streams of the store, or values of its ids that were computed
later; each is 0 in padding. Segments, which are pieces of documents, count from
1 in each row, and segment 0 is padding. Positions restart at 0 in each segment.
"""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import pathlib
from typing import Any, NamedTuple

import numpy as np

from data import (
  data_config,
  example_store,
  packing as packing_lib,
  row_order,
  token_store,
)
from data.examples import encoding
from text import tokenizer as tokenizer_lib

Batch = dict[str, np.ndarray]


class Column(NamedTuple):
  """A file with values of all ids of a store, that were computed later."""

  path: pathlib.Path
  dtype: str = 'float32'
  width: int = 0  # values of each id; 0: one, without an axis for it

  @property
  def shape(self) -> tuple[int, ...]:
    """Returns the shape of the values of one id."""
    return (self.width,) if self.width else ()


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
  # Streams of the store that become arrays of a batch, besides `trained`.
  arrays: tuple[str, ...] = ()
  # Files of further arrays.
  computed: Mapping[str, Column] = dataclasses.field(default_factory=dict)

  @property
  def name(self) -> str:
    """Returns the source's name."""
    return self.store.name

  @property
  def array_names(self) -> tuple[str, ...]:
    """Returns the names of a batch's arrays besides the arrays of all rows."""
    return (*self.arrays, *self.computed)

  @property
  def num_rows(self) -> int:
    """Returns the number of rows of one epoch."""
    return self.plan.num_rows

  @property
  def fill_rate(self) -> float:
    """Returns the share of row positions that are no padding."""
    if self.is_random:
      return 1.0
    return self.store.num_pairs / (self.num_rows * self.row_length)

  @property
  def trained_share(self) -> float:
    """Returns the share of the pairs whose target is trained."""
    if 'trained' not in self.store.streams:
      return 1.0
    num_trained = np.count_nonzero(self.store.stream_N('trained'))
    return num_trained / self.store.num_pairs

  def values_N(self, name: str) -> np.ndarray:
    """Returns the values of all ids, mapped: a stream, or a computed array."""
    if name in self.computed:
      column = self.computed[name]
      values = token_store.mapped_once(column.path, column.dtype)
      return values.reshape(-1, *column.shape)
    return self.store.stream_N(name)

  def zeros(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns an array of a batch as it is where there is padding.

    Args:
      shape: [..., T], without the axis of several values per id.
    """
    column = self.computed.get(name)
    if column is None:
      return np.zeros(shape, np.float32)
    return np.zeros((*shape, *column.shape), column.dtype)

  def with_array(self, name: str, column: Column) -> 'Rows':
    """Returns the rows with an array from a file that `scattered` is for."""
    return dataclasses.replace(self, computed={**self.computed, name: column})

  def scattered(self, arrays: Iterable[np.ndarray]) -> np.ndarray:
    """Returns the values of all ids, [N, ...], from the values of all rows.

    They are float32, or int32 for integers.

    Args:
      arrays: [rows, T, ...], of the rows in the order of the plan; rows behind
        the last one are padding.
    """
    values_N = np.zeros(self.store.num_ids, np.float32)
    row = 0
    for values_RT in arrays:
      if not row:
        shape = self.store.num_ids, *values_RT.shape[2:]
        is_id = np.issubdtype(values_RT.dtype, np.integer)
        values_N = np.zeros(shape, np.int32 if is_id else np.float32)
      for values_T in values_RT[: self.num_rows - row]:
        targets = _ids_of(*self.plan.pieces(row)) + 1
        values_N[targets] = values_T[: len(targets)]
        row += 1
    return values_N

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
      **self._described_examples(),
      'digest': self.store.digest,
    }

  def _described_examples(self) -> dict[str, Any]:
    if not self.store.streams:
      return {}
    return {
      'trained_share': self.trained_share,
      'counts': dict(self.store.counts),
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
  source: Any,
  tokenizer: tokenizer_lib.Tokenizer,
  config: data_config.DataConfig,
  *,
  name: str,
  template: str = '',
  arrays: tuple[str, ...] = (),
  say: token_store.Say = lambda _: None,
) -> Rows:
  """Returns the rows of `source`; tokens and plan are made if not on disk.

  Args:
    source: documents; whole records if examples are not text.
    template: the chat template of records.
    arrays: streams that become arrays of a batch.

  Raises:
    ValueError: no document has text, a document or a record cannot be read, the
      store has no such stream, or the data directory cannot be written.
  """
  joined = config.packing == 'windows'
  if config.examples == data_config.TEXT:
    store = token_store.open_or_write(
      source,
      tokenizer,
      config.data_dir,
      name=name,
      joined=joined,
      num_threads=config.num_threads,
      say=say,
    )
  else:
    store = example_store.open_or_write(
      source,
      encoding.Encoder(tokenizer, template, config.examples),
      config.data_dir,
      name=name,
      row_length=config.row_length,
      too_long=config.too_long,
      num_threads=config.num_threads,
      say=say,
    )
  if missing := sorted(set(arrays) - set(store.streams)):
    raise ValueError(
      f'{name}: got examples without {", ".join(missing)}, expected them for'
      ' the objective; add them to every record, or choose another objective'
    )
  return Rows(
    store=store,
    plan=packing_lib.row_plan(store, config.packing, config.row_length),
    row_length=config.row_length,
    pad_id=tokenizer.pad_id,
    is_random=joined,
    arrays=arrays,
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
  arrays: Sequence[str] = (),
) -> Batch:
  """Returns a batch of arrays [B, T].

  Args:
    rows: a source and the pieces of one row, for each row.
    num_rows: B; missing rows are padding of weight 0.
    row_length: T.
    pad_id: token id of padding.
    arrays: names of further arrays, [B, T] or with an axis more; float32,
      unless they were computed.
  """
  shape = num_rows, row_length
  batch = {
    'tokens': np.full(shape, pad_id, np.int32),
    'targets': np.full(shape, pad_id, np.int32),
    'positions': np.zeros(shape, np.int32),
    'segment_ids': np.zeros(shape, np.int32),
    'weights': np.zeros(shape, np.float32),
  }
  laid_out = list(rows)
  for name in arrays:
    batch[name] = laid_out[0][0].zeros(name, shape)
  for b, (source, (starts, lengths)) in enumerate(laid_out):
    row = {name: array[b] for name, array in batch.items()}
    _fill(row, source, starts, lengths)
    for name in arrays:
      targets = _ids_of(starts, lengths) + 1
      row[name][: len(targets)] = source.values_N(name)[targets]
  return batch


def _ids_of(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
  """Returns the index of the input id of each pair of a row."""
  ends = np.cumsum(lengths)
  # Distance to the start of the piece, as ends - lengths are the starts.
  return np.repeat(starts - (ends - lengths), lengths) + np.arange(ends[-1])


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
    ids_T = _ids_of(starts, lengths)
    used = len(ids_T)
    row['tokens'][:used] = ids_N[ids_T]
    row['targets'][:used] = ids_N[ids_T + 1]
    row['positions'][:used] = ids_T - np.repeat(starts, lengths)
    segments = np.arange(1, len(starts) + 1)
    row['segment_ids'][:used] = np.repeat(segments, lengths)
  if 'trained' in source.store.streams:
    targets = _ids_of(starts, lengths) + 1
    row['weights'][:used] = source.store.stream_N('trained')[targets]
  else:
    row['weights'][:used] = 1
