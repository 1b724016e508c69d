"""Groups of parameters that an optimizer treats alike.

The name of a parameter decides its group, never its shape. With scanned
layers, the scale of a norm is [N, D] and a matrix is [N, in, out], so the
number of axes does not say whether a parameter is a matrix.
"""

from collections.abc import Sequence
import re
from typing import Any

import jax
import optax

from models import axes

DECAY_MASKS = ('matrices', 'no_embeddings', 'all')
LrMultipliers = tuple[tuple[str, float], ...]

# Leading axes along which matrices are stacked: one matrix per index.
_STACKS = (axes.LAYERS, 'experts')
# Axes of tables. Rows of a table are looked up, or are classes; a table is not
# a linear map between vectors of the model.
_TABLES = ('vocab', 'position')
# Owners of parameters that are state of the model: they receive no gradient.
_STATES = ('router_correction',)


class PartialOptimizer(optax.GradientTransformationExtraArgs):
  """An optimizer that says which parameters it trains."""

  is_trained: Any  # a bool per parameter; the others are frozen

  def __new__(
    cls, inner: optax.GradientTransformation, is_trained: Any
  ) -> 'PartialOptimizer':
    inner = optax.with_extra_args_support(inner)
    self = super().__new__(cls, inner.init, inner.update)
    self.is_trained = is_trained
    return self


def trained_by(optimizer: optax.GradientTransformation, params: Any) -> Any:
  """Marks the parameters that an optimizer trains: all, if it says nothing."""
  if isinstance(optimizer, PartialOptimizer):
    return optimizer.is_trained
  return jax.tree.map(lambda _: True, params)


def check_lr_multipliers(pairs: LrMultipliers) -> None:
  """Raises ValueError unless they are pairs of a regex and a number >= 0."""
  for pair in pairs:
    is_pair = isinstance(pair, Sequence) and not isinstance(pair, str)
    if not is_pair or len(pair) != 2 or not _is_multiplier(*pair):
      raise ValueError(
        f'optimizer.lr_multipliers: got {pair!r} in {pairs!r}, expected pairs'
        " (regular expression, number >= 0); write (('embed', 0.5),)"
      )


def _is_multiplier(pattern: Any, value: Any) -> bool:
  try:
    re.compile(pattern)
    return 0 <= float(value) < float('inf')
  except (TypeError, ValueError, re.error):
    return False


def lr_multipliers(pairs: LrMultipliers, params: Any) -> Any:
  """Returns the multiplier of each parameter.

  If several expressions match a parameter, their multipliers are multiplied.
  Parameters that no gradient reaches have the multiplier 0.

  Args:
    pairs: regular expressions, searched for in names such as
      `layers/attention/query/kernel` and `embed/embedding`, and multipliers.
    params: the model's variables, arrays or shapes.

  Raises:
    ValueError: an expression matches no parameter, or all parameters would be
      frozen.
  """
  names = [
    _name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)
  ]
  for pattern, _ in pairs:
    if not any(re.search(pattern, name) for name in names):
      # Unrolled layers differ by their number only: the error lists one.
      known = {re.sub(r'^layer_\d+', 'layer_0', name) for name in names}
      raise ValueError(
        f'optimizer.lr_multipliers: got {pattern!r}, which matches no'
        f' parameter, expected part of one of {", ".join(sorted(known))}'
      )

  def multiplier(path, _):
    product = 0.0 if _is_state(path) else 1.0
    for pattern, value in pairs:
      if re.search(pattern, _name(path)):
        product *= value
    return product

  found = jax.tree_util.tree_map_with_path(multiplier, params)
  if not any(jax.tree.leaves(found)):
    raise ValueError(
      f'optimizer.lr_multipliers: got {pairs!r}, which freezes every parameter,'
      ' expected one that learns; take out a multiplier of 0'
    )
  return found


def _name(path: tuple[Any, ...]) -> str:
  return '/'.join(axes.names(path)).removeprefix('params/')


def _is_state(path: tuple[Any, ...]) -> bool:
  return axes.names(path)[-2] in _STATES


def is_decayed(mask: str, params: Any) -> Any:
  """Marks the parameters that weight decay applies to.

  Args:
    mask: `matrices`: all matrices, including the tables of embeddings and the
      head; `no_embeddings`: all matrices except these; `all`: scales of norms
      and biases too, but not the state that no gradient reaches.
    params: the model's variables, arrays or shapes.
  """
  kinds = ('kernel', 'embedding') if mask == 'matrices' else ('kernel',)

  def is_in_mask(path, _):
    if mask == 'all':
      return not _is_state(path)
    names = axes.names(path)
    # The matrices of an adapter are named a and b.
    is_adapter = names[0] == axes.ADAPTERS and names[-1] in ('a', 'b')
    return is_adapter or names[-1] in kinds

  return jax.tree_util.tree_map_with_path(is_in_mask, params)


def is_hidden_matrix(params: Any) -> Any:
  """Marks the matrices that map one vector of the model to another.

  They are the matrices of attention, feed-forward layers and experts. Excluded
  are embeddings and head, whose rows are tokens, and routers, whose columns are
  experts.
  """
  return _by_own_axes(
    lambda own: (
      len(own) == 2 and None not in own and not set(own) & set(_TABLES)
    ),
    params,
  )


def own_ndims(params: Any) -> Any:
  """Returns each parameter's number of axes without layers and experts."""
  return _by_own_axes(len, params)


def is_stacked(params: Any) -> Any:
  """Marks the parameters whose first axis is the stack of layers."""
  return _by_axes(lambda names: names[0] == axes.LAYERS, params)


def _by_own_axes(fn, params):
  return _by_axes(
    lambda names: fn(tuple(name for name in names if name not in _STACKS)),
    params,
  )


def _by_axes(fn, params):
  return jax.tree.map(fn, axes.param_axes(params), is_leaf=_is_axes)


def _is_axes(node) -> bool:
  # The placeholder of a parameter that is not selected is a tuple, too.
  return isinstance(node, tuple) and not isinstance(node, optax.MaskedNode)


def selected(is_selected: Any, tree: Any) -> Any:
  """Returns the tree with optax's placeholder for leaves not selected.

  The placeholder is not a leaf: `jax.tree.map` passes over it.
  """
  return jax.tree.map(
    lambda keep, leaf: leaf if keep else optax.MaskedNode(), is_selected, tree
  )


def replaced(is_selected: Any, new: Any, old: Any) -> Any:
  """Returns the tree `old` with the leaves of `new` where they are selected."""
  return jax.tree.map(
    lambda keep, new, old: new if keep else old, is_selected, new, old
  )
