"""Token stores: the token ids of a source on disk, tokenised only once.

A store is a directory `tokens/<key>/` of the data directory:

    ids.bin      the ids of all documents, one after the other
    starts.bin   int64 [documents + 1]; see `TokenStore`
    NAME.bin     a stream: one value per id, see `STREAM_DTYPES`
    store.json   sizes and dtype, and one digest of all these files
    files.json   size and SHA-256 of each of them (`storage/derived.py`)

The key is a hash of the source's fingerprint and of the tokenizer. The
fingerprint of files is their contents (`data/reading/readers.py`), so the key
does not depend on their names and times. The first process that needs a store
writes it, and all others wait for it (`storage/locks.py`). Hosts have a data
directory each, or share one.

A store is verified when it is opened: sizes each time, digests once on each
machine between two boots. A store that was damaged is never trained on.

A document is [bos, ids of its text, eos]. In a `joined` store, a document is
the ids of its text alone. Documents without text are left out. The documents of
`data/example_store.py` are conversations, and have streams.
"""

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import tempfile
import time
import types
from typing import Any

import numpy as np

from checks import paths
from data import sources
from storage import derived
from text import tokenizer as tokenizer_lib

Say = Callable[[str], None]

_FORMAT = 2
_META, _IDS, _STARTS = 'store.json', 'ids.bin', 'starts.bin'
# A pair (input, target) has the value of its target's id. `trained` is 1 where
# a target is trained.
STREAM_DTYPES = {'trained': 'uint8', 'labels': 'float32', 'margins': 'float32'}
# Documents are tokenised in groups. A group ends with the document in which it
# reaches this number of characters.
_GROUP_CHARS = 1_000_000
# Documents that each thread reads ahead.
_AHEAD = 4
_SECONDS_BETWEEN_REPORTS = 10.0


@dataclasses.dataclass(frozen=True)
class TokenStore:
  """The tokens of one source. Its pickle has the path, not the tokens.

  A pair is (input, target): an id and the next id of the same document. Pairs
  are counted over all documents. Document d has the pairs starts[d] to
  starts[d + 1] - 1. Pair i of document d has its input at id i + d, because
  each earlier document has one pair less than it has ids.
  """

  directory: pathlib.Path
  name: str  # name of the source, in messages
  digest: str  # SHA-256 of the ids and of the starts of documents
  num_documents: int
  num_ids: int
  dtype: str  # dtype of the ids: uint16 or uint32
  joined: bool  # whether documents are without bos and eos
  streams: tuple[str, ...] = ()
  # Documents that belong together: number k of each unit follows number k - 1.
  documents_per_unit: int = 1
  # Units that are shorter than their record, or left out, by the reason.
  counts: Mapping[str, int] = dataclasses.field(default_factory=dict)

  @property
  def num_pairs(self) -> int:
    """Returns the number of pairs that an epoch trains."""
    return self.num_ids - self.num_documents

  @functools.cached_property
  def ids_N(self) -> np.ndarray:
    """Returns the ids [N], mapped: only the pages in use are in memory."""
    return mapped(self.directory / _IDS, self.dtype)

  @functools.cached_property
  def starts_D(self) -> np.ndarray:
    """Returns int64 [documents + 1], mapped: each document's first pair."""
    return mapped(self.directory / _STARTS, 'int64')

  def stream_N(self, name: str) -> np.ndarray:
    """Returns the values [N] of a stream, mapped."""
    return mapped_once(self.directory / f'{name}.bin', STREAM_DTYPES[name])

  def __getstate__(self) -> dict[str, object]:
    """Returns the fields; mapped arrays would be copied into the pickle."""
    names = [field.name for field in dataclasses.fields(self)]
    return {name: getattr(self, name) for name in names}


