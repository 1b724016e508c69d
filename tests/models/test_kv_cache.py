"""The dense cache: position p in slot p, nothing elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np

from models import kv_cache
from tests.helpers import tiny_models


def test_shapes_of_both_layouts():
  unrolled = kv_cache.init(tiny_models.llama_like(), batch_size=3, length=7)
  assert isinstance(unrolled, tuple)
  assert len(unrolled) == 2
  assert unrolled[0].k_BKSC.shape == (3, 2, 7, 6)
  scanned = kv_cache.init(
    tiny_models.llama_like(scan_layers=True),
    batch_size=3,
    length=7,
    dtype=jnp.bfloat16,
  )
  assert isinstance(scanned, kv_cache.LayerCache)
  assert scanned.v_BKSC.shape == (2, 3, 2, 7, 6)
  assert scanned.v_BKSC.dtype == jnp.bfloat16
  assert kv_cache.length(unrolled) == kv_cache.length(scanned) == 7


def test_no_buffer_is_shared():
  """The decode step donates every buffer, which a shared one cannot be."""
  cache = kv_cache.init(tiny_models.llama_like(), batch_size=1, length=4)
  pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(cache)]
  assert len(set(pointers)) == len(pointers)


def test_write_puts_position_p_into_slot_p_and_drops_what_is_beyond():
  config = tiny_models.llama_like()
  layer = kv_cache.init(config, batch_size=2, length=4)[0]
  new = jnp.arange(1, 2 * 3 * 2 * 6 + 1, dtype=jnp.float32)
  new_BTKC = new.reshape(2, 3, 2, 6)
  positions_BT = jnp.array([[1, 2, 3], [2, 3, 4]])
  written = kv_cache.write(layer, new_BTKC, -new_BTKC, positions_BT)
  expected = np.zeros((2, 2, 4, 6), np.float32)
  for b in range(2):
    for t in range(3):
      if positions_BT[b, t] < 4:
        expected[b, :, positions_BT[b, t]] = new_BTKC[b, t]
  np.testing.assert_array_equal(written.k_BKSC, expected)
  np.testing.assert_array_equal(written.v_BKSC, -expected)
