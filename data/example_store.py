"""Token stores of conversations: units of documents, with trained targets.

A record becomes a *unit*: documents that stay together in one row
(`data/examples/encoding.py`). A conversation is a unit of one document. A pair
is a unit of two, the chosen and the rejected answer. A labelled example is a
unit of two, for KTO: the example, and its prompt with the next example's
completion, which the estimate of the divergence needs.

A unit is never cut into two rows. A unit longer than a row is truncated, left
out, or an error. A unit is also left out if one of its documents has no trained
target. Both are counted by their reason.
"""

import collections
from collections.abc import Iterable, Iterator, Mapping
import hashlib
import itertools
import json
import os
import pathlib
from typing import Any, Protocol

import numpy as np

from data import data_config, token_store
from data.examples import encoding

# Documents of a unit, by kind of example.
_UNITS = {'chat': 1, 'pairs': 2, 'labelled': 2}
_GROUP = 1_000  # records that are written together

TRUNCATED = 'truncated to row_length'
TOO_LONG_DROPPED = 'longer than row_length'
NOTHING_TRAINED = 'without a trained token in row_length'


class Records(Protocol):
  """Random access to records {'record': JSON object, 'id': its place}."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Mapping[str, Any]: ...

  def fingerprint(self) -> str:
    """Returns a text that changes when the records change."""
    ...


def open_or_write(
  source: Records,
  encoder: encoding.Encoder,
  data_dir: str | os.PathLike,
  *,
  name: str,
  row_length: int,
  too_long: str,
  num_threads: int = 2,
  say: token_store.Say = lambda _: None,
) -> token_store.TokenStore:
  """Returns the token store of records; writes it if it does not exist.

  Args:
    source: the records.
    encoder: makes units of them.
    data_dir: directory of all stores.
    name: name of the source, in messages.
    row_length: pairs of a row, in which a unit has to fit.
    too_long: one of `data_config.TOO_LONG`.
    num_threads: threads that read records.
    say: receives a line about progress every ten seconds.

  Raises:
    derived.DamagedError: the store was damaged.
    ValueError: a record is malformed, or longer than a row with `error`; no
      record is left; the records change; or the data directory cannot be
      written.
  """
  key = _key(source, encoder, row_length, too_long)

  def write(partial: pathlib.Path) -> None:
    counts: collections.Counter[str] = collections.Counter()
    units = _units(source, encoder, num_threads, name, say, counts)
    groups = _groups(_fitting(units, row_length, too_long, counts))
    first = next(groups, None)
    if first is None:
      reasons = ', '.join(f'{n} {why}' for why, n in counts.items())
      raise ValueError(
        f'{name}: got {len(source)} records of which none is left ({reasons}),'
        ' expected some that have an answer and fit into data.row_length ='
        f' {row_length}'
      )
    with token_store.Writer(
      partial,
      encoder.tokenizer.vocab_size,
      streams=('trained', *first[0].streams),
      documents_per_unit=_UNITS[encoder.kind],
      counts=counts,
    ) as writer:
      for group in itertools.chain([first], groups):
        _append(writer, group)
    if key != _key(source, encoder, row_length, too_long):
      raise ValueError(
        f'{name}: got records that changed while they were tokenised, expected'
        ' the same until the end; start again when they are complete'
      )

  return token_store.open_or_make(key, write, data_dir, name=name)


def _key(source, encoder, row_length, too_long) -> str:
  parts = [
    'examples 1',
    source.fingerprint(),
    encoder.digest(),
    token_store.tokenizer_digest(encoder.tokenizer),
    row_length,
    too_long,
  ]
  return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _units(
  source, encoder, num_threads, name, say, counts
) -> Iterator[tuple[str, encoding.Unit]]:
  """Yields the place of each record, and its unit; counts records left out."""
  is_labelled = encoder.kind == 'labelled'
  first = source[0]['record'] if is_labelled and len(source) else None
  read = token_store.read_ahead(source, num_threads)
  read = token_store.reporting(read, name, source, say)
  for item, following in _with_next(read):
    other = None
    if is_labelled:
      other = following['record'] if following else first
    try:
      yield item['id'], encoder.unit(item['record'], item['id'], other)
    except encoding.Empty as empty:
      counts[str(empty)] += 1


def _with_next(items: Iterator[Any]) -> Iterator[tuple[Any, Any]]:
  """Yields each item and the next one; None after the last."""
  before = next(items, None)
  for item in items:
    yield before, item
    before = item
  if before is not None:
    yield before, None


def _fitting(units, row_length, too_long, counts) -> Iterator[encoding.Unit]:
  """Yields the units that fit into a row; counts the others."""
  names = None
  for where, unit in units:
    lengths = [len(document.ids) - 1 for document in unit.documents]
    if sum(lengths) > row_length:
      if too_long == data_config.ERROR:
        raise ValueError(
          f'{where}: got an example of {sum(lengths)} tokens, expected at most'
          f' data.row_length = {row_length}; make rows longer, or set'
          ' data.too_long to truncate or drop'
        )
      if too_long == data_config.DROP:
        counts[TOO_LONG_DROPPED] += 1
        continue
      unit = _truncated(unit, lengths, row_length)
      if unit is not None:
        counts[TRUNCATED] += 1
    if unit is None or not all(d.trained[1:].any() for d in unit.documents):
      counts[NOTHING_TRAINED] += 1
      continue
    if names is None:
      names = unit.streams.keys()
    if unit.streams.keys() != names:
      raise ValueError(
        f'{where}: got an example with {_listed(unit.streams)}, expected'
        f' {_listed(names)} as in the examples before it'
      )
    yield unit


def _listed(names: Iterable[str]) -> str:
  return ', '.join(sorted(names)) or 'no numbers such as a margin'


def _truncated(
  unit: encoding.Unit, lengths: list[int], row_length: int
) -> encoding.Unit | None:
  """Returns the unit with its ends cut off, the longest document first.

  None if a document would have no pair.
  """
  left = row_length
  kept = [0] * len(lengths)
  # The shortest documents keep their length, the others share the rest.
  order = sorted(range(len(lengths)), key=lengths.__getitem__)
  for place, which in enumerate(order):
    kept[which] = min(lengths[which], left // (len(order) - place))
    left -= kept[which]
  if not all(kept):
    return None
  documents = tuple(
    encoding.Document(each.ids[: n + 1], each.trained[: n + 1])
    for each, n in zip(unit.documents, kept, strict=True)
  )
  return unit._replace(documents=documents)


def _groups(units: Iterator[encoding.Unit]) -> Iterator[list[encoding.Unit]]:
  group: list[encoding.Unit] = []
  for unit in units:
    group.append(unit)
    if len(group) == _GROUP:
      yield group
      group = []
  if group:
    yield group


def _append(writer: token_store.Writer, units: list[encoding.Unit]) -> None:
  documents = [each for unit in units for each in unit.documents]
  lengths = [len(each.ids) for each in documents]
  streams = {'trained': np.concatenate([each.trained for each in documents])}
  for name in writer.streams[1:]:
    values = [value for unit in units for value in unit.streams[name]]
    streams[name] = np.repeat(np.array(values, np.float32), lengths)
  writer.append([each.ids for each in documents], streams)