def open_or_write(
  source: sources.Source,
  tokenizer: tokenizer_lib.Tokenizer,
  data_dir: str | os.PathLike,
  *,
  name: str,
  joined: bool = False,
  num_threads: int = 2,
  say: Say = lambda _: None,
) -> TokenStore:
  """Returns the token store of `source`; writes it if it does not exist.

  Args:
    source: the documents.
    tokenizer: makes ids of the documents.
    data_dir: directory of all stores; may be read-only if this store exists.
    name: name of the source, in messages.
    joined: whether documents are without bos and eos.
    num_threads: threads that read documents; tokenising uses all cores.
    say: receives a line about progress every ten seconds.

  Raises:
    derived.DamagedError: the store was damaged.
    ValueError: no document has text, a document has no UTF-8 form, the
      documents change, or the data directory cannot be written.
  """
  key = _key(source, tokenizer, joined)
  bos, eos = (
    np.array([] if joined else [end], np.int64)
    for end in (tokenizer.bos_id, tokenizer.eos_id)
  )

  def write(partial: pathlib.Path) -> None:
    documents = reporting(read_ahead(source, num_threads), name, source, say)
    writer = Writer(partial, tokenizer.vocab_size, joined=joined)
    with writer:
      for group in _groups(documents):
        writer.append(
          [np.concatenate((bos, ids, eos)) for ids in _encode(tokenizer, group)]
        )
    if not writer.num_ids:
      raise ValueError(
        f'{name}: got {len(source)} documents without any text, expected some'
        ' text; check the path and text_key'
      )
    # Else the store would hold other documents than its key names.
    if hasattr(source, 'fingerprint') and key != _key(
      source, tokenizer, joined
    ):
      raise ValueError(
        f'{name}: got documents that changed while they were tokenised,'
        ' expected the same until the end; start again when they are complete'
      )

  return open_or_make(key, write, data_dir, name=name)


def open_or_make(
  key: str,
  write: Callable[[pathlib.Path], None],
  data_dir: str | os.PathLike,
  *,
  name: str,
) -> TokenStore:
  """Returns the store of a key; `write` fills its directory if there is none.

  Raises:
    derived.DamagedError: the store was damaged.
    ValueError: the data directory cannot be written; and as `write`.
  """
  place = pathlib.Path(paths.expanded('data.data_dir', data_dir))
  directory = place / 'tokens' / key
  try:
    derived.open_or_write(directory, write)
  except OSError as error:
    raise ValueError(
      f'{name}: its tokens cannot be written to {directory.parent} ({error});'
      ' set data.data_dir to a writable directory with enough room'
    ) from error
  meta = json.loads((directory / _META).read_text())
  meta['streams'] = tuple(meta.get('streams', ()))
  return TokenStore(directory=directory, name=name, **meta)


def tokenizer_digest(tokenizer: tokenizer_lib.Tokenizer) -> str:
  """Returns the SHA-256 of the files that the tokenizer saves."""
  digest = hashlib.sha256()
  with tempfile.TemporaryDirectory() as directory:
    tokenizer.save(directory)
    for path in sorted(pathlib.Path(directory).iterdir()):
      digest.update(f'{path.name} {path.stat().st_size} '.encode())
      digest.update(path.read_bytes())
  return digest.hexdigest()


def mapped(path: pathlib.Path, dtype: str) -> np.ndarray:
  """Returns a file as a mapped array; its pages are read when used."""
  if not path.stat().st_size:  # an empty file cannot be mapped
    return np.zeros(0, dtype)
  # A plain ndarray over the same pages: indexing an np.memmap costs several
  # times as much.
  return np.asarray(np.memmap(path, dtype, mode='r'))


# Kept, because each row needs a file: mapping it again costs ten times as much.
mapped_once = functools.lru_cache(maxsize=64)(mapped)


