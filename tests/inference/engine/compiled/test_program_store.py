"""Compiled programs on disk: found by equal parts, whole, and only then."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hardware import compilation_cache
from inference.engine import engine as engine_lib, engine_config
from inference.engine.compiled import layered, lowering, program_store
from inference.requests import requests
from inference.sampling import settings
from models import execution
from models.linear import invariant
from tests.helpers import tiny_models
from tests.helpers.serving import reference_engine

_X = np.arange(8, dtype=np.float32)


def _lowered(scale: float = 3.0):
  # A fusion and a sort: two kinds of compiled functions.
  return jax.jit(lambda x: (jnp.sort(jnp.sin(x) * scale), {'sum': x.sum()}))


def _store(directory, *parts):
  return program_store.Store(directory, jax.devices()[0], *parts)


def _files(directory: pathlib.Path):
  return sorted(directory.glob('*.program'))


def _assert_same(program, expected):
  jax.tree.map(np.testing.assert_array_equal, program(_X), expected(_X))


def test_a_kept_program_is_found_by_equal_parts(tmp_path):
  program = _store(tmp_path, 'model', (1, 2)).keep('a', _lowered().lower(_X))
  again = _store(tmp_path, 'model', (1, 2))
  _assert_same(again.load('a'), program)
  assert len(_files(tmp_path)) == 1
  assert again.load('b') is None
  assert _store(tmp_path, 'model', (1, 3)).load('a') is None
  assert _store(tmp_path / 'other', 'model', (1, 2)).load('a') is None


@pytest.mark.parametrize('cause', ['source', 'version', 'setting', 'flags'])
def test_another_environment_has_other_programs(tmp_path, monkeypatch, cause):
  _store(tmp_path).keep('a', _lowered().lower(_X))
  assert _store(tmp_path).load('a') is not None
  program_store._environment.cache_clear()
  if cause == 'source':
    source = tmp_path / 'sources' / 'models'
    source.mkdir(parents=True)
    (source / 'mlp.py').write_text('changed')
    monkeypatch.setattr(program_store, '_ROOT', tmp_path / 'sources')
  elif cause == 'version':
    monkeypatch.setattr(
      program_store.importlib.metadata, 'version', lambda name: '9.9'
    )
  elif cause == 'setting':
    before = jax.config.jax_default_matmul_precision
    jax.config.update('jax_default_matmul_precision', 'highest')
  else:
    monkeypatch.setenv('XLA_FLAGS', '--xla_cpu_enable_fast_math=true')
  try:
    assert _store(tmp_path).load('a') is None
  finally:
    if cause == 'setting':
      jax.config.update('jax_default_matmul_precision', before)
    monkeypatch.undo()
    program_store._environment.cache_clear()


@pytest.mark.parametrize('kept', [0, 10, 40, -1])
def test_a_damaged_file_counts_as_absent(tmp_path, kept):
  store = _store(tmp_path)
  store.keep('a', _lowered().lower(_X))
  (path,) = _files(tmp_path)
  data = path.read_bytes()
  path.write_bytes(data[:kept])
  assert store.load('a') is None
  path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
  assert store.load('a') is None
  _assert_same(store.keep('a', _lowered().lower(_X)), _lowered())
  assert path.read_bytes() != data[:kept]
  _assert_same(store.load('a'), _lowered())


@pytest.mark.slow
def test_a_program_that_jax_has_kept_is_stored_whole(tmp_path):
  # XLA:CPU loses functions of a program that it has loaded itself.
  function = _lowered(5.0)  # the tests keep compiled programs of JAX on disk
  for version in range(3):
    jax.clear_caches()
    _store(tmp_path, version).keep('a', function.lower(_X))
  for version in range(3):
    _assert_same(_store(tmp_path, version).load('a'), function)


def test_jax_keeps_no_second_copy(tmp_path):
  before = set(pathlib.Path(jax.config.jax_compilation_cache_dir).iterdir())
  _store(tmp_path).keep('a', _lowered(7.0).lower(_X))
  after = set(pathlib.Path(jax.config.jax_compilation_cache_dir).iterdir())
  assert after == before


def test_nothing_is_stored_without_a_directory_or_for_an_accelerator(tmp_path):
  lowered = _lowered().lower(_X)
  _assert_same(_store(None).keep('a', lowered), _lowered())
  assert _store(None).load('a') is None

  class Gpu:
    platform, id = 'gpu', 0

  store = program_store.Store(tmp_path, Gpu())  # pyright: ignore
  _assert_same(store.keep('a', lowered), _lowered())
  assert not _files(tmp_path)


def test_a_directory_that_cannot_be_written_costs_nothing_else(tmp_path):
  (tmp_path / 'file').write_text('')
  store = _store(tmp_path / 'file')
  _assert_same(store.keep('a', _lowered().lower(_X)), _lowered())
  assert store.load('a') is None


def test_ports_have_names_that_every_process_has():
  text = program_store.describe_ports(invariant.execution())
  assert 'models.linear.invariant.linear' in text
  assert ' at 0x' not in text
  assert text != program_store.describe_ports(execution.Execution())
  local = execution.Execution(linear=lambda *args: None)
  assert ' at 0x' in program_store.describe_ports(local)


def _answer():
  engine = engine_lib.Engine(
    reference_engine.model_config(),
    reference_engine.params(),
    tokenizer=tiny_models.byte_tokenizer(),
    weights_digest='first',
    config=engine_config.EngineConfig(
      max_sequences=1, max_chunks=1, max_mixed_chunks=1, decode_steps=1
    ),
  )
  request = requests.Request(
    prompt_ids=(65, 66, 67),
    settings=settings.Settings(max_tokens=5, seed=0, ignore_eos=True),
  )
  return [
    u.completion.token_ids for _, u in engine.answer([request]) if u.completion
  ]


@pytest.mark.slow
@pytest.mark.parametrize('min_layer_bytes', [0, layered.MIN_LAYER_BYTES])
def test_the_second_engine_traces_nothing(
  tmp_path, monkeypatch, min_layer_bytes
):
  monkeypatch.setattr(layered, 'MIN_LAYER_BYTES', min_layer_bytes)
  monkeypatch.setattr(compilation_cache, 'directory', lambda: tmp_path)
  before = _answer()
  assert _files(tmp_path)

  def fail(*args):
    raise AssertionError('traced')

  monkeypatch.setattr(lowering.Lowering, 'lowered', fail)
  assert _answer() == before


@pytest.mark.slow
def test_programs_of_a_step_and_of_its_layers_are_told_apart(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(compilation_cache, 'directory', lambda: tmp_path)
  before = _answer()
  monkeypatch.setattr(layered, 'MIN_LAYER_BYTES', 0)
  assert _answer() == before
