"""The sharding rules: the mesh axes over which each logical axis is split.

Models name their dimensions by logical axes and `parallel.mesh` names the axes
of the devices; only this file knows both. Batches are split over `data`,
`fsdp` and `expert`, and along time over `context`. Fully sharded data
parallelism splits the `embed` dimension of each matrix, tensor parallelism the
other dimension, and a pipeline the stack of layers.
"""

from collections.abc import Iterable, Iterator
import contextlib
import math
from typing import Any

from flax import linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from checks import expect

BATCH_AXES = ('data', 'fsdp', 'expert')

RULES: tuple[tuple[str, Any], ...] = (
  # Activations.
  ('batch', BATCH_AXES),
  ('time', 'context'),
  # Outside the layers every stage holds the whole batch, so the stages share
  # the work of the head: they split its tokens.
  ('head_time', ('context', 'stage')),
  ('width', None),
  # Parameters. Devices along `expert` split the dense matrices, too.
  ('embed', ('fsdp', 'expert')),
  ('heads', 'tensor'),
  ('kv_heads', 'tensor'),
  ('mlp', 'tensor'),
  ('vocab', 'tensor'),
  ('experts', 'expert'),
  ('expert_embed', 'fsdp'),
  ('position', None),
  ('norm', None),
  ('rank', None),  # of adapters
  ('layers', 'stage'),
)

# Of an engine of several devices: all of them share heads, MLP and vocabulary.
# Groups of them, `expert`, share the experts of a mixture, and the devices of a
# group, `tensor`, the width of these. See parallel/tensor/ports.py.
_ALL = ('expert', 'tensor')
SERVING: tuple[tuple[str, Any], ...] = (
  *((name, None) for name in ('embed', 'expert_embed', 'position', 'norm')),
  ('rank', None),
  ('heads', _ALL),
  ('kv_heads', _ALL),
  ('mlp', _ALL),
  ('vocab', _ALL),
  ('experts', 'expert'),
)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of an array [B, T, ...]."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES, 'context'))


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of an array that every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def num_parts(mesh: Mesh, mesh_axes: str | tuple[str, ...] | None) -> int:
  """Returns the number of shards of a dimension split over `mesh_axes`."""
  if mesh_axes is None:
    return 1
  names = mesh_axes if isinstance(mesh_axes, tuple) else (mesh_axes,)
  return math.prod(mesh.shape[name] for name in names)


def shardings(
  mesh: Mesh, shapes: Any, logical_axes: Any, table: Any = RULES
) -> Any:
  """Returns a NamedSharding for each leaf.

  Args:
    logical_axes: the same tree with a tuple of axis names (or None) per leaf.
    table: the rules. A mesh axis that splits a dimension splits no later one.

  Raises:
    ValueError: a dimension does not divide by its mesh axis.
  """
  table = dict(table)

  def leaf_sharding(path, leaf, axes):
    spec = _without_repeats(table[name] if name else None for name in axes)
    for size, name, mesh_axes in zip(leaf.shape, axes, spec, strict=True):
      named = mesh_axes if isinstance(mesh_axes, tuple) else (mesh_axes,)
      split = [f'parallel.{a}' for a in named if a and mesh.shape[a] > 1]
      expect.multiple_of(
        f'axis {name} of {jax.tree_util.keystr(path)}',
        size,
        ' x '.join(split),
        num_parts(mesh, mesh_axes),
        f'change the model or {" or ".join(split)}',
      )
    return NamedSharding(mesh, PartitionSpec(*spec))

  return jax.tree_util.tree_map_with_path(leaf_sharding, shapes, logical_axes)


def _without_repeats(spec: Iterable[Any]) -> list[Any]:
  """Returns the mesh axes of each dimension, each axis once."""
  taken: set[str] = set()
  found: list[Any] = []
  for axes in spec:
    if isinstance(axes, tuple):
      axes = tuple(axis for axis in axes if axis not in taken)
      axes = axes[0] if len(axes) == 1 else axes
    taken.update(axes if isinstance(axes, tuple) else (axes,))
    found.append(axes)
  return found


@contextlib.contextmanager
def applied(mesh: Mesh) -> Iterator[None]:
  """Applies the logical constraints inside models to this mesh."""
  with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
    yield
