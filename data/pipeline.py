"""Documents to batches: tokenise, pack into rows, shuffle, batch.

    source -> shuffled, endless documents -> [bos, text, eos] -> pairs
           -> packed rows -> rows shuffled among each other -> batches

A pair is (input, target): a token and the one after it in the same document.
Pairs are made per document, before packing, so that every pair is trained
exactly once per epoch and no document predicts the next one, wherever rows are
cut. With windows packing, the whole corpus counts as one document.

Packings:
  concat_then_split: pieces of documents fill every row; no padding.
  first_fit, best_fit: whole documents (or row-sized chunks of long ones) side
    by side; a few percent of padding, fewer documents cut.
  none: one document or chunk per row, padded.
  windows: all texts joined, without bos and eos, and rows drawn from anywhere
    in it, as nanoGPT trains; no epochs.

The order is a function of the seed, and of nothing else: with several processes
each makes whole global batches and uses its rows, so that their number changes
neither the order nor the position in a checkpoint (grain's own sharding by
process ties both to it). Every host then reads, tokenises and packs everything,
at the rate of the whole run: spend more `num_threads` on it where that binds.
grain does the work, and its position is
saved with the checkpoint (`TrainBatches.get_state`), small and exact.

Reference for the packers: Ding et al. 2024 (arXiv:2404.10830).
"""

from collections.abc import Iterable, Sequence
import dataclasses
from typing import Any

import grain
import numpy as np

from data import config as config_lib, sources
from text import tokenizer as tokenizer_lib

Batch = dict[str, np.ndarray]

# Rows that first_fit and best_fit fill at a time; more of them pad less.
_NUM_BINS = 64
# Documents read and tokenised ahead, per thread.
_DOCUMENTS_PER_THREAD = 8


