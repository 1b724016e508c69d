"""Expert parallelism: each device of a group holds some of the experts.

The tokens of a group, the devices along mesh axis `expert`, are gathered; each
device applies the experts that it holds to those that chose them; and the
results are added up on the way back to where the tokens came from. Whatever the
router chooses no token is dropped and every shape is static, at the price of
one gather and one scatter of all tokens of the group per layer, and of room on
every device for all copies of the group's tokens (GShard, arXiv:2006.16668,
sends each token only where it goes, and drops some). So a small group is better
than a large one: let `fsdp` split what is left.

The same code serves any mesh: left to itself, the compiler would gather the
tokens of all devices to sort them by expert.
"""

from collections.abc import Callable
import functools

import jax
from jax.sharding import Mesh, PartitionSpec

from parallel import rules

# A model's port: (x_BTD, ids_BTA, gates_BTA, kernels, dtype) -> y_BTD.
ApplyExperts = Callable[..., jax.Array]

_GROUP = 'expert'
# By mesh axis, which dimension of a kernel is split. Those split by `fsdp` are
# made whole before they multiply; those split by `tensor` multiply in parts.
_SPLIT = {
  'gate': (_GROUP, 'fsdp', 'tensor'),
  'up': (_GROUP, 'fsdp', 'tensor'),
  'down': (_GROUP, 'tensor', 'fsdp'),
}


def spread(local: ApplyExperts, mesh: Mesh) -> ApplyExperts:
  """Returns `local` spread over a mesh.

  The specs name no stage: run side by side, stages are a further axis that
  `jax.vmap(..., spmd_axis_name='stage')` adds to them.

  Args:
    local: applies experts on one device: takes besides the port's arguments
      `held`, which tells for each kernel how to gather its parts in the compute
      dtype and how to scatter the gradient of the whole; an id that is not of
      the kernels it is given must add nothing.
    mesh: from `parallel.mesh`, with the kernels as `parallel.rules` lays them
      out.
  """
  if mesh.size == 1:
    return local
  token_spec = PartitionSpec(rules.BATCH_AXES, 'context', None)
  held = {
    name: (
      functools.partial(_gather, axis=axes.index('fsdp')),
      functools.partial(_scatter, axis=axes.index('fsdp')),
    )
    for name, axes in _SPLIT.items()
  }

  def apply_experts(x_BTD, ids_BTA, gates_BTA, kernels, dtype):
    def of_one_device(x_BTD, ids_BTA, gates_BTA, kernels):
      x_BTD, ids_BTA, gates_BTA = (
        jax.lax.all_gather(part, _GROUP, axis=0, tiled=True)
        for part in (x_BTD.astype(dtype), ids_BTA, gates_BTA)
      )
      num_here = kernels['down'].shape[0]
      ids_BTA = ids_BTA - num_here * jax.lax.axis_index(_GROUP)
      is_here = (ids_BTA >= 0) & (ids_BTA < num_here)
      ids_BTA = jax.numpy.where(is_here, ids_BTA, num_here)
      y_BTD = local(x_BTD, ids_BTA, gates_BTA, kernels, dtype, held)
      y_BTD = jax.lax.psum_scatter(
        y_BTD, _GROUP, scatter_dimension=0, tiled=True
      )
      return jax.lax.psum(y_BTD, 'tensor')

    return jax.shard_map(
      of_one_device,
      mesh=mesh,
      in_specs=(
        token_spec,
        token_spec,
        token_spec,
        {name: PartitionSpec(*_SPLIT[name]) for name in kernels},
      ),
      out_specs=token_spec,
      # Kernels do not say over which axes their results vary.
      check_vma=False,
    )(x_BTD, ids_BTA, gates_BTA, kernels)

  return apply_experts


def _gather(w: jax.Array, *, axis: int) -> jax.Array:
  return jax.lax.all_gather(w, 'fsdp', axis=axis, tiled=True)


def _scatter(dw: jax.Array, *, axis: int) -> jax.Array:
  return jax.lax.psum_scatter(dw, 'fsdp', scatter_dimension=axis, tiled=True)
