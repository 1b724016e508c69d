"""Kernels in fewer bits over devices: the function, the bits and the memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frozen import format as frozen_format
from inference import generate
from inference.engine import (
  device_state,
  engine_config,
)
from inference.engine.spread import (
  layout as layout_lib,
  placement as placement_lib,
  stored as stored_lib,
)
from models.linear import invariant, plain
from models.linear.stored import product
from parallel import mesh as mesh_lib, parallel_config
from parallel.tensor import by_part, ports
from tests.helpers import any_kernels, frozen_dirs, tiny_models
from tests.helpers.open_weights import stored_params
from tests.helpers.serving import stored_engines

_WIDTH = 48  # of the stream; 9 heads of 32 channels


def _layout(mlp_width, num_parts):
  config = tiny_models.odd_heads(
    model_width=_WIDTH, head_width=32, mlp_width=mlp_width
  )
  return layout_lib.Layout(model=config, vocab_size=61, num_parts=num_parts)


def _cut(name, owner, mlp_width, num_parts):
  """Returns a kernel of an owner, and how it lies over parts."""
  heads = 9 * 32
  sizes = {
    'out': (heads, _WIDTH),
    'down': (mlp_width, _WIDTH),
    'up': (256, mlp_width),
    'query': (256, heads),
  }[owner]
  kernel = any_kernels.kernel(name, *sizes)
  assert kernel.shape == sizes
  path = tuple(map(jax.tree_util.DictKey, ('layer_0', owner, 'kernel')))
  return kernel, stored_lib.cut(_layout(mlp_width, num_parts), path, kernel)


def _served(kernel, cut, mesh):
  """Returns the kernel as an engine over the mesh holds it."""

  def put(path, x):
    array, sharding = cut.laid_out(path[-1].key, np.asarray(x), mesh)
    return jax.device_put(array, sharding)

  return cut.served(jax.tree_util.tree_map_with_path(put, kernel), mesh)


def _product(kernel, cut, x_RI, num_devices, numerics):
  """Returns the product that devices compute, with the inputs of all parts."""
  mesh = mesh_lib.make_mesh(
    parallel_config.ParallelConfig(tensor=num_devices),
    jax.devices()[:num_devices],
  )
  served = _served(kernel, cut, mesh)
  num = cut.layout.num_parts
  is_sum = cut.layout.is_cut(cut.into)
  if numerics == 'invariant':
    port = (by_part.Joined if is_sum else by_part.Linear)(invariant.linear, num)
  else:
    port = ports.Joined(plain.linear) if is_sum else plain.linear
  spec = jax.sharding.PartitionSpec
  own, whole = spec(None, ports.AXIS), spec()
  if is_sum:
    # What is filled in has weights of zero: any number may be there.
    filled = np.pad(x_RI, ((0, 0), (0, 1)), constant_values=7.0)
    x_RI = filled[:, cut.layout.index(cut.into, kernel.shape[0])]
  function = jax.shard_map(
    lambda x, w: product.linear(x, w, None, jnp.float32, port),
    mesh=mesh,
    in_specs=(
      own if is_sum else whole,
      jax.tree.map(lambda leaf: leaf.sharding.spec, served),
    ),
    out_specs=whole if is_sum else own,
    check_vma=False,
  )
  y = np.asarray(jax.jit(function)(jnp.asarray(x_RI), served))
  return y if is_sum else cut.layout.of_model(y, (None, cut.out), y.shape)


# (kernel, owner, MLP width, whether outputs are cut in place of inputs)
_KERNELS = [
  ('int4', 'down', 768, True),  # tiles of 128, and parts of 192
  ('mxfp4', 'out', 64, False),  # filled with heads of zeros
  ('tiles', 'up', 100, False),  # tiles of 3 outputs, and parts of 25
]
_MORE = [
  *(
    (name, owner, 128, False)
    for name in ('int8', 'nvfp4')
    for owner in ('down', 'out')
  ),
  ('int8', 'down', 42, False),  # filled: parts of 11
  ('uint4', 'out', 64, True),
  ('uint4', 'down', 1024, False),
  ('nf4', 'down', 90, True),
  ('ordered', 'down', 512, True),  # GPTQ's order mixes inputs
  ('ordered', 'out', 64, True),
  ('ordered', 'query', 64, False),
  ('tiles', 'down', 192, False),
  ('Q8_0', 'out', 64, False),
  *((name, 'down', 1024, False) for name in any_kernels.SCALES),
  ('Q4_K', 'down', 768, True),
  ('Q6_K', 'up', 90, False),
]


@pytest.mark.fast_cases(2)
@pytest.mark.parametrize(
  ('name', 'owner', 'mlp_width', 'is_across'),
  [*_KERNELS, *(pytest.param(*x, marks=pytest.mark.slow) for x in _MORE)],
)
def test_products_are_those_of_the_kernel_with_the_same_bits(
  name, owner, mlp_width, is_across
):
  kernel, cut = _cut(name, owner, mlp_width, num_parts=4)
  assert cut.is_across == is_across
  x_RI = np.random.default_rng(1).normal(size=(3, kernel.shape[0]))
  x_RI = np.float32(x_RI)
  whole = np.float64(kernel.whole(jnp.float32))
  expected = x_RI @ whole
  # float32 sums of up to 1024 products, in any order.
  bound = 1e-5 * (np.abs(x_RI) @ np.abs(whole)).max()
  found = [_product(kernel, cut, x_RI, num, 'invariant') for num in (1, 4)]
  fast = _product(kernel, cut, x_RI, 4, 'fast')
  np.testing.assert_array_equal(found[0], found[1])
  for y in (found[0], fast):
    got = y[:, : expected.shape[1]]
    np.testing.assert_allclose(got, expected, atol=bound, rtol=0)


@pytest.mark.fast_cases(4)
@pytest.mark.parametrize('num_devices', [2, 8])
@pytest.mark.parametrize('scheme', ['uint4', 'nvfp4', 'ordered', 'Q8_0'])
def test_kernels_are_those_of_the_model_again(scheme, num_devices):
  config = tiny_models.odd_heads(
    model_width=96, mlp_width=192, head_width=32, num_layers=1
  )
  params = stored_params.stored(frozen_dirs.params(config), scheme)
  unread = device_state.unread(params)
  placement = placement_lib.make(
    engine_config.EngineConfig(tensor=num_devices),
    config,
    unread,
    vocab_size=61,
  )
  placed = placement.read(None, unread)
  jax.tree.map(
    lambda x, shape: np.testing.assert_equal(
      (x.shape, x.dtype, x.sharding), (shape.shape, shape.dtype, shape.sharding)
    ),
    placed,
    placement.shapes(None, unread),
  )
  assert placement.num_bytes(unread) == sum(
    leaf.addressable_data(0).nbytes for leaf in jax.tree.leaves(placed)
  )
  jax.tree.map(
    lambda x, y: np.testing.assert_equal(
      (np.asarray(x).tobytes(), x.shape), (np.asarray(y).tobytes(), y.shape)
    ),
    placement.of_model(placed),
    params,
  )


def test_devices_make_no_float_copy_of_a_kernel():
  # 64 MiB in bfloat16 on each device, 32 MiB as stored.
  config = tiny_models.llama_like(model_width=4096, mlp_width=16384)
  layout = layout_lib.Layout(model=config, vocab_size=61, num_parts=2)
  mesh = mesh_lib.make_mesh(
    parallel_config.ParallelConfig(tensor=2), jax.devices()[:2]
  )
  shape = jax.ShapeDtypeStruct((16384, 4096), jnp.bfloat16)
  kernel = jax.eval_shape(lambda w: stored_params.kernel(w, 'int8'), shape)
  path = tuple(map(jax.tree_util.DictKey, ('layer_0', 'down', 'kernel')))
  served = stored_lib.cut(layout, path, kernel).shapes(mesh)
  function = jax.shard_map(
    lambda x, w: product.linear(
      x, w, None, jnp.bfloat16, ports.Joined(plain.linear)
    ),
    mesh=mesh,
    in_specs=(
      jax.sharding.PartitionSpec(None, ports.AXIS),
      jax.tree.map(lambda leaf: leaf.sharding.spec, served),
    ),
    out_specs=jax.sharding.PartitionSpec(),
    check_vma=False,
  )
  x_RI = jax.ShapeDtypeStruct((2, 16384), jnp.bfloat16)
  compiled = jax.jit(function).lower(x_RI, served).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 8 * 2**20


# ------------------------------------------------------------------------------
# Engines.


def _mixed():
  """Returns a model whose layers and tables have kernels of many forms."""
  config = tiny_models.odd_heads(
    model_width=96, mlp_width=192, head_width=32, vocab_size=270, max_length=64
  )
  floats = frozen_dirs.params(config)
  of = {
    name: stored_params.stored(floats, name)['params']
    for name in ('ordered', 'nvfp4', 'int4', 'Q8_0', 'int8')
  }
  tree = {**of['ordered'], 'head': of['Q8_0']['head']}
  tree['embed'] = of['int8']['embed']
  tree['layer_1'] = {
    **of['nvfp4']['layer_1'],
    'mlp': {
      'up': of['Q8_0']['layer_1']['mlp']['up'],
      'gate': floats['params']['layer_1']['mlp']['gate'],
      'down': of['int4']['layer_1']['mlp']['down'],
    },
  }
  return config, {'params': tree}


@pytest.mark.slow
def test_engines_over_devices_answer_as_the_floats_and_with_the_same_bits():
  config, params = _mixed()
  answer = functools.partial(stored_engines.answer, config, params)
  exact = [
    answer(tensor=num_devices, numerics='invariant', tensor_parts=4)
    for num_devices in (2, 4)
  ]
  assert exact[0] == exact[1]
  for found in (answer(tensor=4), exact[0]):
    stored_engines.check(config, params, found)


@pytest.mark.slow
def test_a_directory_of_stacked_kernels_is_read_into_its_places(tmp_path):
  config = frozen_dirs.config(
    num_heads=9, num_kv_heads=3, model_width=96, mlp_width=96, head_width=32,
    scan_layers=True,
  )  # fmt: skip
  params = stored_params.stored(frozen_dirs.params(config), 'ordered')
  manifest = frozen_dirs.write(tmp_path / 'f', config=config, params=params)
  generator = generate.Generator(
    frozen_format.open_directory(tmp_path / 'f'),
    engine_config.EngineConfig(
      tensor=4, max_sequences=1, chunk_tokens=16, max_chunks=1
    ),
    compile_all=False,
  )
  assert generator.weights_digest() == manifest.weights_digest
  assert '4 of 16 stored kernels are cut along' in generator.products_text()
