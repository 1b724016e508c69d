"""A source is tokenised once, even with several processes or a killed one."""

import json
import os
import pathlib
import pickle
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
from pyarrow import parquet
import pytest

from data import sources, token_store
from storage import derived, locks, remembered
from tests.helpers import tiny_models
from tests.helpers.training import corpora
from text import bpe

ROOT = pathlib.Path(__file__).parents[2]
TOK = tiny_models.byte_tokenizer()
BOS, EOS = TOK.bos_id, TOK.eos_id


class Described(corpora.Texts):
  """A source with a fingerprint."""

  def fingerprint(self):
    return repr(self.texts)


def _open(source, directory, **fields):
  fields = {'name': 's', 'num_threads': 1} | fields
  return token_store.open_or_write(
    source, fields.pop('tokenizer', TOK), directory, **fields
  )


def test_ids_and_starts_are_those_of_the_documents(tmp_path):
  store = _open(corpora.Texts('ab', '', 'c'), tmp_path)
  assert store.ids_N.tolist() == [BOS, 97, 98, EOS, BOS, 99, EOS]
  assert store.starts_D.tolist() == [0, 3, 5]
  assert (store.num_documents, store.num_ids, store.num_pairs) == (2, 7, 5)
  assert store.dtype == 'uint16'
  joined = _open(corpora.Texts('ab', '', 'c'), tmp_path, joined=True)
  assert joined.ids_N.tolist() == [97, 98, 99]
  assert joined.digest != store.digest


def test_many_documents_come_in_order(tmp_path, monkeypatch):
  monkeypatch.setattr(token_store, '_GROUP_CHARS', 10)
  texts = [chr(97 + i % 26) * (i % 7) for i in range(200)]
  store = _open(corpora.Texts(*texts), tmp_path, num_threads=3)
  ids = [[BOS, *text.encode(), EOS] for text in texts if text]
  assert store.ids_N.tolist() == sum(ids, [])
  starts = np.cumsum([0, *(len(document) - 1 for document in ids)])
  np.testing.assert_array_equal(store.starts_D, starts)


def test_bpe_gives_what_it_gives_one_by_one(tmp_path):
  texts = ['hello naïve 数 world', 'a', 'hello ' * 30]
  tok = bpe.train(texts, 270)
  store = _open(corpora.Texts(*texts), tmp_path, tokenizer=tok)
  expected = [[tok.bos_id, *tok.encode(t), tok.eos_id] for t in texts]
  assert store.ids_N.tolist() == sum(expected, [])


def test_a_large_vocabulary_takes_wider_ids(tmp_path):
  class Wide(type(TOK)):
    vocab_size = 2**16 + 1

  assert _open(corpora.Texts('a'), tmp_path, tokenizer=Wide()).dtype == 'uint32'


def test_a_source_that_describes_itself_is_read_once(tmp_path):
  source = Described('abc', 'd')
  first = _open(source, tmp_path)
  assert source.num_read == 2
  again = Described('abc', 'd')
  assert _open(again, tmp_path) == first
  assert again.num_read == 0


def test_other_documents_or_another_tokenizer_are_another_store(tmp_path):
  stores = [
    _open(corpora.Texts('abc'), tmp_path),
    _open(corpora.Texts('abd'), tmp_path),
    _open(corpora.Texts('abc'), tmp_path, tokenizer=bpe.train(['abc'], 259)),
  ]
  assert len({store.directory for store in stores}) == 3


def test_a_file_that_changed_is_tokenised_again(tmp_path):
  path = tmp_path / 'a.txt'
  path.write_text('old')
  old = _open(sources.text_files(str(path)), tmp_path / 'data')
  path.write_text('newer')
  new = _open(sources.text_files(str(path)), tmp_path / 'data')
  assert old.digest != new.digest
  assert new.num_ids == 7


def _write_jsonl(path, text):
  path.write_text(json.dumps({'text': text}) + '\n')


def _write_parquet(path, text):
  parquet.write_table(pa.table({'text': [text]}), path, compression='none')


