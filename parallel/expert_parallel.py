"""Expert parallelism: each device of a group holds some of the experts.

A group is the devices along mesh axis `expert`. Per layer, every device gathers
the tokens of its group, applies its own experts to the tokens that chose them,
and a reduce-scatter adds the results on their way back to the tokens' devices.
No token is dropped for any choice of the router, and every shape is static. The
price is one gather and one scatter of the group's tokens per layer, and memory
on every device for all these tokens, once per active expert. (GShard,
arXiv:2006.16668, sends each token only to the devices of its experts, and drops
some tokens.) A small group is therefore better than a large one: let `fsdp`
split the rest.

The same code serves any mesh. Without it, the compiler would gather the tokens
of all devices to sort them by expert.
"""

from collections.abc import Callable
import functools

import jax
from jax.sharding import Mesh, PartitionSpec

from parallel import rules

# The experts' port of `models.execution`:
# (x_BTD, ids_BTA, gates_BTA, kernels, dtype) -> y_BTD.
ApplyExperts = Callable[..., jax.Array]

_GROUP = 'expert'
# The mesh axis that splits each dimension of a kernel. A dimension split by
# `fsdp` is gathered before the product; a dimension split by `tensor` is not.
_SPLIT = {
  'gate': (_GROUP, 'fsdp', 'tensor'),
  'up': (_GROUP, 'fsdp', 'tensor'),
  'down': (_GROUP, 'tensor', 'fsdp'),
}


def spread(local: ApplyExperts, mesh: Mesh) -> ApplyExperts:
  """Returns `local` spread over a mesh.

  The specs do not name the mesh axis `stage`: a pipeline adds it by
  `jax.vmap(..., spmd_axis_name='stage')`.

  Args:
    local: applies the experts of one device. Its last argument, `held`, has for
      each kernel a function that gathers the kernel's shards and a function
      that scatters the gradient of the whole kernel. An expert id outside the
      given kernels must contribute zero.
    mesh: from `parallel.mesh`; kernels are split as `parallel.rules` says.
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
      # Ids relative to this device's experts. `num_here` is out of range: such
      # a token contributes zero.
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
      # Kernels do not declare the mesh axes over which their results vary.
      check_vma=False,
    )(x_BTD, ids_BTA, gates_BTA, kernels)

  return apply_experts


def _gather(w: jax.Array, *, axis: int) -> jax.Array:
  return jax.lax.all_gather(w, 'fsdp', axis=axis, tiled=True)


def _scatter(dw: jax.Array, *, axis: int) -> jax.Array:
  return jax.lax.psum_scatter(dw, 'fsdp', scatter_dimension=axis, tiled=True)
