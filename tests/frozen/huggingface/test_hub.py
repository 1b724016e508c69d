"""Downloads from the hub, up to the call that would use the network."""

import pathlib

import pytest

from frozen.huggingface import hub


def test_a_directory_is_not_fetched(tmp_path):
  fetched = hub.fetch(str(tmp_path))
  assert fetched.directory == tmp_path
  # The name alone: a manifest is given away.
  assert fetched.origin == {'source': tmp_path.name}
  with pytest.raises(
    ValueError, match="--revision: got 'v1' for the directory"
  ):
    hub.fetch(str(tmp_path), 'v1')


def test_a_repository_is_fetched_at_its_commit(tmp_path):
  asked = {}

  def download(source, **kwargs):
    asked.update(kwargs, source=source)
    (tmp_path / 'c0ffee').mkdir()
    return str(tmp_path / 'c0ffee')

  fetched = hub.fetch('org/name-1.5', 'main', download)
  assert fetched.directory == pathlib.Path(tmp_path / 'c0ffee')
  assert fetched.origin == {'source': 'org/name-1.5', 'revision': 'c0ffee'}
  assert (asked['source'], asked['revision']) == ('org/name-1.5', 'main')
  # Weights in other formats are gigabytes that nobody would read.
  assert 'pytorch_model.bin' not in asked['allow_patterns']
  assert 'model.safetensors' in asked['allow_patterns']


def test_what_cannot_be_fetched_is_one_error():
  def download(source, **_):
    raise OSError('offline')

  with pytest.raises(FileNotFoundError, match='a/b: got offline, expected a d'):
    hub.fetch('a/b', '', download)
  for name in ('nothing', './a/b', 'a/b/c', 'a b/c'):
    with pytest.raises(FileNotFoundError, match='got no such directory'):
      hub.fetch(name, '', download)


def test_the_library_is_asked_and_answers_offline():
  """The real download, for which the tests forbid the network."""
  pytest.importorskip('huggingface_hub', reason='requirements-hub.txt')
  with pytest.raises(FileNotFoundError, match='expected a download from the'):
    hub.fetch('no-such-organisation/no-such-model')
