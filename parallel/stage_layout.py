"""The layout of the layer stack in a circular pipeline.

Stage s of S runs the groups of L layers s, S + s, 2 S + s, ...: one group for
each of the R times that a row passes the stage. These groups are not one slice
of the stack [N, ...], but one slice per repeat of the stack folded to
[R, N / R, ...]. A checkpoint always has [N, ...], in either layout.
"""

import dataclasses
from typing import Any

import jax

_LAYERS = 'layers'


@dataclasses.dataclass(frozen=True)
class Fold:
  """A reshape of all leaves whose first logical axis is the stack of layers."""

  whole_axes: Any  # a tuple of logical axis names per leaf
  repeats: int  # R

  @property
  def is_identity(self) -> bool:
    return self.repeats == 1

  @property
  def logical_axes(self) -> Any:
    """The logical axes of a folded tree; repeats are not split."""
    if self.is_identity:
      return self.whole_axes
    return jax.tree.map(
      lambda axes: (None, *axes) if _is_stacked(axes) else axes,
      self.whole_axes,
      is_leaf=_is_axes,
    )

  def fold(self, tree: Any) -> Any:
    """Returns the tree with stacks [N, ...] reshaped to [R, N / R, ...]."""
    return self._reshape(
      tree, lambda x: x.reshape((self.repeats, -1, *x.shape[1:]))
    )

  def unfold(self, tree: Any) -> Any:
    """Returns the tree with stacks [R, N / R, ...] reshaped to [N, ...]."""
    return self._reshape(tree, lambda x: x.reshape((-1, *x.shape[2:])))

  def _reshape(self, tree, reshape):
    if self.is_identity:
      return tree
    return jax.tree.map(
      lambda axes, x: reshape(x) if _is_stacked(axes) else x,
      self.whole_axes,
      tree,
      is_leaf=_is_axes,
    )


def _is_axes(node: Any) -> bool:
  return isinstance(node, tuple) and all(
    name is None or isinstance(name, str) for name in node
  )


def _is_stacked(axes: tuple[str | None, ...]) -> bool:
  return bool(axes) and axes[0] == _LAYERS