@pytest.mark.parametrize(
  ('write', 'open_source'),
  [
    (_write_jsonl, sources.jsonl),
    (_write_parquet, sources.parquet),
    (pathlib.Path.write_text, sources.text_files),
  ],
)
def test_a_file_of_equal_size_and_time_is_tokenised_again(
  tmp_path, monkeypatch, write, open_source
):
  monkeypatch.setattr(remembered, '_SETTLED_NS', 0)
  path, other = tmp_path / 'a', tmp_path / 'b'
  write(path, 'old')
  write(other, 'new')
  data_dir = str(tmp_path / 'data')
  _open(open_source(str(path), 'all', data_dir), data_dir)
  stat = path.stat()
  assert other.stat().st_size == stat.st_size
  os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
  other.replace(path)
  source = open_source(str(path), 'all', data_dir)
  store = _open(source, data_dir)
  assert store.ids_N.tolist() == [BOS, *b'new', EOS]
  assert source[0]['text'] == 'new'
  assert len(list(pathlib.Path(data_dir).glob('tokens/[!.]*'))) == 2


def test_a_prepared_data_set_counts_by_its_contents(tmp_path, data_dir):
  source = sources.python_stdlib('', 'test', str(data_dir))
  (info,) = pathlib.Path(data_dir).glob('python_stdlib/*/*/dataset_info.json')
  copy = shutil.copytree(info.parent, tmp_path / 'copy')
  same = sources.tfds_directory(str(copy), 'test')
  assert same.fingerprint() == source.fingerprint()
  path = next(path for path in copy.iterdir() if '-test.' in path.name)
  stat = path.stat()
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)
  os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
  other = sources.tfds_directory(str(copy), 'test')
  assert other.fingerprint() != source.fingerprint()


def test_a_file_that_was_moved_or_touched_is_not_tokenised_again(tmp_path):
  path = tmp_path / 'a.txt'
  path.write_text('same')
  old = _open(sources.text_files(str(path)), tmp_path / 'data')
  os.utime(path, ns=(1, 1))
  moved = path.rename(tmp_path / 'b.txt')
  assert _open(sources.text_files(str(moved)), tmp_path / 'data') == old


def test_files_that_change_while_they_are_read_are_refused(tmp_path):
  path = tmp_path / 'a.jsonl'
  _write_jsonl(path, 'before')
  source = sources.jsonl(str(path))
  _write_jsonl(path, 'longer than before')
  with pytest.raises(ValueError, match=r'a.jsonl: got a file that changed wh'):
    _open(source, tmp_path / 'data')

  class Growing(Described):
    def __getitem__(self, index):
      self.texts = (*self.texts, 'more')
      return super().__getitem__(index)

  with pytest.raises(ValueError, match='s: got documents that changed while'):
    _open(Growing('a'), tmp_path / 'data')
  assert not list(tmp_path.glob('data/tokens/[!.]*'))


