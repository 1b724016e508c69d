"""Rows times the matrix of their group, against a loop over the groups."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.linear import grouped

GROUPS, WIDTH_IN, WIDTH_OUT = 5, 7, 11

# Nobody's rows at the end, empty groups, groups of one, all in one, no rows.
SIZES = {
  'even': ([8, 8, 8, 8, 8], 40),
  'uneven': ([0, 33, 1, 0, 6], 40),
  'one group': ([0, 0, 0, 90, 0], 90),
  'rows of no group': ([3, 0, 17, 2, 4], 64),
  'last group empty': ([1, 2, 3, 4, 0], 10),
  'a single row': ([0, 1, 0, 0, 0], 1),
  'no rows at all': ([0, 0, 0, 0, 0], 12),
}


def _operands(num_rows, sizes, dtype=np.float32):
  rng = np.random.default_rng(0)
  return (
    jnp.asarray(rng.normal(size=(num_rows, WIDTH_IN)), dtype),
    jnp.asarray(rng.normal(size=(GROUPS, WIDTH_IN, WIDTH_OUT)), dtype),
    jnp.asarray(sizes, jnp.int32),
  )


def _looped(x_JI, w_EIO, sizes_E):
  y_JO = np.zeros((x_JI.shape[0], w_EIO.shape[2]), np.float64)
  start = 0
  for w_IO, size in zip(w_EIO, sizes_E, strict=True):
    rows = slice(start, start + int(size))
    y_JO[rows] = np.asarray(x_JI[rows], np.float64) @ np.asarray(w_IO)
    start += int(size)
  return y_JO


@functools.cache
def _value_and_gradients():
  def product(x_JI, w_EIO, sizes_E, dy_JO):
    y_JO, pull = jax.vjp(
      lambda x, w: grouped.grouped_linear(x, w, sizes_E, jnp.float32),
      x_JI,
      w_EIO,
    )
    return y_JO, *pull(dy_JO)

  return jax.jit(product)


@pytest.mark.fast_cases(6)
@pytest.mark.parametrize('name', SIZES)
def test_products_and_gradients_equal_a_loop_over_groups(name):
  sizes, num_rows = SIZES[name]
  x_JI, w_EIO, sizes_E = _operands(num_rows, sizes)
  dy_JO = np.random.default_rng(1).normal(size=(num_rows, WIDTH_OUT))
  y_JO, dx_JI, dw_EIO = _value_and_gradients()(
    x_JI, w_EIO, sizes_E, jnp.asarray(dy_JO, jnp.float32)
  )
  # float32 sums of at most 90 terms of order 1, against float64.
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-5)
  close(y_JO, _looped(x_JI, w_EIO, sizes))
  close(dx_JI, _looped(dy_JO, w_EIO.swapaxes(1, 2), sizes))
  start = 0
  for group, size in enumerate(sizes):
    rows = slice(start, start + size)
    close(dw_EIO[group], np.asarray(x_JI, np.float64)[rows].T @ dy_JO[rows])
    start += size


@pytest.mark.fast_cases(4)
@pytest.mark.parametrize('w_axis', [1, 2])
@pytest.mark.parametrize('name', ['uneven', 'rows of no group', 'one group'])
def test_pieces_equal_what_accelerators_compute(name, w_axis):
  """The implementations of all platforms, which all run on CPU."""
  sizes, num_rows = SIZES[name]
  x_JI, w_EIO, sizes_E = _operands(num_rows, sizes)
  if w_axis == 2:
    w_EIO = w_EIO.swapaxes(1, 2)
  num_grouped = sum(sizes)
  pieces, batches, ragged = (
    jax.jit(functools.partial(times, w_axis=w_axis))(x_JI, w_EIO, sizes_E)
    for times in (
      grouped._times_in_pieces,
      grouped._times_in_batches,
      grouped._times_ragged,
    )
  )
  for found in (pieces, batches):
    np.testing.assert_allclose(
      found[:num_grouped], ragged[:num_grouped], atol=2e-5
    )
  dy_JO = _looped(x_JI, np.ones((GROUPS, WIDTH_IN, WIDTH_OUT)), sizes)
  pieces, batches, ragged = (
    jax.jit(product)(x_JI, jnp.asarray(dy_JO, jnp.float32), sizes_E)
    for product in (
      grouped._outer_in_pieces,
      grouped._outer_in_batches,
      grouped._outer_ragged,
    )
  )
  for found in (pieces, batches):
    np.testing.assert_allclose(found, ragged, rtol=1e-5, atol=2e-4)


def test_operands_are_of_the_compute_dtype_and_gradients_of_the_weights():
  x_JI, w_EIO, sizes_E = _operands(40, SIZES['uneven'][0])
  y_JO, pull = jax.vjp(
    lambda x, w: grouped.grouped_linear(x, w, sizes_E, jnp.bfloat16),
    x_JI.astype(jnp.bfloat16),
    w_EIO,
  )
  assert y_JO.dtype == jnp.bfloat16
  dx_JI, dw_EIO = pull(jnp.ones_like(y_JO))
  assert (dx_JI.dtype, dw_EIO.dtype) == (jnp.bfloat16, jnp.float32)
  # Seven products of operands with 8 bits of mantissa.
  np.testing.assert_allclose(
    y_JO.astype(jnp.float32),
    _looped(x_JI, w_EIO, SIZES['uneven'][0]),
    atol=0.1,
  )


def test_no_group_is_computed_with_the_matrices_of_others():
  """On CPU the work grows with the rows, not with rows times groups.

  The compiler counts the body of a loop once: one piece times one matrix.
  """
  rows, groups, width = 1024, 32, 64
  compiled = jax.jit(
    lambda x, w, sizes: grouped.grouped_linear(x, w, sizes, jnp.float32)
  )
  counted = (
    compiled.lower(
      jax.ShapeDtypeStruct((rows, width), jnp.float32),
      jax.ShapeDtypeStruct((groups, width, width), jnp.float32),
      jax.ShapeDtypeStruct((groups,), jnp.int32),
    )
    .compile()
    .cost_analysis()['flops']
  )
  piece = grouped._piece_size(rows, groups)
  assert piece == 8
  # Besides the product: masks and additions, of which there is one per number.
  assert counted < 2 * piece * width * width + 10 * rows * width
  assert counted < 0.01 * 2 * rows * groups * width * width


def test_side_by_side_as_stages_of_a_pipeline_are():
  x_JI, w_EIO, _ = _operands(40, SIZES['even'][0])
  sizes_SE = jnp.asarray([SIZES['even'][0], SIZES['uneven'][0]], jnp.int32)

  def loss(w_EIO, sizes_E):
    y_JO = grouped.grouped_linear(x_JI, w_EIO, sizes_E, jnp.float32)
    return jnp.sum(jnp.sin(y_JO))

  grad = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0)))
  for dw_EIO, sizes_E in zip(grad(w_EIO, sizes_SE), sizes_SE, strict=True):
    np.testing.assert_allclose(
      dw_EIO, jax.jit(jax.grad(loss))(w_EIO, sizes_E), atol=2e-5
    )


@pytest.mark.parametrize('sizes', [[100, 0, 28, 150], [0, 0, 0, 0]])
def test_the_gradient_kernel_of_tpu_equals_a_loop_over_groups(sizes):
  """Partial tiles, tiles that two groups share, and rows of no group."""
  rng = np.random.default_rng(0)
  x_JI, dy_JO = (rng.normal(size=(300, width)) for width in (128, 256))
  dw_EIO = grouped._outer_in_tiles(
    jnp.asarray(x_JI, jnp.float32),
    jnp.asarray(dy_JO, jnp.float32),
    jnp.asarray(sizes, jnp.int32),
    interpret=True,
  )
  ends = np.cumsum(sizes)
  for group, (end, size) in enumerate(zip(ends, sizes, strict=True)):
    rows = slice(end - size, end)
    # float32 sums of at most 150 terms of order 1.
    np.testing.assert_allclose(
      dw_EIO[group], x_JI[rows].T @ dy_JO[rows], atol=1e-4
    )


def test_widths_without_tiles_go_another_way():
  x_JI, _, sizes_E = _operands(40, SIZES['uneven'][0])
  dy_JO = jnp.ones((40, WIDTH_OUT), jnp.float32)
  np.testing.assert_allclose(
    grouped._outer_in_tiles(x_JI, dy_JO, sizes_E),
    grouped._outer_in_pieces(x_JI, dy_JO, sizes_E),
    atol=2e-5,
  )


@pytest.mark.parametrize(
  'outer', [grouped._outer_in_pieces, grouped._outer_in_batches]
)
def test_a_group_that_is_not_finite_leaves_the_gradients_of_others(outer):
  sizes, num_rows = SIZES['uneven']
  x_JI, _, sizes_E = _operands(num_rows, sizes)
  dy_JO = jnp.ones((num_rows, WIDTH_OUT))
  spoilt = slice(33, 34)  # the only row of the third group
  got, expected = (
    np.asarray(
      jax.jit(outer)(
        x_JI.at[spoilt].set(value), dy_JO.at[spoilt].set(value), sizes_E
      )
    )
    for value in (np.nan, 0.0)
  )
  assert np.isnan(got[2]).all()
  others = [0, 1, 3, 4]
  np.testing.assert_array_equal(got[others], expected[others])
