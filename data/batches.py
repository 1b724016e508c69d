"""Batches for training and evaluation: rows of tokens in a known order.

    source -> token store -> packing plan -> rows -> batches
              (once)         (once)

A pair (input, target) lies within one document, so no document predicts the
next one. Every pair is trained exactly once per epoch, wherever rows are cut.
The row plan of a source (`data/packing.py`) is the same in every epoch. Each
epoch shuffles the rows of the whole source anew. With windows packing, all
texts are joined without bos and eos, and rows start at random tokens of the
joined text, as in nanoGPT.

The batch of a step depends on the seed, the step and the weights of the source
mix only. It does not depend on the number of threads, workers or processes, nor
on earlier batches. A run therefore resumes from any step in constant time. Each
process makes every global batch and uses its own rows of it. Tokens are on disk
(`data/token_store.py`), so a row costs microseconds.
"""

from collections.abc import Iterator, Sequence
import dataclasses
from typing import Any

import grain
import numpy as np

from data import (
  batch_ramp as ramp_lib,
  data_config,
  rows as rows_lib,
  source_mix,
)

Batch = rows_lib.Batch

# More steps than any run has: grain needs a finite range.
_END = 2**62


def source_seeds(seed: int, num_sources: int) -> tuple[int, ...]:
  """Returns the seed of the order of rows of each source."""
  # NumPy joins the words of numbers: for (seed, i), (2**32, 0) would be (0, 1).
  low, high = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
  words = [(low, i, high) for i in range(num_sources)]
  return tuple(
    int(np.random.SeedSequence(each).generate_state(1, np.uint64)[0])
    for each in words
  )