@pytest.mark.parametrize('name', ['ids.bin', 'starts.bin', 'store.json'])
@pytest.mark.parametrize('damage', ['zeros', 'half', 'missing'])
def test_a_damaged_store_is_never_trained_on(tmp_path, name, damage):
  store = _open(corpora.Texts('abc', 'd'), tmp_path)
  path = store.directory / name
  data = path.read_bytes()
  if damage == 'missing':
    path.unlink()
  else:
    path.write_bytes(
      bytes(len(data)) if damage == 'zeros' else data[: len(data) // 2]
    )
  with pytest.raises(
    derived.DamagedError,
    match=f'{path}: got .*; delete {store.directory}, and start again',
  ):
    _open(corpora.Texts('abc', 'd'), tmp_path)
  shutil.rmtree(store.directory)
  assert _open(corpora.Texts('abc', 'd'), tmp_path) == store


def test_every_source_of_files_describes_itself(tmp_path, data_dir):
  (tmp_path / 'a.jsonl').write_text('{"text": "a", "b": "c"}\n')
  opened = [
    sources.jsonl(str(tmp_path / 'a.jsonl')),
    sources.jsonl(str(tmp_path / 'a.jsonl'), text_key='b'),
    sources.text_files(str(tmp_path / 'a.jsonl')),
    *(sources.python_stdlib('', s, str(data_dir)) for s in ('train', 'test')),
  ]
  described = {source.fingerprint() for source in opened}  # type: ignore[attr-defined]
  assert len(described) == 5


def test_a_store_pickles_small_and_opens_elsewhere(tmp_path):
  store = _open(corpora.Texts('a' * 10**5), tmp_path)
  assert len(store.ids_N) == 10**5 + 2
  pickled = pickle.dumps(store)
  assert len(pickled) < 1000
  np.testing.assert_array_equal(pickle.loads(pickled).ids_N, store.ids_N)


def test_text_that_is_none_is_refused_with_its_document(tmp_path):
  with pytest.raises(ValueError, match=r'document-1: text has the lone surr'):
    _open(corpora.Texts('good', 'bad \ud800'), tmp_path)
  tok = bpe.train(['good'], 259)
  with pytest.raises(ValueError, match=r'document-1: text has the lone surr'):
    _open(corpora.Texts('good', 'bad \ud800'), tmp_path, tokenizer=tok)
  assert not _leftovers(tmp_path)


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(ValueError, match=r's: its tokens cannot be .*data_dir'):
    _open(corpora.Texts('a'), tmp_path / 'file')


def test_a_store_that_is_there_needs_no_write_access(tmp_path, monkeypatch):
  store = _open(corpora.Texts('abc'), tmp_path)

  def refuse(*args, **kwargs):
    raise PermissionError('read-only')

  monkeypatch.setattr(locks, 'locked', refuse)
  assert _open(corpora.Texts('abc'), tmp_path) == store


def test_it_says_how_far_it_is(tmp_path, monkeypatch):
  monkeypatch.setattr(token_store, '_SECONDS_BETWEEN_REPORTS', 0)
  said = []
  _open(corpora.Texts('a', 'b'), tmp_path, say=said.append)
  assert said[-1].startswith('tokenising s: 1 of 2 documents')


def _leftovers(directory):
  return list(directory.glob('tokens/.*.partial-*'))


# A source that takes its time, and says where it is.
SLOW = """
import pathlib, sys, time
from data import token_store
from text import tokenizer

class Slow:
  def __len__(self): return 40
  def fingerprint(self): return 'slow'
  def __getitem__(self, i):
    time.sleep(0.02)
    return {'text': 'x' * (i + 1), 'id': str(i)}

token_store._GROUP_CHARS = 20
store = token_store.open_or_write(
  Slow(), tokenizer.ByteTokenizer(), sys.argv[1], name='s', num_threads=1
)
print(store.digest, store.num_ids)
"""


def _start(directory):
  return subprocess.Popen(
    [sys.executable, '-c', SLOW, str(directory)],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


@pytest.mark.slow
def test_two_processes_and_one_that_was_killed_agree(tmp_path):
  killed = _start(tmp_path)
  deadline = time.monotonic() + 60
  while not list(tmp_path.glob('tokens/.*.partial-*/ids.bin')):
    assert time.monotonic() < deadline
    assert killed.poll() is None, killed.communicate()
    time.sleep(0.01)
  killed.send_signal(signal.SIGKILL)
  killed.communicate()
  assert _leftovers(tmp_path)  # else nothing was cut short
  both = [_start(tmp_path) for _ in range(2)]
  outputs = [process.communicate(timeout=60) for process in both]
  assert [p.returncode for p in both] == [0, 0], outputs
  assert outputs[0][0] == outputs[1][0]
  assert outputs[0][0].split()[1] == str(sum(range(1, 41)) + 80)
  assert not _leftovers(tmp_path)
  (meta,) = tmp_path.glob('tokens/*/store.json')
  assert json.loads(meta.read_text())['digest'] == outputs[0][0].split()[0]