def train_batches(
  source: sources.Source,
  tokenizer: tokenizer_lib.Tokenizer,
  config: config_lib.DataConfig,
  *,
  seed: int,
) -> 'TrainBatches':
  """Returns an endless iterator of batches, a function of `seed`.

  A batch has tokens, targets, positions and segment_ids, int32 [B, T], and
  weights, float32 [B, T]: 1 where the target is trained, 0 in padding. Segments
  count from 1 in each row, 0 is padding; positions restart in each segment.

  Raises:
    ValueError: a setting cannot work, or `source` holds no text.
  """
  config.validate()
  if seed < 0:
    raise ValueError(f'got data seed {seed}, expected 0 or more')
  _check_has_text(source)
  seeds = np.random.SeedSequence(seed).generate_state(3).tolist()
  if config.packing == 'windows':
    rows = _random_windows(source, tokenizer, config, seed=seeds[0])
  else:
    documents = (
      # Shuffles anew in every epoch: grain seeds by the number of the epoch.
      grain.MapDataset.source(source).seed(seeds[0]).shuffle().repeat()
    )
    rows = _packed_rows(documents, tokenizer, config, seed=seeds[1])
    if config.shuffle_rows > 1:
      rows = grain.experimental.WindowShuffleIterDataset(
        rows,
        window_size=config.shuffle_rows,
        # grain adds the number of the window and wants 32 bits.
        seed=seeds[2] // 2,
      )
  batches = rows.batch(config.batch_size, drop_remainder=True)
  batches = grain.experimental.ThreadPrefetchIterDataset(
    batches,
    prefetch_buffer_size=-(-config.prefetch_rows // config.batch_size),
  )
  settings = {
    'seed': seed,
    'packing': config.packing,
    'row_length': config.row_length,
    'batch_size': config.batch_size,
    'shuffle_rows': config.shuffle_rows,
    'num_documents': len(source),
    'vocab_size': tokenizer.vocab_size,
  }
  return TrainBatches(iter(batches), settings)


def eval_batches(
  source: sources.Source,
  tokenizer: tokenizer_lib.Tokenizer,
  config: config_lib.DataConfig,
) -> Iterable[Batch]:
  """Returns one pass over every pair of `source`, in order, as batches.

  Batches are those of `train_batches`; the last one is filled up with rows of
  weight 0. Each iteration over the result is a new pass. With windows packing,
  the rows are the consecutive pieces of the joined text.

  Raises:
    ValueError: a setting cannot work, or `source` holds no text.
  """
  config.validate()
  _check_has_text(source)
  if config.packing == 'windows':
    corpus = {'pairs': _to_pairs(_joined_tokens(source, tokenizer))}
    rows = _pack(
      grain.MapDataset.source([corpus]).to_iter_dataset(),
      dataclasses.replace(config, packing='concat_then_split'),
      pad_id=tokenizer.pad_id,
    )
  else:
    rows = _packed_rows(grain.MapDataset.source(source), tokenizer, config)
  pad_id = tokenizer.pad_id
  return rows.batch(config.batch_size, drop_remainder=False).map(
    lambda batch: _fill_batch(batch, config.batch_size, pad_id)
  )


class TrainBatches:
  """An endless iterator of batches whose position can be saved."""

  def __init__(
    self, iterator: grain.DatasetIterator[Batch], settings: dict[str, Any]
  ):
    self._iterator = iterator
    # A position means something only under the settings it was taken with.
    self._settings = settings

  def __iter__(self) -> 'TrainBatches':
    return self

  def __next__(self) -> Batch:
    return next(self._iterator)

  def get_state(self) -> dict[str, Any]:
    """Returns the position after the last batch taken, ready for JSON."""
    return {'settings': self._settings, 'position': self._iterator.get_state()}

  def set_state(self, state: dict[str, Any]) -> None:
    """Continues where `state` was taken, with bit-identical batches.

    Raises:
      ValueError: it was taken under other settings.
    """
    saved = state['settings']
    for name, value in self._settings.items():
      if saved.get(name) != value:
        raise ValueError(
          f'the saved data position has {name} {saved.get(name)!r}, this run '
          f'has {value!r}; continue with the saved value, or start a new '
          'workdir'
        )
    self._iterator.set_state(_lists_to_tuples(state['position']))

  def close(self) -> None:
    """Stops the threads that prepare batches."""
    self._iterator.close()


def _packed_rows(
  documents: grain.MapDataset,
  tokenizer: tokenizer_lib.Tokenizer,
  config: config_lib.DataConfig,
  *,
  seed: int | None = None,
) -> grain.IterDataset:
  """Tokenises `documents` in threads and packs them; no seed, no shuffling."""
  read_options = grain.ReadOptions(
    num_threads=config.num_threads,
    prefetch_buffer_size=config.num_threads * _DOCUMENTS_PER_THREAD,
  )
  pairs = documents.map(_PairsOf(tokenizer)).to_iter_dataset(read_options)
  return _pack(pairs, config, pad_id=tokenizer.pad_id, seed=seed)


def _pack(
  documents: grain.IterDataset,
  config: config_lib.DataConfig,
  *,
  pad_id: int,
  seed: int | None = None,
) -> grain.IterDataset:
  """Packs {'pairs': [T, 2]} of any T, 0 included, into rows."""
  length = config.row_length
  # concat_then_split cuts by itself, where the row ends.
  max_chunk = None if config.packing == 'concat_then_split' else length
  chunks = grain.experimental.FlatMapIterDataset(documents, _Chunks(max_chunk))
  if config.packing == 'none':
    return chunks.map(lambda chunk: _row_of_one(chunk, length, pad_id))
  if config.packing == 'concat_then_split':
    packed = grain.experimental.ConcatThenSplitIterDataset(
      chunks, length_struct={'pairs': length}
    )
  else:
    packers = {
      'first_fit': grain.experimental.FirstFitPackIterDataset,
      'best_fit': grain.experimental.BestFitPackIterDataset,
    }
    packed = packers[config.packing](
      chunks,
      length_struct={'pairs': length},
      num_packing_bins=_NUM_BINS,
      shuffle_bins=seed is not None,
      seed=seed or 0,
    )
  return packed.map(lambda row: _row_of_packed(row, pad_id))


def _random_windows(
  source: sources.Source,
  tokenizer: tokenizer_lib.Tokenizer,
  config: config_lib.DataConfig,
  *,
  seed: int,
) -> grain.IterDataset:
  """Returns rows cut at random places out of the joined text."""
  ids_T = _joined_tokens(source, tokenizer)
  length = config.row_length
  num_starts = len(ids_T) - length
  if num_starts < 1:
    raise ValueError(
      f'the text has {len(ids_T)} tokens, expected at least row_length + 1 '
      f'= {length + 1} for windows packing; shorten the rows'
    )

  def draw(_: Any, rng: np.random.Generator) -> Batch:
    start = rng.integers(num_starts)
    window = {'pairs': _to_pairs(ids_T[start : start + length + 1])}
    return _row_of_one(window, length, tokenizer.pad_id)

  # grain hands out a generator per index, so row i is a function of the seed
  # and i alone. Drawing is cheaper than passing it to another thread.
  rows = grain.MapDataset.range(1).seed(seed).repeat().random_map(draw)
  return rows.to_iter_dataset(
    grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
  )


class _PairsOf:
  """Document to {'pairs': int32 [T, 2]}, T = 0 for an empty text."""

  def __init__(self, tokenizer: tokenizer_lib.Tokenizer):
    self._tokenizer = tokenizer

  def __call__(self, document: dict[str, str]) -> Batch:
    tokenizer = self._tokenizer
    ids = tokenizer.encode(document['text'])
    if ids:
      ids = [tokenizer.bos_id, *ids, tokenizer.eos_id]
    return {'pairs': _to_pairs(np.array(ids, np.int32))}


class _Chunks(grain.experimental.FlatMapTransform):
  """Cuts pairs into chunks, if a length is given; an empty text gives none."""

  def __init__(self, max_length: int | None):
    self._max_length = max_length

  def flat_map(self, element: Batch) -> Sequence[Batch]:
    pairs_T2 = element['pairs']
    step = self._max_length or max(len(pairs_T2), 1)
    return [
      {'pairs': pairs_T2[start : start + step]}
      for start in range(0, len(pairs_T2), step)
    ]


def _to_pairs(ids_T: np.ndarray) -> np.ndarray:
  """Returns int32 [T - 1, 2]: each id and its successor."""
  return np.stack([ids_T[:-1], ids_T[1:]], axis=1)


def _joined_tokens(
  source: sources.Source, tokenizer: tokenizer_lib.Tokenizer
) -> np.ndarray:
  """Returns the ids of all documents in order, int32, held in memory."""
  return np.concatenate(
    [
      np.array(tokenizer.encode(source[i]['text']), np.int32)
      for i in range(len(source))
    ]
  )


def _row_of_packed(packed: Batch, pad_id: int) -> Batch:
  """Names what a packer returns, with `pad_id` where no document is."""
  segment_ids_T = packed['pairs_segment_ids'].astype(np.int32)
  is_text_T = segment_ids_T > 0
  pairs_T2 = np.where(is_text_T[:, None], packed['pairs'], np.int32(pad_id))
  return {
    'tokens': pairs_T2[:, 0],
    'targets': pairs_T2[:, 1],
    'positions': packed['pairs_positions'].astype(np.int32),
    'segment_ids': segment_ids_T,
    'weights': is_text_T.astype(np.float32),
  }


def _row_of_one(chunk: Batch, length: int, pad_id: int) -> Batch:
  """Returns a row with one segment, padded at the end."""
  used = len(chunk['pairs'])
  slots_T = np.arange(length)
  is_text_T = slots_T < used
  return _row_of_packed(
    {
      'pairs': np.pad(chunk['pairs'], ((0, length - used), (0, 0))),
      'pairs_segment_ids': is_text_T,
      'pairs_positions': np.where(is_text_T, slots_T, 0),
    },
    pad_id,
  )


def _fill_batch(batch: Batch, batch_size: int, pad_id: int) -> Batch:
  """Appends rows of padding until there are `batch_size`."""
  missing = batch_size - len(batch['tokens'])
  if not missing:
    return batch
  fill = {'tokens': pad_id, 'targets': pad_id}
  return {
    name: np.pad(
      array_BT, ((0, missing), (0, 0)), constant_values=fill.get(name, 0)
    )
    for name, array_BT in batch.items()
  }


def _check_has_text(source: sources.Source) -> None:
  """Refuses a source on which the endless iterator would never return."""
  if not any(source[i]['text'] for i in range(len(source))):
    raise ValueError(
      f'got {len(source)} documents without any text, expected some; check the '
      'path and text_key'
    )


def _lists_to_tuples(value: Any) -> Any:
  # JSON makes lists of tuples, and grain's concat_then_split compares with a
  # tuple: left as lists, an empty remainder would be taken for a real one.
  if isinstance(value, dict):
    return {key: _lists_to_tuples(item) for key, item in value.items()}
  if isinstance(value, list):
    return tuple(map(_lists_to_tuples, value))
  return value
