"""Which quantised matrices an import keeps by itself."""

import jax
import pytest

from frozen.huggingface import fast_kernels
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


@pytest.mark.parametrize('platform', ['cpu', 'gpu'])
def test_blocks_become_floats_without_native_code(
  monkeypatch, tmp_path, platform
):
  monkeypatch.setattr(jax, 'default_backend', lambda: platform)
  monkeypatch.setenv('PATH', str(tmp_path))
  monkeypatch.delenv('CXX', raising=False)
  found, (note,) = fast_kernels.choose(_kernels())
  assert not found
  reason = 'no compiler g++' if platform == 'cpu' else 'not for gpu'
  assert note.startswith('matrices become floats, since products are in plain')
  assert reason in note
