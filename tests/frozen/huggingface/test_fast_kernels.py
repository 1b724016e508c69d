"""Which quantised matrices an import keeps by itself."""

import jax
import numpy as np
import pytest

from frozen.huggingface import fast_kernels
from hardware import peaks
from models.linear.kernels import stored_gpu
from models.native import build
from tests.helpers import any_kernels


def _kernels():
  return {
    'Q8_0': any_kernels.kernel('Q8_0', 256, 4),
    'narrow': any_kernels.narrow(256, 4),
    'Q2_K': any_kernels.kernel('Q2_K', 256, 4),
  }


def test_kinds_that_native_code_multiplies_by_are_kept(monkeypatch):
  monkeypatch.setattr(build, 'registered', lambda: ('target', 'avx2'))
  found, (note,) = fast_kernels.choose(_kernels())
  assert list(found) == ['Q8_0', 'Q2_K']
  assert note.startswith('2 of 3 matrices stay quantised, since products')
  assert 'native, avx2; 1 of 3 kernels in plain JAX: got a scale per 8 ' in note
  assert fast_kernels.choose({}) == ({}, [])


def test_blocks_become_floats_without_native_code(monkeypatch, tmp_path):
  monkeypatch.setenv('PATH', str(tmp_path))
  monkeypatch.delenv('CXX', raising=False)
  found, (note,) = fast_kernels.choose(_kernels())
  assert not found
  assert note.startswith('matrices become floats, since products are in plain')
  assert 'no compiler g++' in note


@pytest.fixture
def on_gpu(monkeypatch):
  """Takes this device for a GPU, whose kernel is interpreted."""
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  port = stored_gpu.Port
  monkeypatch.setattr(stored_gpu, 'Port', lambda: port(interpret=True))
  monkeypatch.setattr(fast_kernels, '_MOST_COPIES', 2)


@pytest.mark.slow
def test_forms_that_were_measured_to_be_fast_stay_on_an_accelerator(
  on_gpu, monkeypatch
):
  kernels = {
    'a': any_kernels.kernel('int8', 64, 8),
    'b': any_kernels.kernel('int4', 64, 8),
    'c': any_kernels.kernel('int8', 64, 32),  # the largest: it is measured
    'd': any_kernels.kernel('Q4_K', 256, 8),
  }
  # Of each form: one token in fewer bits and in bfloat16, then 64 tokens.
  times = iter([1.0, 2.0, 3.0, 3.0, 1.0, 2.0, 3.1, 3.0, 1.0, 2.0, 1.0, 2.0])

  def seconds(run, budget_s):
    assert run().shape[0] in (1, 64)
    return next(times)

  monkeypatch.setattr(peaks, 'best_seconds', seconds)
  found, notes = fast_kernels.choose(kernels)
  assert list(found) == ['a', 'c', 'd']
  assert found['a'] is kernels['a']
  np.testing.assert_array_equal(  # its scales lie apart now
    found['d'].rows('float32'), kernels['d'].rows('float32')
  )
  assert found['d'].form == 'uint4'
  assert notes[0] == (
    'int8 stays: products took 0.50 for 1 tokens, 1.00 for 64 tokens of the'
    ' time of bfloat16 [64 x 32]'
  )
  assert notes[1].startswith('int4 becomes floats: products took 0.50 for 1')
  assert notes[2].startswith('blocks Q4_K stays: products took 0.50 for 1 tok')
  assert notes[3].startswith('3 of 4 matrices stay quantised; --weights=kept')
  assert next(times, None) is None


def test_kernels_are_measured(on_gpu):
  found, notes = fast_kernels.choose({'a': any_kernels.kernel('int8', 64, 8)})
  assert list(found) == (['a'] if ' stays: ' in notes[0] else [])


def test_a_platform_without_kernels_takes_floats(monkeypatch):
  monkeypatch.setattr(jax, 'default_backend', lambda: 'metal')
  found, notes = fast_kernels.choose(_kernels())
  assert not found
  assert 'int8 becomes floats, since there is no kernel for metal' in notes