class Writer:
  """Writes a store, one group of documents at a time."""

  def __init__(
    self,
    directory: pathlib.Path,
    vocab_size: int,
    *,
    joined: bool = False,
    streams: Sequence[str] = (),
    documents_per_unit: int = 1,
    counts: Mapping[str, int] = types.MappingProxyType({}),
  ):
    """Opens no file yet; the arguments are fields of `TokenStore`."""
    self._directory = directory
    self._joined, self.streams = joined, tuple(streams)
    self._documents_per_unit = documents_per_unit
    self._dtype = 'uint16' if vocab_size <= 2**16 else 'uint32'
    self._num_documents = 0
    self.num_ids = 0
    self._counts = counts  # read at the end

  def __enter__(self) -> 'Writer':
    names = (_IDS, _STARTS, *(f'{name}.bin' for name in self.streams))
    self._files = {n: (self._directory / n).open('wb') for n in names}
    self._digests = {n: hashlib.sha256() for n in names}
    self._write(_STARTS, np.zeros(1, np.int64))
    return self

  def __exit__(self, *exception) -> None:
    for file in self._files.values():
      file.close()
    if exception[0] is not None:
      return
    digest = self._digests[_IDS]
    for name in (_STARTS, *(f'{name}.bin' for name in self.streams)):
      digest.update(self._digests[name].digest())
    meta = {
      'digest': digest.hexdigest(),
      'num_documents': self._num_documents,
      'num_ids': self.num_ids,
      'dtype': self._dtype,
      'joined': self._joined,
    }
    if self.streams:
      meta |= {
        'streams': self.streams,
        'documents_per_unit': self._documents_per_unit,
        'counts': dict(sorted(self._counts.items())),
      }
    (self._directory / _META).write_text(json.dumps(meta))

  def append(
    self,
    documents: Sequence[Sequence[int] | np.ndarray],
    streams: Mapping[str, np.ndarray] = types.MappingProxyType({}),
  ) -> None:
    """Appends documents; none of them may be empty.

    Args:
      documents: the ids of each document.
      streams: the values of their ids, joined.
    """
    ids_N = np.concatenate(documents).astype(self._dtype)
    lengths_D = np.array([len(ids) for ids in documents], np.int64)
    # A document of n ids has n - 1 pairs.
    first = self.num_ids - self._num_documents
    self._write(_STARTS, first + np.cumsum(lengths_D - 1))
    self._write(_IDS, ids_N)
    for name in self.streams:
      self._write(f'{name}.bin', streams[name].astype(STREAM_DTYPES[name]))
    self.num_ids += len(ids_N)
    self._num_documents += len(documents)

  def _write(self, name: str, array: np.ndarray) -> None:
    self._files[name].write(array.data)
    self._digests[name].update(array.data)


def _encode(
  tokenizer: tokenizer_lib.Tokenizer, documents: Sequence[dict[str, str]]
) -> list[np.ndarray]:
  try:
    return tokenizer.encode_batch([document['text'] for document in documents])
  except ValueError:
    # The batch does not tell which document failed: find it one by one.
    for document in documents:
      try:
        tokenizer.encode(document['text'])
      except ValueError as error:
        raise ValueError(f'document {document["id"]}: {error}') from None
    raise


def _key(
  source: sources.Source, tokenizer: tokenizer_lib.Tokenizer, joined: bool
) -> str:
  """Returns the directory name of a store, a hash of its text and tokenizer."""
  describe = getattr(source, 'fingerprint', None)
  described = describe() if describe else _hash_of_documents(source)
  parts = [_FORMAT, described, tokenizer_digest(tokenizer), joined]
  return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _hash_of_documents(source: sources.Source) -> str:
  digest = hashlib.sha256()
  for i in range(len(source)):
    text = source[i]['text'].encode('utf-8', errors='surrogatepass')
    digest.update(f'{len(text)} '.encode())
    digest.update(text)
  return digest.hexdigest()


def read_ahead(source: Any, num_threads: int) -> Iterator[Any]:
  """Yields the documents in order; threads read a few documents ahead."""
  queue: collections.deque[futures.Future] = collections.deque()
  with futures.ThreadPoolExecutor(num_threads) as pool:
    try:
      for i in range(len(source)):
        queue.append(pool.submit(source.__getitem__, i))
        if len(queue) == _AHEAD * num_threads:
          yield queue.popleft().result()
      while queue:
        yield queue.popleft().result()
    finally:
      pool.shutdown(cancel_futures=True)


def _groups(
  documents: Iterator[dict[str, str]],
) -> Iterator[list[dict[str, str]]]:
  """Yields groups of documents that have text, to be tokenised together."""
  group, num_chars = [], 0
  for document in documents:
    if not document['text']:
      continue
    group.append(document)
    num_chars += len(document['text'])
    if num_chars >= _GROUP_CHARS:
      yield group
      group, num_chars = [], 0
  if group:
    yield group


def reporting(
  documents: Iterator[Any], name: str, source: Any, say: Say
) -> Iterator[Any]:
  """Yields the documents; reports progress every ten seconds."""
  started = reported = time.monotonic()
  for i, document in enumerate(documents):
    now = time.monotonic()
    if now - reported >= _SECONDS_BETWEEN_REPORTS:
      reported = now
      left = (now - started) / max(i, 1) * (len(source) - i)
      say(
        f'tokenising {name}: {i:,} of {len(source):,} documents,'
        f' {left:,.0f} s left'
      )
    yield document
