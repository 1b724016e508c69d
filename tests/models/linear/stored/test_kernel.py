"""Stored kernels: shapes, numbers by hand, columns in another order."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.linear.stored import kernel as kernel_lib, packing


def _arrays(form, columns=6, rows=8, tile=(1, 4), *, seed=0):
  rng = np.random.default_rng(seed)
  if form in kernel_lib.PACKED:
    values = rng.integers(0, 256, (columns, rows // 2), np.uint8)
  elif form == 'int8':
    values = rng.integers(-128, 128, (columns, rows), np.int8)
  else:
    values = jnp.asarray(rng.normal(size=(columns, rows)), jnp.float8_e4m3fn)
  tiles = -(-columns // tile[0]), -(-rows // tile[1])
  return jnp.asarray(values), jnp.asarray(rng.uniform(1, 2, tiles), jnp.float32)


def _number(form, code):
  return {
    'int4': lambda: code - 16 if code > 7 else code,
    'uint4': lambda: code,
    'nf4': lambda: packing.NF4[code],
    'fp4': lambda: packing.FP4[code],
  }[form]()


def _by_hand(kernel):
  """Returns W[in, out] by the definition, number by number."""
  rows, columns = kernel.shape
  w = np.zeros((rows, columns), np.float32)
  order = range(rows) if kernel.order is None else np.asarray(kernel.order)
  values, scales = np.asarray(kernel.values), np.asarray(kernel.scales)
  for o, j in itertools.product(range(columns), range(rows)):
    if kernel.form in kernel_lib.PACKED:
      code = int(values[o, j // 2]) >> (4 * (j % 2)) & 15
      number = _number(kernel.form, code)
    else:
      number = values[o, j]
    tile = o // kernel.tile[0], j // kernel.tile[1]
    found = np.float32(number) * np.float32(scales[tile])
    if kernel.gain is not None:
      scale = np.float32(scales[tile]) * np.float32(kernel.gain)
      found = np.float32(number) * scale
    if kernel.mins is not None:
      found = found + np.float32(kernel.mins[tile])
    w[order[j], o] = found
  return w


@pytest.mark.parametrize('tile', [(1, 4), (1, 8), (4, 4), (6, 3)])
@pytest.mark.parametrize('form', kernel_lib.FORMS)
def test_numbers_are_those_of_the_definition(form, tile):
  values, scales = _arrays(form, tile=tile)
  more = {
    'mins': scales - 1.5,
    'order': jnp.array([3, 1, 0, 7, 2, 6, 4, 5], jnp.int32),
    'gain': jnp.float32(0.3),
  }
  for chosen in ([], ['mins'], ['order'], ['gain'], list(more)):
    kernel = kernel_lib.Kernel.make(
      values, scales, form=form, tile=tile, **{k: more[k] for k in chosen}
    )
    np.testing.assert_allclose(
      kernel.whole(jnp.float32), _by_hand(kernel), rtol=1e-6, atol=1e-6
    )
    part = kernel.part(3, 2).whole(jnp.float32)
    np.testing.assert_array_equal(part, kernel.whole(jnp.float32)[:, 3:5])


def test_codes_are_packed_with_even_columns_in_the_low_bits():
  codes = jnp.arange(16, dtype=jnp.uint8)[None]
  packed = packing.pack(codes)
  assert packed[0, 0] == 0x10
  assert packed[0, 7] == 0xFE
  np.testing.assert_array_equal(packing.unpack(packed), codes)
  signed = [*range(8), *range(-8, 0)]
  np.testing.assert_array_equal(packing.signed(codes)[0], signed)


@pytest.mark.parametrize('book', [packing.NF4, packing.FP4])
def test_the_nearest_number_of_a_book(book):
  x = jax.random.normal(jax.random.key(0), (1000,)) * 3
  codes = packing.nearest(x, book)
  distances = np.abs(np.asarray(x)[:, None] - np.asarray(book, np.float32))
  found = np.take_along_axis(distances, np.asarray(codes)[:, None], axis=1)
  np.testing.assert_array_equal(found[:, 0], distances.min(axis=1))


def test_a_kernel_is_a_tree_and_counts_its_bytes():
  values, scales = _arrays('int4', columns=6, rows=64, tile=(1, 32))
  kernel = kernel_lib.Kernel.make(values, scales, form='int4', tile=(1, 32))
  assert kernel.shape == (64, 6)
  assert kernel.ndim == 2
  assert kernel.nbytes == 6 * 32 + 6 * 2 * 4
  assert kernel.bits == 8 * kernel.nbytes / (64 * 6)
  abstract = jax.eval_shape(lambda: kernel)
  assert abstract.nbytes == kernel.nbytes
  assert abstract.tile == (1, 32)
  paths, _ = jax.tree.flatten_with_path({'kernel': kernel})
  names = [jax.tree_util.keystr(path) for path, _ in paths]
  assert names == ["['kernel']['values']", "['kernel']['scales']"]


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'form': 'int3'}, "form: got 'int3', expected one of int8"),
    ({'form': 'int8'}, 'dtype of values: got uint8, expected int8'),
    ({'tile': (1, 16)}, r'shape of scales: got \(6, 2\), expected \(6, 1\)'),
    ({'tile': (0, 4)}, 'tile_out: got 0, expected at least 1'),
    ({'mins': np.zeros((6, 1))}, r'shape of mins: got \(6, 1\)'),
    ({'order': np.arange(4)}, r'shape of order: got \(4,\), expected \(8,\)'),
    ({'gain': np.ones((1,))}, r'shape of gain: got \(1,\), expected \(\)'),
  ],
)
def test_arrays_that_do_not_fit_are_refused(change, message):
  values, scales = _arrays('int4')
  fields = {'form': 'int4', 'tile': (1, 4)} | change
  with pytest.raises(ValueError, match=message):
    kernel_lib.Kernel.make(values, scales, **fields)
