"""The compilation cache on disk: entries that a kill cut short."""

import collections
import contextlib
import os
import zlib

import jax
from jax.experimental.compilation_cache import compilation_cache as jax_cache
import pytest

from hardware import compilation_cache
from tests.helpers import tiny_models
from tests.helpers.training import tiny_experiment
from training import learner as learner_lib

_OPTIONS = (
  'jax_compilation_cache_dir',
  'jax_persistent_cache_min_compile_time_secs',
  'jax_persistent_cache_min_entry_size_bytes',
  'jax_persistent_cache_enable_xla_caches',
)
_WHOLE = zlib.compress(b'a program' * 100)


def _write(directory, entries):
  for name, data in entries.items():
    (directory / name).write_bytes(data)


def _names(directory):
  return {path.name for path in directory.glob('*-cache')}


@pytest.mark.parametrize('kept', [0, 1, 5, len(_WHOLE) - 1])
def test_an_entry_that_was_cut_short_is_removed(tmp_path, kept):
  _write(tmp_path, {'a-cache': _WHOLE, 'b-cache': _WHOLE[:kept]})
  (tmp_path / 'b-atime').write_bytes(b'')
  compilation_cache.remove_incomplete(tmp_path)
  assert _names(tmp_path) == {'a-cache'}
  assert (tmp_path / 'a-cache').read_bytes() == _WHOLE
  # Also one that a later start leaves.
  _write(tmp_path, {'c-cache': _WHOLE[:kept], 'd-cache': _WHOLE})
  compilation_cache.remove_incomplete(tmp_path)
  assert _names(tmp_path) == {'a-cache', 'd-cache'}


def test_entries_that_were_checked_are_not_read_again(tmp_path, monkeypatch):
  _write(tmp_path, {'a-cache': _WHOLE})
  os.utime(tmp_path / 'a-cache', (0, 0))
  compilation_cache.remove_incomplete(tmp_path)
  monkeypatch.setattr(compilation_cache, 'is_whole', lambda entry: False)
  compilation_cache.remove_incomplete(tmp_path)
  assert _names(tmp_path) == {'a-cache'}


def test_a_cache_that_does_not_exist_yet_is_left_to_jax(tmp_path):
  compilation_cache.remove_incomplete(tmp_path / 'none')
  assert not (tmp_path / 'none').exists()


def test_an_entry_that_is_no_archive_is_not_whole():
  assert compilation_cache.is_whole(_WHOLE)
  for entry in (b'', b'no archive', _WHOLE[:-1]):
    assert not compilation_cache.is_whole(entry)
  assert not compilation_cache.is_whole(b'\x28\xb5\x2f\xfd and nothing')


def test_the_directory_is_the_flag_then_the_variable_then_the_default(
  monkeypatch, tmp_path
):
  variable = compilation_cache.VARIABLE
  monkeypatch.setenv(variable, str(tmp_path / 'variable'))
  directory_of = compilation_cache.directory_of
  assert directory_of(str(tmp_path / 'flag')) == tmp_path / 'flag'
  assert directory_of('') is None
  assert directory_of(None) == tmp_path / 'variable'
  monkeypatch.setenv(variable, '')
  assert directory_of(None) is None
  monkeypatch.delenv(variable)
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  assert directory_of(None) == tmp_path / 'two-lives' / 'xla'


@contextlib.contextmanager
def _cache(directory):
  """Yields a count of what JAX does with a cache of its own."""
  found = collections.Counter()

  def note(event, **_):
    found[event.rpartition('/')[2]] += event.startswith(
      '/jax/compilation_cache'
    )

  kept = {name: getattr(jax.config, name) for name in _OPTIONS}
  jax.monitoring.register_event_listener(note)
  try:
    compilation_cache.use(directory)
    jax_cache.reset_cache()
    yield found
  finally:
    jax.monitoring.unregister_event_listener(note)
    for name, value in kept.items():
      jax.config.update(name, value)
    jax_cache.reset_cache()


def _first_step(num_devices):
  jax.clear_caches()
  learner = learner_lib.make(
    tiny_experiment.make(), jax.devices()[:num_devices]
  )
  state = learner.init(jax.random.key(0))
  batch = tiny_models.batch(batch_size=16, row_length=16, vocab_size=64)
  _, metrics = learner.compile_train_step()(
    state, learner.placement.put_batch(batch)
  )
  return float(metrics['loss'])


@pytest.mark.slow
def test_a_train_step_is_compiled_once_for_all_starts(tmp_path):
  with _cache(tmp_path) as found:
    loss = _first_step(1)
    assert found['cache_misses']
    assert not found['cache_hits']
    (entry,) = tmp_path.glob('jit_train_step-*-cache')
    assert compilation_cache.is_whole(entry.read_bytes())
    num_programs = found['cache_misses']
    found.clear()
    assert _first_step(1) == loss
    assert found['cache_hits'] == num_programs
    assert not found['cache_misses']


@pytest.mark.slow
def test_a_program_with_collectives_is_compiled_at_each_start(tmp_path):
  with _cache(tmp_path) as found:
    for _ in range(2):
      _first_step(8)
    assert found['cache_hits']  # programs of one device
    assert not list(tmp_path.glob('jit_train_step-*'))
