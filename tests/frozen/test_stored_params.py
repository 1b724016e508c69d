"""Weights on disk: written by orbax, read without it, one after the other."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from frozen import format as frozen_format, stored_params
from tests.helpers import frozen_dirs


def _params(dtype):
  rng = np.random.default_rng(0)
  return {
    'params': {
      'b': {'kernel': jnp.asarray(rng.normal(size=(70, 33)), dtype)},
      'a': {'scale': jnp.asarray(rng.normal(size=5), dtype)},
      'layers': {'up': jnp.asarray(rng.normal(size=(3, 4, 2)), dtype)},
    }
  }


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
@pytest.mark.parametrize('is_ours', [True, False])
def test_arrays_are_read_as_they_were_written(tmp_path, dtype, is_ours):
  params = _params(dtype)
  if is_ours:
    stored_params.save(tmp_path / 'p', params)
  else:  # compressed, as earlier versions wrote them
    with ocp.StandardCheckpointer() as writer:
      writer.save(tmp_path / 'p', params)
  stored = stored_params.open_all(tmp_path / 'p')
  expected = frozen_format.leaves_by_path(params)
  assert {
    n: (s.shape, s.dtype) for n, s in stored_params.shapes(stored).items()
  } == {n: (leaf.shape, leaf.dtype) for n, leaf in expected.items()}
  read = list(stored_params.read_all(stored))
  assert [name for name, _ in read] == sorted(expected)
  for name, array in read:
    np.testing.assert_array_equal(array, expected[name])
    assert array.dtype == expected[name].dtype
    # Otherwise JAX would copy it.
    assert array.ctypes.data % 64 == 0
  with stored_params.checkpointer() as reader:
    jax.tree.map(
      np.testing.assert_array_equal, reader.restore(tmp_path / 'p'), params
    )


def test_few_arrays_are_in_memory_before_they_are_wanted(tmp_path, monkeypatch):
  params = {f'layer_{n:02}': jnp.full((4,), n, jnp.float32) for n in range(20)}
  stored_params.save(tmp_path / 'p', params)
  made = []
  aligned = stored_params._aligned
  monkeypatch.setattr(
    stored_params, '_aligned', lambda *a: made.append(a) or aligned(*a)
  )
  reading = stored_params.read_all(stored_params.open_all(tmp_path / 'p'))
  for num_read, (_, array) in enumerate(reading, 1):
    assert array[0] == num_read - 1
    assert len(made) < num_read + stored_params._NUM_AHEAD
  assert len(made) == 20


def test_each_weight_is_converted_as_it_is_read(tmp_path):
  frozen_dirs.write(tmp_path / 'f')
  opened = frozen_format.open_directory(tmp_path / 'f')
  seen = []

  def convert(name, weight):
    seen.append(name)
    return 2 * weight

  doubled = opened.read_params(convert)
  once = frozen_format.read(tmp_path / 'f').params
  assert seen == sorted(frozen_format.leaves_by_path(once))
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(a, 2 * b), doubled, once
  )


def test_weights_are_read_without_orbax(tmp_path):
  frozen_dirs.write(tmp_path / 'f')
  program = (
    'import sys\n'
    'from frozen import format\n'
    'from inference import generate\n'
    f'format.read({str(tmp_path / "f")!r})\n'
    'print([m for m in ("orbax", "jax.experimental.pallas")'
    ' if m in sys.modules])'
  )
  done = subprocess.run(
    [sys.executable, '-c', program], capture_output=True, text=True, check=True
  )
  assert done.stdout == '[]\n'
