"""Digests that are remembered: read again whenever a file may have changed."""

import json
import os
import pathlib

import pytest

from storage import digests, remembered


@pytest.fixture
def reads(monkeypatch):
  """The names of the files that were read."""
  made = []
  of_file = digests.of_file

  def record(path):
    made.append(pathlib.Path(path).name)
    return of_file(path)

  monkeypatch.setattr(remembered.digests, 'of_file', record)
  # Files of a test are younger than a second.
  monkeypatch.setattr(remembered, '_SETTLED_NS', 0)
  return made


def _files(tmp_path, *texts):
  files = [tmp_path / f'{i}.txt' for i in range(len(texts))]
  for file, text in zip(files, texts, strict=True):
    file.write_text(text)
  return files


def test_a_file_is_read_once(tmp_path, reads):
  files = _files(tmp_path, 'a', 'b')
  memory = tmp_path / 'new' / 'memory.json'
  first = remembered.sha256_of(files, memory)
  assert first == [digests.entry_of(file).sha256 for file in files]
  assert sorted(reads) == ['0.txt', '1.txt']
  assert remembered.sha256_of(files, memory) == first
  assert remembered.sha256_of(files[::-1], memory) == first[::-1]
  assert len(reads) == 2
  remembered.sha256_of(files, None)
  assert len(reads) == 4


@pytest.mark.parametrize('how', ['rename', 'write', 'size', 'time'])
def test_a_file_of_equal_size_and_time_is_read_again(tmp_path, reads, how):
  (file,) = _files(tmp_path, 'old')
  memory = tmp_path / 'memory.json'
  old = remembered.sha256_of([file], memory)
  times = file.stat().st_atime_ns, file.stat().st_mtime_ns
  changed = file
  if how == 'rename':
    changed = tmp_path / 'other'
  changed.write_text('newer' if how == 'size' else 'new')
  if how != 'time':
    os.utime(changed, ns=times)
  changed.replace(file)
  assert how == 'time' or file.stat().st_mtime_ns == times[1]
  assert remembered.sha256_of([file], memory) != old
  assert len(reads) == 2


def test_a_file_that_has_just_changed_is_not_remembered(
  tmp_path, reads, monkeypatch
):
  monkeypatch.setattr(remembered, '_SETTLED_NS', 10**12)
  (file,) = _files(tmp_path, 'a')
  for _ in range(2):
    remembered.sha256_of([file], tmp_path / 'memory.json')
  assert len(reads) == 2
  assert not (tmp_path / 'memory.json').exists()


def test_a_boot_forgets_only_when_asked(tmp_path, reads, monkeypatch):
  (file,) = _files(tmp_path, 'a')
  boot = tmp_path / 'boot_id'
  monkeypatch.setattr(remembered, '_BOOT_ID', boot)
  for per_boot in (False, True):
    memory = tmp_path / f'{per_boot}.json'
    for boot_id in ('1', '1', '2', '1'):
      boot.write_text(boot_id)
      remembered.sha256_of([file], memory, per_boot=per_boot)
  # Two hosts that share a file remember it for both.
  assert len(reads) == 1 + 2


@pytest.mark.parametrize('text', ['', '{', '[]', '\0\0\0'])
def test_a_damaged_memory_is_forgotten(tmp_path, reads, text):
  (file,) = _files(tmp_path, 'a')
  memory = tmp_path / 'memory.json'
  memory.write_text(text)
  for _ in range(2):
    remembered.sha256_of([file], memory)
  assert len(reads) == 1


def test_the_memory_does_not_grow_for_ever(tmp_path, reads, monkeypatch):
  monkeypatch.setattr(remembered, '_NUM_OTHERS', 3)
  files = _files(tmp_path, 'a', 'b')
  memory = tmp_path / 'memory.json'
  for i in range(5):
    for file in files:
      file.write_text(f'{i}')
    remembered.sha256_of(files, memory)
  assert len(json.loads(memory.read_text())) == 5


def test_a_memory_that_cannot_be_written_is_done_without(tmp_path, reads):
  (file,) = _files(tmp_path, 'a')
  (tmp_path / 'file').touch()
  for _ in range(2):
    remembered.sha256_of([file], tmp_path / 'file' / 'memory.json')
  assert len(reads) == 2
