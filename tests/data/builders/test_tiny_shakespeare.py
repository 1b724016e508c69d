"""Where the text is looked for, and how it is cut. No test has the real text:
its digest is replaced by that of a stand-in.
"""

import hashlib
import io
import time
import urllib.error
import urllib.request

import pytest

from data import sources
from data.builders import tiny_shakespeare

TEXT = ''.join(f'Line {i}, with a curtain é.\n' for i in range(100))


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
  digest = hashlib.sha256(TEXT.encode()).hexdigest()
  monkeypatch.setattr(tiny_shakespeare, 'SHA256', digest)


@pytest.fixture(autouse=True)
def network(monkeypatch):
  """Answers downloads with what the test puts in; refuses them otherwise."""
  answers = []

  def urlopen(url, timeout):
    assert url == tiny_shakespeare.URL
    assert timeout <= 30
    if not answers:
      raise urllib.error.URLError('no route to host')
    return io.BytesIO(answers.pop())

  monkeypatch.setattr(urllib.request, 'urlopen', urlopen)
  return answers


def _open(path='', split='train', *, data_dir):
  return sources.tiny_shakespeare(str(path), split, str(data_dir))


def test_cut_like_the_stock_builder(tmp_path):
  (tmp_path / 'input.txt').write_text(TEXT)
  parts = {
    split: _open(split=split, data_dir=tmp_path)[0]['text']
    for split in ('train', 'validation', 'test')
  }
  assert ''.join(parts.values()) == TEXT
  assert len(parts['train']) == int(len(TEXT) * 0.9)
  assert len(parts['validation']) == (len(TEXT) - len(parts['train'])) // 2


def test_validation_and_test_joined_are_the_last_tenth(tmp_path):
  (tmp_path / 'input.txt').write_text(TEXT)
  source = _open(split='validation+test', data_dir=tmp_path)
  assert [source[i]['id'] for i in range(2)] == ['validation', 'test']
  joined = source[0]['text'] + source[1]['text']
  assert joined == TEXT[int(len(TEXT) * 0.9) :]


@pytest.mark.parametrize('name', ['shakes.txt', 'tiny_shakespeare.txt', ''])
def test_given_path(tmp_path, name):
  folder = tmp_path / 'mine'
  folder.mkdir()
  (folder / (name or 'input.txt')).write_text(TEXT)
  source = _open(folder / name, data_dir=tmp_path / 'data')
  assert len(source) == 1


def test_local_file_comes_before_the_network(tmp_path):
  # The network would refuse.
  (tmp_path / 'tiny_shakespeare.txt').write_text(TEXT)
  assert TEXT.startswith(_open(data_dir=tmp_path)[0]['text'])


def test_download_once(tmp_path, network):
  network.append(TEXT.encode())
  data_dir = tmp_path / 'new'
  first = _open(data_dir=data_dir)[0]
  assert _open(data_dir=data_dir)[0] == first
  assert (data_dir / 'tiny_shakespeare.txt').read_text() == TEXT


def test_without_file_or_network_fails_at_once(tmp_path):
  start = time.monotonic()
  with pytest.raises(
    FileNotFoundError,
    match=r'downloading it failed .*no route to host.*; save https://raw.*or '
    'give its path',
  ):
    _open(data_dir=tmp_path)
  # The library's own download retries for 205 s.
  assert time.monotonic() - start < 10


def test_download_of_something_else_leaves_nothing(tmp_path, network):
  network.append(b'<html>captive portal</html>')
  with pytest.raises(ValueError, match='https://.* has SHA-256 .*, expected'):
    _open(data_dir=tmp_path)
  assert not list(tmp_path.iterdir())


def test_another_text_is_refused(tmp_path):
  (tmp_path / 'other.txt').write_text('to be or to be')
  with pytest.raises(ValueError, match='it is not tiny Shakespeare; read anot'):
    _open(tmp_path / 'other.txt', data_dir=tmp_path)


def test_given_path_that_is_missing_does_not_download(tmp_path, network):
  network.append(TEXT.encode())
  with pytest.raises(FileNotFoundError, match='no tiny Shakespeare at .*gone'):
    _open(tmp_path / 'gone.txt', data_dir=tmp_path)
  assert network
