"""How the stack of layers is held by a circular pipeline.

Stage s of S runs layers s, S + s, 2S + s, ... (in groups of L): not one piece
of the stack [N, ...], but one piece of [R, N / R, ...] for each of the R times
that a row passes it. A checkpoint always has [N, ...], whatever wrote it.
"""

import dataclasses
from typing import Any

import jax

_LAYERS = 'layers'


@dataclasses.dataclass(frozen=True)
class Fold:
  """Reshapes every leaf whose first logical axis is the stack of layers."""

  whole_axes: Any  # a tuple of logical axis names per leaf
  repeats: int  # R

  @property
  def is_identity(self) -> bool:
    return self.repeats == 1

  @property
  def logical_axes(self) -> Any:
    """The logical axes of a folded tree."""
    if self.is_identity:
      return self.whole_axes
    return jax.tree.map(
      lambda axes: (None, *axes) if _is_stacked(axes) else axes,
      self.whole_axes,
      is_leaf=_is_axes,
    )

  def fold(self, tree: Any) -> Any:
    """[N, ...] to [R, N / R, ...]; raises ValueError if R does not divide N."""
    return self._reshape(
      tree, lambda x: x.reshape((self.repeats, -1, *x.shape[1:]))
    )

  def unfold(self, tree: Any) -> Any:
    """The inverse of `fold`."""
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
