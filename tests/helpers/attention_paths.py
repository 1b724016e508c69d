"""Every path of `models/attention/supports.py`, called in the same way.

`RUN[name](q_BTHC, k_BKTC, v_BKTC)` is causal attention of two sequences by the
path of that name, on any device.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import kv_cache
from models.attention import cached, dense, form as form_lib, paged, supports
from models.attention.kernels import (
  cudnn_gpu,
  paged_cpu,
  paged_gpu,
  paged_tpu,
  splash_tpu,
)
from models.linear import invariant
from models.native import build
from parallel import mesh as mesh_lib, parallel_config
from parallel.attention import context

Form = form_lib.Form
PATHS = {
  name: path
  for name, path in vars(supports).items()
  if isinstance(path, supports.Path)
}
TIME, HEADS, KV_HEADS, CHANNELS = 128, 4, 2, 8


def inputs(value_width=CHANNELS):
  """Returns queries, keys and values, as NumPy arrays."""
  rng = np.random.default_rng(0)
  return [
    rng.normal(size=shape).astype(np.float32)
    for shape in (
      (2, TIME, HEADS, CHANNELS),
      (2, KV_HEADS, TIME, CHANNELS),
      (2, KV_HEADS, TIME, value_width),
    )
  ]


def _split(kind, q, k, v, *, segment_ids_BT=None, form=Form()):
  mesh = mesh_lib.make_mesh(
    parallel_config.ParallelConfig(data=2, context=2, tensor=2)
  )
  order = context.balanced_order(TIME, 2)
  segments = None if segment_ids_BT is None else segment_ids_BT[:, order]
  out = jax.jit(functools.partial(context.make_attend(mesh, kind), form=form))(
    q[:, order], k[:, :, order], v[:, :, order], segment_ids_BT=segments
  )
  return out[:, np.argsort(order)]


def _dense_cache(attend, q, k, v, *, form=Form()):
  positions = jnp.tile(jnp.arange(TIME), (2, 1))
  return attend(q, kv_cache.LayerCache(k, v), positions, form)


def paged_cache(
  attend, q, k, v, *, form=Form(), width=CHANNELS, length=TIME, is_int8=False
):
  """Returns attention with every sequence as one chunk, in pages of 64.

  Tokens from `length` on are padding of the chunk.
  """
  kv = np.stack([x.swapaxes(1, 2) for x in (k, v)], axis=3)
  kv = kv.reshape(4, 64, 2 * KV_HEADS, CHANNELS)
  kv = np.pad(kv, ((1, 0), (0, 0), (0, 0), (0, width - CHANNELS)))
  pages = kv_cache.Pages(jnp.asarray(kv))
  if is_int8:
    pages = kv_cache.Pages(*kv_cache.quantize(pages.kv_PQYC))
  layer = kv_cache.PagedLayer(
    pages,
    jnp.zeros((0, 2), jnp.int32),
    jnp.asarray([[1, 2], [3, 4]], jnp.int32),
  )
  place = jnp.arange(TIME)
  positions = jnp.tile(jnp.where(place < length, place, -1), 2)[None]
  out = attend(q.reshape(1, 2 * TIME, HEADS, CHANNELS), layer, positions, form)
  return out.reshape(q.shape)


def paged_decodes(attend, q, k, v, *, form=Form(), length=TIME, is_int8=False):
  """As `paged_cache`, with each token as one that decodes."""
  kv = np.stack([x.swapaxes(1, 2) for x in (k, v)], axis=3)
  kv = kv.reshape(4, 64, 2 * KV_HEADS, CHANNELS)
  pages = kv_cache.Pages(jnp.asarray(np.pad(kv, ((1, 0), *[(0, 0)] * 3))))
  if is_int8:
    pages = kv_cache.Pages(*kv_cache.quantize(pages.kv_PQYC))
  table = jnp.repeat(jnp.asarray([[1, 2], [3, 4]], jnp.int32), TIME, axis=0)
  layer = kv_cache.PagedLayer(pages, table, jnp.zeros((0, 2), jnp.int32))
  place = jnp.arange(TIME)
  positions = jnp.tile(jnp.where(place < length, place, -1), 2)[None]
  out = attend(q.reshape(1, 2 * TIME, HEADS, CHANNELS), layer, positions, form)
  return out.reshape(q.shape)


def native(*args):
  """Attends by native code; skips a test where it cannot be compiled."""
  try:
    return paged_cpu.registered()(*args)
  except build.BuildError as error:
    return pytest.skip(str(error))


def latent_pages(attend, q, kv_B1TC, *, form=Form()):
  """As `paged_cache`, of one head whose keys are its values."""
  kv = np.pad(kv_B1TC.reshape(4, 64, 1, CHANNELS), ((1, 0), *[(0, 0)] * 3))
  layer = kv_cache.PagedLayer(
    kv_cache.Pages(jnp.asarray(kv)),
    jnp.zeros((0, 2), jnp.int32),
    jnp.asarray([[1, 2], [3, 4]], jnp.int32),
  )
  positions = jnp.tile(jnp.arange(TIME), 2)[None]
  out = attend(q.reshape(1, 2 * TIME, HEADS, CHANNELS), layer, positions, form)
  return out.reshape(q.shape)


RUN = {
  'DENSE': dense.attend,
  'SPLASH': functools.partial(splash_tpu.attend, interpret=True),
  'CUDNN': functools.partial(cudnn_gpu.attend, implementation='xla'),
  'RING': functools.partial(_split, 'ring'),
  'GATHER': functools.partial(_split, 'gather'),
  'CACHED': functools.partial(_dense_cache, cached.attend),
  'PAGED': functools.partial(paged_cache, paged.attend),
  'PAGED_TPU': functools.partial(
    paged_cache,
    functools.partial(paged_tpu.attend, implementation='reference'),
    width=supports.LANES,
  ),
  'PAGED_GPU': functools.partial(
    paged_cache, functools.partial(paged_gpu.attend, interpret=True)
  ),
  'PAGED_CPU': functools.partial(paged_decodes, native),
  'INVARIANT': functools.partial(_dense_cache, invariant.attend_cached),
}
