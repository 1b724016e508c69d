"""Experts in fewer bits over devices: the function, the bits and the memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inference.engine import device_state, engine_config
from inference.engine.spread import (
  layout as layout_lib,
  placement as placement_lib,
  stored as stored_lib,
)
from models.linear import invariant
from models.linear.stored import across, product
from models.moe import dispatch
from parallel import mesh as mesh_lib, parallel_config
from parallel.tensor import by_part, ports
from tests.helpers import frozen_dirs, tiny_models
from tests.helpers.open_weights import stored_params
from tests.helpers.serving import stored_engines

_EXPERTS, _ACTIVE = 4, 2
_PARTS = 4


def _kernels(schemes, model_width, expert_width):
  """Returns the kernels of experts, each in its scheme; None: in floats."""
  rng = np.random.default_rng(0)
  made = {}
  for name, scheme in zip(('up', 'gate', 'down'), schemes, strict=True):
    shape = _EXPERTS, model_width, expert_width
    if name == 'down':
      shape = _EXPERTS, expert_width, model_width
    w_EIO = jnp.asarray(rng.normal(0, 0.1, shape), jnp.float32)
    made[name] = stored_params.kernel(w_EIO, scheme) if scheme else w_EIO
  return made


def _put(kernels, groups, num_devices):
  """Returns a mesh, the kernels as its devices hold them, and their cuts."""
  _, expert_width, model_width = kernels['down'].shape
  config = tiny_models.mixture(
    model_width=model_width, num_experts=_EXPERTS, expert_width=expert_width
  )
  layout = layout_lib.Layout(
    model=config,
    vocab_size=61,
    num_parts=_PARTS,
    num_expert_groups=groups,
  )
  rows = min(groups, num_devices)
  mesh = mesh_lib.make_mesh(
    parallel_config.ParallelConfig(expert=rows, tensor=num_devices // rows),
    jax.devices()[:num_devices],
  )
  placed, cuts = {}, {}
  for name, kernel in kernels.items():
    if isinstance(kernel, jax.Array):
      spec = [ports.EXPERT, None, ports.TENSOR]
      if name == 'down':
        spec = [ports.EXPERT, ports.TENSOR, None]
      spec = jax.sharding.PartitionSpec(*spec)
      sharding = jax.sharding.NamedSharding(mesh, spec)
      placed[name] = jax.device_put(kernel, sharding)
      continue
    keys = 'layer_0', 'moe', f'expert_{name}', 'kernel'
    path = tuple(map(jax.tree_util.DictKey, keys))
    cuts[name] = stored_lib.cut(layout, path, kernel)

    def put(path, x, cut=cuts[name]):
      array, sharding = cut.laid_out(path[-1].key, np.asarray(x), mesh)
      return jax.device_put(array, sharding)

    own = jax.tree_util.tree_map_with_path(put, kernel)
    placed[name] = cuts[name].served(own, mesh)
  return mesh, placed, cuts


def _output(kernels, tokens, groups, num_devices, numerics):
  """Returns the output of the experts over devices, and their cuts."""
  mesh, placed, cuts = _put(kernels, groups, num_devices)
  if numerics == 'invariant':
    port = by_part.Experts(
      invariant.apply_experts, invariant.linear, _PARTS, groups
    )
  else:
    port = ports.Experts(dispatch.apply_experts, product.plain.linear)
  whole = jax.sharding.PartitionSpec()
  function = jax.shard_map(
    lambda x, ids, gates, kernels: port(
      x, ids, gates, kernels, jnp.float32, stored=product.in_blocks
    ),
    mesh=mesh,
    in_specs=(
      *[whole] * 3,
      jax.tree.map(lambda leaf: leaf.sharding.spec, placed),
    ),
    out_specs=whole,
    check_vma=False,
  )
  for name, cut in cuts.items():
    # What a plan counts is what a device holds.
    held = sum(
      x.addressable_data(0).nbytes for x in jax.tree.leaves(placed[name])
    )
    assert cut.num_bytes(num_devices) == held
  return np.asarray(jax.jit(function)(*tokens, placed)), placed


# (schemes of up, gate and down; widths of the stream and of experts; groups;
# whether `down` is cut along its outputs)
_CASES = [
  (('ordered', 'int8', 'ordered'), (48, 64), 2, True),  # GPTQ mixes inputs
  (('mxfp4', 'mxfp4', 'mxfp4'), (64, 64), 2, False),
]
_MORE = [
  # Tiles of 128 and parts of 192; 4 devices have 13 of the 50 outputs each.
  (('int4', 'int4', 'int4'), (50, 768), 1, True),
  (('ordered', 'ordered', 'ordered'), (48, 64), 4, False),  # whole experts
  (('Q8_0', 'Q8_0', 'Q8_0'), (64, 32), 4, False),
  (('Q8_0', 'Q8_0', 'Q8_0'), (64, 96), 2, True),  # blocks of 32, parts of 48
  (('Q8_0', None, 'int8'), (64, 128), 1, False),
  ((None, 'nvfp4', 'ordered'), (48, 64), 1, True),
  (('nvfp4', 'nvfp4', None), (48, 64), 1, False),
]


@pytest.mark.slow
@pytest.mark.parametrize(
  ('schemes', 'widths', 'groups', 'is_across'),
  [*_CASES, *(pytest.param(*x, marks=pytest.mark.slow) for x in _MORE)],
)
def test_experts_are_those_of_the_model_with_the_same_bits(
  schemes, widths, groups, is_across
):
  kernels = _kernels(schemes, *widths)
  rng = np.random.default_rng(1)
  x_BTD = jnp.asarray(rng.normal(size=(1, 5, widths[0])), jnp.float32)
  ids_BTA = [rng.permutation(_EXPERTS)[:_ACTIVE] for _ in range(5)]
  ids_BTA = jnp.asarray([ids_BTA], jnp.int32)
  gates_BTA = jnp.asarray(rng.uniform(size=ids_BTA.shape), jnp.float32)
  tokens = x_BTD, ids_BTA, gates_BTA
  whole = {
    name: w if isinstance(w, jax.Array) else w.whole(jnp.float32)
    for name, w in kernels.items()
  }
  expected = dispatch.apply_experts(*tokens, whole, jnp.float32)
  output = functools.partial(_output, kernels, tokens, groups)
  exact = [output(num, 'invariant') for num in (2, 4)]
  _, placed = exact[-1]
  assert isinstance(placed['down'], across.Across) == is_across
  np.testing.assert_array_equal(exact[0][0], exact[1][0])
  fast, _ = output(4, 'fast')
  # float32 sums of up to 768 products, in any order.
  bound = 1e-5 * np.abs(expected).max()
  for found in (exact[0][0], fast):
    np.testing.assert_allclose(found, expected, atol=bound, rtol=0)


@pytest.mark.parametrize('groups', [1, 2])
@pytest.mark.parametrize(
  'scheme', ['ordered', pytest.param('nvfp4', marks=pytest.mark.slow)]
)
def test_experts_are_read_into_their_places_and_found_again(scheme, groups):
  config = tiny_models.mixture(
    model_width=48, expert_width=64, num_shared_experts=0, num_layers=1
  )
  params = stored_params.stored(frozen_dirs.params(config), scheme)
  unread = device_state.unread(params)
  placement = placement_lib.make(
    engine_config.EngineConfig(tensor=4, experts=groups),
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
  held = sum(x.addressable_data(0).nbytes for x in jax.tree.leaves(placed))
  assert placement.num_bytes(unread) == held
  # Experts are most of this model: none is on every device.
  assert held < unread.num_bytes / 2
  jax.tree.map(
    lambda x, y: np.testing.assert_equal(
      (np.asarray(x).tobytes(), x.shape), (np.asarray(y).tobytes(), y.shape)
    ),
    placement.of_model(placed),
    params,
  )


@pytest.mark.slow
@pytest.mark.parametrize('scheme', ['ordered', 'nvfp4'])
def test_engines_over_devices_answer_as_the_floats_and_with_the_same_bits(
  scheme,
):
  config = tiny_models.mixture(
    model_width=96, expert_width=64, vocab_size=270, num_layers=1, max_length=64
  )
  params = stored_params.stored(frozen_dirs.params(config), scheme)
  exact = {
    (num_devices, groups): stored_engines.answer(
      config,
      params,
      tensor=num_devices,
      experts=groups,
      numerics='invariant',
      tensor_parts=4,
    )
    for num_devices, groups in ((2, 1), (4, 1), (2, 2), (4, 2))
  }
  assert exact[2, 1] == exact[4, 1]
  assert exact[2, 2] == exact[4, 2]
  fast = stored_engines.answer(config, params, tensor=4, experts=2)
  for found in (fast, exact[4, 1], exact[4, 2]):
    stored_engines.check(config, params, found)
