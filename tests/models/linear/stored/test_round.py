"""Rounding to nearest: against qwix, and against the error of each scheme."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.linear.stored import packing, round as rounding, tree


def _kernel(*shape, seed=0):
  return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize('form', tree.BASES)
@pytest.mark.parametrize('rows', [128, 96, 20])
def test_values_of_a_base_are_those_of_qwix(form, rows):
  qwix = pytest.importorskip('qwix', reason='requirements-quant.txt')
  w_IO = _kernel(rows, 24)
  kernel = tree.as_base(w_IO, form)
  tile = {128: 64, 96: 48, 20: 20}[rows]
  assert kernel.scales.shape == (24, rows // tile)
  theirs = qwix.quantize(
    w_IO, form, channelwise_axes=(1,), tiled_axes={0: tile}
  )
  values = kernel.values
  if form == 'int4':
    values = packing.signed(packing.unpack(values))
  # The largest number of a tile is halfway between two codes there.
  most = {'int8': 127, 'int4': 7}[form]
  codes = np.clip(theirs.qvalue.astype(jnp.int8), -most, most)
  np.testing.assert_array_equal(values.T, codes)
  step = np.repeat(np.asarray(kernel.scales), tile, axis=1).T
  error = np.abs(kernel.whole(jnp.float32) - w_IO)
  assert np.all(error <= 0.5001 * step)


# Relative errors on normal weights. Published: Q8_0 .0054, int8 of a row .0087,
# uint4 .0998, nf4 .0919, fp8 .0265, mxfp4 .1150, int4 .1174 (with
# 7 steps up to the largest number; here 7.5).
@pytest.mark.fast_cases(5)
@pytest.mark.parametrize(
  ('scheme', 'bits', 'error'),
  [
    ('int8', 8, 0.0087),
    ('int8-g32', 9, 0.0054),
    ('int4', 4.25, 0.1174),
    ('uint4', 4.5, 0.0998),
    ('nf4', 4.5, 0.0919),
    ('fp8', 8, 0.0265),
    ('mxfp4', 4.25, 0.1150),
    ('nvfp4', 4.5, 0.0990),
  ],
)
def test_a_scheme_has_its_bits_and_its_error(scheme, bits, error):
  w_IO = _kernel(4096, 64)
  kernel = rounding.by_scheme(w_IO, scheme)
  assert kernel.shape == w_IO.shape
  assert kernel.bits == pytest.approx(bits, rel=0.002)
  found = np.linalg.norm(kernel.whole(jnp.float32) - w_IO)
  found = found / np.linalg.norm(w_IO)
  # 2 %: the spread of 64 columns. Far below the published would be a mistake,
  # too: one scale more than is counted.
  assert 0.9 * error < found < 1.02 * error


@pytest.mark.fast_cases(4)
@pytest.mark.parametrize('scheme', rounding.SCHEMES)
def test_inputs_that_no_tile_divides_cost_as_many_bits(scheme):
  # 514 has the divisors 2 and 257 alone.
  odd, even = (
    rounding.by_scheme(_kernel(rows, 64), scheme) for rows in (514, 512)
  )
  assert odd.tile[1] >= min(odd.shape[0], even.tile[1])
  assert odd.bits == pytest.approx(even.bits, rel=0.06)  # a tile of 2 per row
  errors = [
    np.linalg.norm(kernel.whole(jnp.float32) - _kernel(*kernel.shape))
    / np.linalg.norm(_kernel(*kernel.shape))
    for kernel in (odd, even)
  ]
  assert errors[0] == pytest.approx(errors[1], rel=0.05)


@pytest.mark.fast_cases(5)
@pytest.mark.parametrize('scheme', rounding.SCHEMES)
def test_stacked_kernels_are_rounded_one_by_one(scheme):
  w_NIO = _kernel(3, 64, 8) * jnp.array([1, 30, 0.1])[:, None, None]
  stack = rounding.by_scheme(w_NIO, scheme)
  assert stack.shape == (3, 64, 8)
  for n in range(3):
    alone = rounding.by_scheme(w_NIO[n], scheme)
    mine = jax.tree.map(lambda x, n=n: x[n], stack)
    leaves = jax.tree.leaves(mine), jax.tree.leaves(alone)
    for ours, theirs in zip(*leaves, strict=True):
      # A division by a constant is rounded as XLA vectorises it.
      np.testing.assert_allclose(ours, theirs, rtol=2e-7)
    np.testing.assert_allclose(
      stack.whole(jnp.float32)[n], alone.whole(jnp.float32), rtol=5e-7
    )


@pytest.mark.parametrize('scheme', rounding.SCHEMES)
def test_zeros_and_huge_numbers_stay_what_they_are(scheme):
  w_IO = jnp.zeros((64, 8)).at[:, 1].set(3e4).at[:, 2].set(-3e4)
  found = rounding.by_scheme(w_IO, scheme).whole(jnp.float32)
  np.testing.assert_array_equal(found[:, 0], 0)
  # e2m1's largest magnitude is 6, and a power of two of it may be 25 % below.
  np.testing.assert_allclose(found, w_IO, rtol=0.25)


@pytest.mark.parametrize('tile', [(1, 48), (16, 16), (5, 7), (24, 64)])
@pytest.mark.parametrize('form', ['int8', 'uint4'])
def test_tiles_may_be_partial_at_the_end(form, tile):
  w_IO = _kernel(64, 24)
  kernel = rounding.quantise(w_IO, form, tile)
  assert kernel.scales.shape == (-(-24 // tile[0]), -(-64 // tile[1]))
  step = np.asarray(kernel.scales)
  for axis, size in enumerate(tile):
    step = np.repeat(step, size, axis=axis)
  error = np.abs(kernel.whole(jnp.float32) - w_IO)
  assert np.all(error <= 0.5001 * step[:24, :64].T)


def test_an_odd_number_of_inputs_is_refused_in_four_bits():
  with pytest.raises(ValueError, match='got 7 inputs, expected an even'):
    rounding.by_scheme(_kernel(7, 4), 'int4')
  with pytest.raises(ValueError, match="scheme: got 'int5', expected"):
    rounding.by_scheme(_kernel(8, 4), 'int5')
