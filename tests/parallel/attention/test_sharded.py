"""Attention sharded over a mesh equals attention of the whole arrays."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.attention import dense
from models.attention.kernels import splash_tpu
from parallel import mesh as mesh_lib, parallel_config
from parallel.attention import sharded

TIME = 128


def _mesh(num_devices=8, **axes):
  return mesh_lib.make_mesh(
    parallel_config.ParallelConfig(**{'data': 1, **axes}),
    jax.devices()[:num_devices],
  )


def _inputs(rows=4, heads=4, kv_heads=2):
  keys = jax.random.split(jax.random.key(0), 3)
  q = jax.random.normal(keys[0], (rows, TIME, heads, 8))
  k, v = (jax.random.normal(key, (rows, kv_heads, TIME, 8)) for key in keys[1:])
  segments = jnp.tile(
    jnp.repeat(jnp.array([1, 2, 0]), 50)[None, :TIME], (rows, 1)
  )
  return q, k, v, segments


@functools.partial(jax.jit, static_argnums=0)
def _value_and_gradients(attend, q, k, v, segments):
  out, pull = jax.vjp(
    lambda q, k, v: attend(q, k, v, segment_ids_BT=segments), q, k, v
  )
  return out, *pull(jnp.cos(out))


@pytest.mark.fast_cases(2)
@pytest.mark.parametrize(
  'axes',
  [
    {'data': 2, 'fsdp': 2, 'tensor': 2},
    {'expert': 4, 'tensor': 2},
  ],
)
@pytest.mark.parametrize(
  'local',
  [
    pytest.param(dense.attend, id='reference'),
    pytest.param(
      functools.partial(splash_tpu.attend, interpret=True), id='splash'
    ),
  ],
)
def test_devices_compute_their_rows_and_heads(axes, local):
  mesh = _mesh(**axes)
  inputs = _inputs()
  spread = sharded.attend(local, mesh)
  with jax.set_mesh(mesh):
    run = _value_and_gradients.lower(spread, *inputs).compile()
    got, text = run(*inputs), run.as_text()
  expected = _value_and_gradients(dense.attend, *inputs)
  for ours, reference in zip(got, expected, strict=True):
    # The same sums, in the kernel's order for splash.
    np.testing.assert_allclose(ours, reference, rtol=2e-5, atol=2e-5)
  # Rows and heads do not mix: any collective has groups of one device.
  groups = re.findall(r'replica_groups=(\{\{[\d,{}]*\}\}|\[[\d,]+\])', text)
  assert set(groups) <= {'{{0},{1},{2},{3},{4},{5},{6},{7}}', '[8,1]'}
  assert 'collective-permute(' not in text


def test_stages_side_by_side_each_use_their_own_devices():
  mesh = _mesh(stage=2, fsdp=2, tensor=2)
  q, k, v, segments = _inputs(rows=2)
  stacked = [jnp.stack([x, x[::-1]]) for x in (q, k, v, segments)]
  spread = sharded.attend(dense.attend, mesh)
  run = functools.partial(_value_and_gradients, spread)
  with jax.set_mesh(mesh):
    got = jax.jit(jax.vmap(run, spmd_axis_name='stage'))(*stacked)
  expected = jax.vmap(functools.partial(_value_and_gradients, dense.attend))(
    *stacked
  )
  for ours, reference in zip(got, expected, strict=True):
    np.testing.assert_allclose(ours, reference, rtol=2e-5, atol=2e-5)


def test_a_row_in_parts_is_refused():
  with pytest.raises(ValueError, match='got parallel.context = 8, expected 1'):
    sharded.attend(dense.attend, _mesh(context=8))


def test_dropout_is_refused():
  q, k, v, segments = _inputs()
  spread = sharded.attend(dense.attend, _mesh(fsdp=8))
  with pytest.raises(ValueError, match='got dropout, expected none'):
    spread(q, k, v, segment_ids_BT=segments, dropout=lambda x: x)