@dataclasses.dataclass(frozen=True)
class EvalBatches:
  """All rows of a source, in order; each iteration is one pass.

  The last batch is filled up with rows of weight 0. With windows packing, rows
  are consecutive parts of the joined text.
  """

  source: rows_lib.Rows
  batch_size: int

  def __len__(self) -> int:
    return -(-self.source.num_rows // self.batch_size)

  def __iter__(self) -> Iterator[Batch]:
    source = self.source
    for first in range(0, source.num_rows, self.batch_size):
      end = min(first + self.batch_size, source.num_rows)
      yield rows_lib.batch_of(
        ((source, source.plan.pieces(row)) for row in range(first, end)),
        num_rows=self.batch_size,
        row_length=source.row_length,
        pad_id=source.pad_id,
        arrays=source.array_names,
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Order:
  """The function from a step to its batch. Its pickle is small, for workers."""

  sources: tuple[rows_lib.Rows, ...]
  seeds: tuple[int, ...]  # one per source, for the order of its rows
  phases: tuple[source_mix.Phase, ...]
  ramp: ramp_lib.Ramp

  def __call__(self, step: int) -> Batch:
    """Returns the batch of `step`, counted from 0."""
    first = ramp_lib.rows_before(self.ramp, step)
    size = ramp_lib.rows_at(self.ramp, step)
    sources_B, indices_B = source_mix.assign(
      self.phases, np.arange(first, first + size)
    )
    rows: list[Any] = [None] * size
    for i, (source, seed) in enumerate(
      zip(self.sources, self.seeds, strict=True)
    ):
      places = np.flatnonzero(sources_B == i)
      pieces = source.shuffled_pieces(indices_B[places], seed)
      for place, piece in zip(places.tolist(), pieces, strict=True):
        rows[place] = source, piece
    return rows_lib.batch_of(
      rows,
      num_rows=size,
      row_length=self.sources[0].row_length,
      pad_id=self.sources[0].pad_id,
      arrays=self.sources[0].array_names,
    )


class TrainBatches:
  """An endless iterator over training batches that can be set to any step.

  A batch has the arrays that `data/rows.py` describes, each [B, T].
  """

  def __init__(
    self,
    sources: Sequence[rows_lib.Rows],
    config: data_config.DataConfig,
    *,
    seed: int,
  ):
    """Starts before the first step.

    Args:
      sources: the rows of `config.train_sources()`, in the same order.
      config: the data settings, validated.
      seed: seed of the order of rows; 64 bits.

    Raises:
      ValueError: a text has too few tokens for windows packing.
    """
    for source in sources:
      if source.is_random and source.store.num_ids <= config.row_length:
        raise ValueError(
          f'{source.name}: the text has {source.store.num_ids} tokens, expected'
          f' at least row_length + 1 = {config.row_length + 1} for windows'
          ' packing; shorten the rows'
        )
    self._config = config
    self._weights = [source.weight for source in config.train_sources()]
    self._order = _Order(
      sources=tuple(sources),
      seeds=source_seeds(seed, len(sources)),
      phases=source_mix.start(self._weights),
      ramp=config.ramp,
    )
    # A saved position is valid only with these settings: `set_state` compares.
    self._settings = {
      'seed': seed,
      'packing': config.packing,
      'row_length': config.row_length,
    }
    self._step = 0
    self._iterator: grain.DatasetIterator[Batch] | None = None

  @property
  def sources(self) -> tuple[rows_lib.Rows, ...]:
    """Returns the rows of each source of the source mix."""
    return self._order.sources

  def __iter__(self) -> 'TrainBatches':
    return self

  def __next__(self) -> Batch:
    if self._iterator is None:
      self._iterator = self._dataset().__iter__()
    batch = next(self._iterator)
    self._step += 1
    return batch

  def seek(self, step: int) -> None:
    """Sets the iterator to the batch of `step`, counted from 0."""
    self.close()
    self._step = step

  def epochs(self, num_steps: int) -> dict[str, float]:
    """Returns the epochs of each source after `num_steps` steps, by name."""
    row = self._config.rows_before(num_steps)
    taken = source_mix.taken_before(self._order.phases, row)
    return {
      source.name: source.epochs(count)
      for source, count in zip(self.sources, taken, strict=True)
    }

  def get_state(self) -> dict[str, Any]:
    """Returns the position after the last batch taken, as JSON values."""
    return {
      'settings': self._settings,
      'sources': self._described_sources(),
      'step': self._step,
      'row': self._config.rows_before(self._step),
      'phases': [
        {
          'from_row': phase.from_row,
          'weights': list(phase.weights),
          'taken': list(phase.taken),
        }
        for phase in self._order.phases
      ],
    }

  def set_state(self, state: dict[str, Any]) -> None:
    """Continues from `state`, with bit-identical batches.

    The weights of the source mix may differ from the weights in `state`. So may
    the sizes of later batches.

    Raises:
      ValueError: `state` was saved with other settings or other data.
    """
    saved = state['settings']
    for name, value in self._settings.items():
      if saved.get(name) != value:
        raise ValueError(
          f'the saved data position has {name} {saved.get(name)!r}, this run '
          f'has {value!r}; continue with the saved value, or start a new '
          'workdir'
        )
    self._check_sources(state['sources'])
    row = self._config.rows_before(state['step'])
    if row != state['row']:
      raise ValueError(
        f'the saved data position is after {state["row"]} rows in'
        f' {state["step"]} steps, which are {row} rows by the batch_size and'
        ' batch_ramp of this run; change data.batch_ramp for later steps only'
      )
    phases = tuple(
      source_mix.Phase(
        from_row=phase['from_row'],
        weights=tuple(phase['weights']),
        taken=tuple(phase['taken']),
      )
      for phase in state['phases']
    )
    self._order = dataclasses.replace(
      self._order, phases=source_mix.changed(phases, self._weights, row)
    )
    self.seek(state['step'])

  def close(self) -> None:
    """Stops the threads and processes that prepare batches."""
    if self._iterator is not None:
      self._iterator.close()
      self._iterator = None

  def _described_sources(self) -> list[dict[str, str]]:
    return [
      {'name': source.name, 'digest': source.store.digest}
      for source in self.sources
    ]

  def _check_sources(self, saved: list[dict[str, str]]) -> None:
    """Raises ValueError if a saved position is of other sources or tokens."""
    now = self._described_sources()
    if [s['name'] for s in saved] != [s['name'] for s in now]:
      raise ValueError(
        'the saved data position is of the sources'
        f' {", ".join(s["name"] for s in saved)}, this run has'
        f' {", ".join(s["name"] for s in now)}; a resumed run may change the'
        ' weights of its sources, but not the sources or their order'
      )
    for old, new in zip(saved, now, strict=True):
      if old['digest'] != new['digest']:
        raise ValueError(
          f'{new["name"]}: the saved data position is of tokens with SHA-256'
          f' {old["digest"][:12]}, this run has {new["digest"][:12]}: its'
          ' documents or the tokenizer have changed; put them back, or start a'
          ' new workdir'
        )

  def _dataset(self) -> grain.IterDataset[Batch]:
    """Returns the batches from the current step on, prefetched."""
    config = self._config
    ahead = -(-config.prefetch_rows // config.batch_size)
    batches = (
      grain.MapDataset.range(self._step, _END)
      .map(self._order)
      .to_iter_dataset(
        grain.ReadOptions(
          num_threads=min(config.num_threads, ahead), prefetch_buffer_size=ahead
        )
      )
    )
    if not config.num_workers:
      return batches
    # Worker i of n makes batches i, i + n, ...: n does not change any batch.
    return batches.mp_prefetch(
      grain.MultiprocessingOptions(
        num_workers=config.num_workers, per_worker_buffer_size=max(1, ahead)
      )
    )
