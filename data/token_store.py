"""Token stores: the token ids of a source on disk, tokenised only once.

A store is a directory `tokens/<key>/` of the data directory:

    ids.bin      the ids of all documents, one after the other
    starts.bin   int64 [documents + 1]; see `TokenStore`
    store.json   sizes and dtype, and one digest of both files
    files.json   size and SHA-256 of each of them (`storage/derived.py`)

The key is a hash of the source's fingerprint and of the tokenizer. The
fingerprint of files is their contents (`data/reading/readers.py`), so the key
does not depend on their names and times. The first process that needs a store
writes it, and all others wait for it (`storage/locks.py`). Hosts have a data
directory each, or share one.

A store is verified when it is opened: sizes each time, digests once on each
machine between two boots. A store that was damaged is never trained on.

A document is [bos, ids of its text, eos]. In a `joined` store, a document is
the ids of its text alone. Documents without text are left out.
"""

import collections
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import tempfile
import time

import numpy as np

from checks import paths
from data import sources
from storage import derived
from text import tokenizer as tokenizer_lib

Say = Callable[[str], None]

_FORMAT = 2
_META, _IDS, _STARTS = 'store.json', 'ids.bin', 'starts.bin'
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
  name: str  # of the source, in messages
  digest: str  # SHA-256 of the ids and of where documents start
  num_documents: int
  num_ids: int
  dtype: str  # of the ids: uint16 or uint32
  joined: bool  # whether documents are without bos and eos

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
    name: of the source, in messages.
    joined: whether documents are without bos and eos.
    num_threads: threads that read documents; tokenising uses all cores.
    say: receives a line about progress every ten seconds.

  Raises:
    derived.DamagedError: the store was damaged.
    ValueError: no document has text, a document has no UTF-8 form, the
      documents change, or the data directory cannot be written.
  """
  key = _key(source, tokenizer, joined)
  place = pathlib.Path(paths.expanded('data.data_dir', data_dir))
  directory = place / 'tokens' / key

  def write(partial: pathlib.Path) -> None:
    documents = _reporting(_documents(source, num_threads), name, source, say)
    writer = _Writer(partial, tokenizer, joined)
    with writer:
      for group in _groups(documents):
        writer.add(group)
    if not writer.num_ids:
      raise ValueError(
        f'{name}: got {len(source)} documents without any text, expected some'
        ' text; check the path and text_key'
      )
    # Else the store would have tokens of other documents than its key says.
    if hasattr(source, 'fingerprint') and key != _key(
      source, tokenizer, joined
    ):
      raise ValueError(
        f'{name}: got documents that changed while they were tokenised,'
        ' expected the same until the end; start again when they are complete'
      )

  try:
    derived.open_or_write(directory, write)
  except OSError as error:
    raise ValueError(
      f'{name}: its tokens cannot be written to {directory.parent} ({error});'
      ' set data.data_dir to a writable directory with enough room'
    ) from error
  meta = json.loads((directory / _META).read_text())
  return TokenStore(directory=directory, name=name, **meta)


def _tokenizer_digest(tokenizer: tokenizer_lib.Tokenizer) -> str:
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


class _Writer:
  """Writes a store, one group of documents at a time."""

  def __init__(
    self,
    directory: pathlib.Path,
    tokenizer: tokenizer_lib.Tokenizer,
    joined: bool,
  ):
    self._directory = directory
    self._tokenizer = tokenizer
    self._joined = joined
    self._bos = [] if joined else [tokenizer.bos_id]
    self._eos = [] if joined else [tokenizer.eos_id]
    self._dtype = 'uint16' if tokenizer.vocab_size <= 2**16 else 'uint32'
    self._num_documents = 0
    self._ids_digest, self._starts_digest = hashlib.sha256(), hashlib.sha256()
    self.num_ids = 0

  def __enter__(self) -> '_Writer':
    self._ids = (self._directory / _IDS).open('wb')
    self._starts = (self._directory / _STARTS).open('wb')
    self._add_starts(np.zeros(1, np.int64))
    return self

  def __exit__(self, *exception) -> None:
    self._ids.close()
    self._starts.close()
    if exception[0] is not None:
      return
    self._ids_digest.update(self._starts_digest.digest())
    meta = {
      'digest': self._ids_digest.hexdigest(),
      'num_documents': self._num_documents,
      'num_ids': self.num_ids,
      'dtype': self._dtype,
      'joined': self._joined,
    }
    (self._directory / _META).write_text(json.dumps(meta))

  def add(self, documents: Sequence[dict[str, str]]) -> None:
    """Appends documents; none of them may be empty."""
    texts = _encode(self._tokenizer, documents)
    with_ends = [part for ids in texts for part in (self._bos, ids, self._eos)]
    ids_N = np.concatenate(with_ends).astype(self._dtype)
    num_ends = len(self._bos) + len(self._eos)
    lengths_D = np.array([len(ids) + num_ends for ids in texts], np.int64)
    # A document of n ids has n - 1 pairs.
    first = self.num_ids - self._num_documents
    self._add_starts(first + np.cumsum(lengths_D - 1))
    self._ids.write(ids_N.data)
    self._ids_digest.update(ids_N.data)
    self.num_ids += len(ids_N)
    self._num_documents += len(texts)

  def _add_starts(self, starts_D: np.ndarray) -> None:
    self._starts.write(starts_D.data)
    self._starts_digest.update(starts_D.data)


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
  parts = [_FORMAT, described, _tokenizer_digest(tokenizer), joined]
  return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _hash_of_documents(source: sources.Source) -> str:
  digest = hashlib.sha256()
  for i in range(len(source)):
    text = source[i]['text'].encode('utf-8', errors='surrogatepass')
    digest.update(f'{len(text)} '.encode())
    digest.update(text)
  return digest.hexdigest()


def _documents(
  source: sources.Source, num_threads: int
) -> Iterator[dict[str, str]]:
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


def _reporting(
  documents: Iterator[dict[str, str]],
  name: str,
  source: sources.Source,
  say: Say,
) -> Iterator[dict[str, str]]:
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
