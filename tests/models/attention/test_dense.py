"""Attention against a direct computation, and its masks as matrices."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.attention import dense, form as form_lib


def _inputs(time, memory=None, heads=4, kv_heads=2, channels=6, batch=2):
  keys = jax.random.split(jax.random.key(0), 3)
  memory = memory or time
  q = jax.random.normal(keys[0], (batch, time, heads, channels))
  k = jax.random.normal(keys[1], (batch, kv_heads, memory, channels))
  v = jax.random.normal(keys[2], (batch, kv_heads, memory, channels))
  return q, k, v


def _oracle(q_BTHC, k_BKSC, v_BKSC, mask_BTS, softcap=0.0, scale=None):
  """Returns attention, one query and one head at a time, in float64."""
  q, k, v = (np.asarray(x, np.float64) for x in (q_BTHC, k_BKSC, v_BKSC))
  batch, time, heads, channels = q.shape
  scale = scale or 1 / math.sqrt(channels)
  group = heads // k.shape[1]
  out = np.zeros((batch, time, heads, v.shape[3]))
  for b in range(batch):
    for t in range(time):
      for h in range(heads):
        seen = np.flatnonzero(mask_BTS[b, t])
        scores = k[b, h // group, seen] @ q[b, t, h] * scale
        if softcap:
          scores = softcap * np.tanh(scores / softcap)
        weights = np.exp(scores - scores.max())
        out[b, t, h] = weights / weights.sum() @ v[b, h // group, seen]
  return out


# One tile of queries, several, and a last one that is not full.
@pytest.mark.fast_cases(2)
@pytest.mark.parametrize('time', [1, 5, 64, 65, 150])
def test_causal_attention(time):
  q, k, v = _inputs(time)
  mask = np.tril(np.ones((time, time), bool))[None].repeat(2, 0)
  np.testing.assert_allclose(
    dense.attend(q, k, v), _oracle(q, k, v, mask), atol=1e-5
  )


@pytest.mark.parametrize('kv_heads', [1, 2, 4])
def test_heads_share_keys_and_values_in_groups(kv_heads):
  q, k, v = _inputs(7, kv_heads=kv_heads)
  mask = np.tril(np.ones((7, 7), bool))[None].repeat(2, 0)
  np.testing.assert_allclose(
    dense.attend(q, k, v), _oracle(q, k, v, mask), atol=1e-5
  )


def test_segments_do_not_see_each_other():
  q, k, v = _inputs(6)
  segments = jnp.array([[1, 1, 2, 2, 2, 0], [1, 2, 2, 2, 2, 2]])
  mask = np.array(
    [
      [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
      ],
      [
        [1, 0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0],
        [0, 1, 1, 1, 0, 0],
        [0, 1, 1, 1, 1, 0],
        [0, 1, 1, 1, 1, 1],
      ],
    ],
    bool,
  )
  np.testing.assert_allclose(
    dense.attend(q, k, v, segment_ids_BT=segments),
    _oracle(q, k, v, mask),
    atol=1e-5,
  )


def test_queries_see_the_slots_up_to_their_own():
  q, k, v = _inputs(2, memory=5)
  slots = jnp.array([[0, 3], [2, 4]])
  mask = np.array(
    [
      [[1, 0, 0, 0, 0], [1, 1, 1, 1, 0]],
      [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]],
    ],
    bool,
  )
  np.testing.assert_allclose(
    dense.attend(q, k, v, slots_BT=slots),
    _oracle(q, k, v, mask),
    atol=1e-5,
  )


# Below, at and above a tile of 64 rows; a window longer than every row.
@pytest.mark.fast_cases(3)
@pytest.mark.parametrize('window', [1, 5, 64, 70, 200])
def test_a_window_is_the_latest_keys_own_included(window):
  q, k, v = _inputs(150, batch=1, heads=2, kv_heads=1)
  form = form_lib.Form(window=window)
  gap = np.arange(150)[:, None] - np.arange(150)[None, :]
  mask = ((gap >= 0) & (gap < window))[None]
  expected = _oracle(q, k, v, mask)
  np.testing.assert_allclose(
    dense.attend(q, k, v, form=form), expected, atol=1e-5
  )
  slots = jnp.arange(150)[None, :]
  np.testing.assert_allclose(
    dense.attend(q, k, v, slots_BT=slots, form=form), expected, atol=1e-5
  )


def test_keys_out_of_a_windows_reach_are_not_multiplied():
  time = 640
  q, k, v = _inputs(time, heads=1, kv_heads=1, batch=1)
  flops = [
    jax.jit(lambda q, k, v, w=window: dense.attend(
      q, k, v, form=form_lib.Form(window=w)
    )).lower(q, k, v).compile().cost_analysis()['flops']
    for window in (0, 64)
  ]  # fmt: skip
  # Ten tiles: 55 pairs of tiles, or for each tile itself and the one before.
  assert flops[1] < 0.4 * flops[0]


def test_soft_cap_scale_and_narrower_values():
  q, k, v = _inputs(9)
  v = v[..., :4]
  mask = np.tril(np.ones((9, 9), bool))[None].repeat(2, 0)
  got = dense.attend(q, k, v, form=form_lib.Form(softcap=0.7, scale=1.3))
  expected = _oracle(q, k, v, mask, softcap=0.7, scale=1.3)
  assert got.shape == (2, 9, 4, 4)
  np.testing.assert_allclose(got, expected, atol=1e-5)
  plain = _oracle(q, k, v, mask, scale=1.3)
  assert np.abs(expected - plain).max() > 1e-2  # the cap bites


def test_no_array_is_as_large_as_the_square_of_time():
  time = 2048
  q, k, v = _inputs(time, heads=1, kv_heads=1, batch=1)
  compiled = jax.jit(dense.attend).lower(q, k, v).compile()
  square = 4 * time * time
  assert compiled.memory_analysis().temp_size_in_bytes < square


@pytest.mark.fast_cases(3)
@pytest.mark.parametrize('time', [64, 150, 256, 300])
@pytest.mark.parametrize('max_apart', [1, 2, 4])
@pytest.mark.parametrize('window', [0, 40])
def test_tiles_in_loops_attend_as_tiles_apart(time, max_apart, window):
  q, k, v = _inputs(time)
  segments = jnp.asarray(np.arange(time) // 70 + np.ones((2, 1), int))
  form = form_lib.Form(window=window)

  @functools.partial(jax.jit, static_argnums=0)
  def run(max_apart, *qkv):
    out, pull = jax.vjp(
      lambda *qkv: dense.attend(
        *qkv, segment_ids_BT=segments, form=form, max_apart=max_apart
      ),
      *qkv,
    )
    return out, *pull(q)

  got, expected = run(max_apart, q, k, v), run(dense.MAX_TILES, q, k, v)
  for mine, reference in zip(got, expected, strict=True):
    # Masked keys have the weight zero, and sums of float32 another order.
    np.testing.assert_allclose(mine, reference, atol=1e-5)


@pytest.mark.parametrize(
  ('time', 'num_tiles'), [(64, 1), (256, 1), (1024, 4), (4096, 4), (8192, 4)]
)
@pytest.mark.parametrize('has_dropout', [False, True])
def test_a_program_has_few_tiles_however_long_rows_are(
  time, num_tiles, has_dropout
):
  q = jax.ShapeDtypeStruct((1, time, 2, 8), jnp.float32)
  kv = jax.ShapeDtypeStruct((1, 2, time, 8), jnp.float32)
  attend = functools.partial(
    dense.attend,
    # In a loop it would drop the same weights in each tile.
    dropout=_dropped_once_per_tile if has_dropout else None,
    min_rows=dense.MIN_WIDE_ROWS,
    max_apart=dense.FEW_TILES,
  )
  text = jax.jit(attend).lower(q, kv, kv).as_text()
  assert text.count('stablehlo.dot_general') == 2 * num_tiles
  assert ('stablehlo.while' in text) == (time > 1024 and not has_dropout)


def _dropped_once_per_tile(probs):
  return probs * 0.5
