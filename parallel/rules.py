"""The rules: on which mesh axes each logical axis is laid out.

The only place that knows both vocabularies. Models name what a dimension is,
`parallel.mesh` builds the devices' axes, and these lines join the two.
Batches are split over `data` and `fsdp`; fully sharded data parallelism splits
the `embed` dimension of each matrix, tensor parallelism the other one.
"""

from collections.abc import Iterator
import contextlib
from typing import Any

from flax import linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

BATCH_AXES = ('data', 'fsdp')

RULES: tuple[tuple[str, Any], ...] = (
  # Activations.
  ('batch', BATCH_AXES),
  ('time', None),
  ('width', None),
  # Parameters.
  ('embed', 'fsdp'),
  ('heads', 'tensor'),
  ('kv_heads', 'tensor'),
  ('mlp', 'tensor'),
  ('vocab', 'tensor'),
  ('position', None),
  ('norm', None),
  ('layers', None),
)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the layout of an array whose first axis is the batch."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the layout of an array that every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def shardings(mesh: Mesh, shapes: Any, logical_axes: Any) -> Any:
  """Returns a NamedSharding for each leaf.

  Args:
    mesh: from `parallel.mesh`.
    shapes: a tree of arrays or shapes.
    logical_axes: the same tree with a tuple of axis names (or None) per leaf.

  Raises:
    ValueError: a dimension does not divide by its mesh axis.
  """
  table = dict(RULES)

  def leaf_sharding(path, leaf, axes):
    spec = [table[name] if name is not None else None for name in axes]
    for size, name, mesh_axis in zip(leaf.shape, axes, spec, strict=True):
      if mesh_axis is not None and size % mesh.shape[mesh_axis]:
        raise ValueError(
          f'{jax.tree_util.keystr(path)}: got axis {name} of size {size},'
          f' expected a multiple of the mesh axis {mesh_axis} ='
          f' {mesh.shape[mesh_axis]}; change the model or'
          f' parallel.{mesh_axis}'
        )
    return NamedSharding(mesh, PartitionSpec(*spec))

  return jax.tree_util.tree_map_with_path(leaf_sharding, shapes, logical_axes)


@contextlib.contextmanager
def applied(mesh: Mesh) -> Iterator[None]:
  """Makes the logical constraints inside models mean this mesh."""
  with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
    yield
