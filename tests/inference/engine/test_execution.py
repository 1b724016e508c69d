"""The choice of an engine's execution, from shapes alone."""

import jax.numpy as jnp
import pytest

from inference.engine import engine_config, execution
from models.attention import cached, supports
from models.attention.kernels import paged_gpu, paged_tpu
from models.layers import table
from models.linear import invariant
from models.native import processor
from tests.helpers import tiny_models

_Config = engine_config.EngineConfig


def _choose(platform, *, dtype=jnp.float32, head_width=64, **fields):
  model = tiny_models.llama_like(head_width=head_width)
  return execution.choose(_Config(**fields), model, dtype, platform)


def test_plain_jax_where_there_is_no_kernel_or_none_is_wanted():
  for platform, fields in (
    ('cpu', {}),
    ('tpu', {'attention': 'reference'}),
    ('gpu', {'attention': 'reference'}),
  ):
    backend = _choose(platform, **fields)
    assert backend.execution.attend_cached is cached.attend
    assert backend.channels == 64


@pytest.mark.parametrize('attention', ['auto', 'kernel'])
def test_kernels_where_there_are_some(attention):
  gpu = _choose('gpu', attention=attention)
  assert gpu.execution.attend_cached is paged_gpu.attend
  assert gpu.channels == 64
  tpu = _choose('tpu', attention=attention)
  assert tpu.execution.attend_cached is paged_tpu.attend
  # Narrow heads are stored as wide as the kernel reads them.
  assert tpu.channels == supports.LANES
  assert _choose('tpu', head_width=128).channels == 128


def test_a_model_that_the_kernel_does_not_take_is_attended_without():
  for platform, fields in (
    ('gpu', {'head_width': supports.PAGED_GPU.max_head_width + 2}),
    ('tpu', {'head_width': supports.LANES + 2}),
    ('tpu', {'kv_dtype': 'int8'}),
  ):
    backend = _choose(platform, **fields)
    assert backend.execution.attend_cached is cached.attend
    assert backend.channels == fields.get('head_width', 64)
    with pytest.raises(
      ValueError,
      match="attention: got 'kernel', but got .* set engine.attention = auto",
    ):
      _choose(platform, attention='kernel', **fields)


def test_a_kernel_that_a_platform_lacks_is_refused():
  with pytest.raises(
    ValueError, match="got 'kernel', but got platform 'npu', expected one of"
  ):
    _choose('npu', attention='kernel')
  for fields, why in (
    ({'native': 'off'}, 'engine.native is off; set engine.native = auto'),
    ({'tensor': 2}, 'got 2 devices that share the model, expected 1'),
  ):
    assert not _choose('cpu', **fields).may_attend_natively
    with pytest.raises(ValueError, match=f"got 'kernel', but {why}"):
      _choose('cpu', attention='kernel', **fields)
  assert _choose('cpu', attention='kernel').may_attend_natively
  assert not _choose('cpu', attention='reference').may_attend_natively


@pytest.mark.parametrize('has_tiles', [False, True])
def test_bfloat16_on_a_cpu_has_its_own_layouts(monkeypatch, has_tiles):
  monkeypatch.setattr(processor, 'has_bfloat16_tiles', lambda: has_tiles)
  for platform, dtype, fields, expected in (
    ('cpu', 'bfloat16', {}, 'uint16'),
    ('cpu', 'float32', {}, 'float32'),
    ('cpu', 'bfloat16', {'kv_dtype': 'int8'}, 'int8'),
    ('cpu', 'bfloat16', {'kv_dtype': 'fp8'}, 'uint8'),
    ('gpu', 'bfloat16', {'kv_dtype': 'fp8'}, 'uint8'),
    ('cpu', 'bfloat16', {'numerics': 'invariant'}, 'uint16'),
    ('gpu', 'bfloat16', {}, 'bfloat16'),
    ('tpu', 'bfloat16', {}, 'bfloat16'),
  ):
    backend = _choose(platform, dtype=jnp.dtype(dtype), **fields)
    assert jnp.dtype(backend.kv_dtype) == expected
    assert backend.has_transposed_kernels == (
      (platform, dtype) == ('cpu', 'bfloat16')
      and 'numerics' not in fields
      and has_tiles
    )
    assert (backend.execution.look_up == table.look_up_in_loop) == (
      (platform, dtype) == ('cpu', 'bfloat16')
    )


def test_invariant_numerics_have_an_attention_of_their_own():
  for platform in ('cpu', 'gpu', 'tpu'):
    backend = _choose(platform, numerics='invariant')
    assert backend.execution == invariant.execution()
    assert backend.channels == 64
  with pytest.raises(
    ValueError, match="got 'kernel' with invariant numerics, expected 'auto'"
  ):
    _choose('tpu', numerics='invariant', attention='kernel')
