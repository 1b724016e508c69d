"""Which parameters an optimizer treats alike. Decided by name, never by shape.

With scanned layers a norm's scale is a matrix [N, D] and a matrix is a stack
[N, in, out]: the number of axes says nothing of what a parameter is.
"""

from collections.abc import Sequence
import re
from typing import Any

import jax
import optax

from models import axes

DECAY_MASKS = ('matrices', 'no_embeddings', 'all')
LrMultipliers = tuple[tuple[str, float], ...]

# Matrices of which there are several, one per index of these leading axes.
_STACKS = (axes.LAYERS, 'experts')
# Rows of these are looked up, or are one class each: none is a linear map.
_TABLES = ('vocab', 'position')


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
  """Returns the multiplier of each parameter: of all that match, the product.

  Args:
    pairs: regular expressions, searched for in names such as
      `layers/attention/query/kernel` and `embed/embedding`, and multipliers.
    params: the model's variables, arrays or shapes.

  Raises:
    ValueError: an expression matches nothing, or nothing is left to train.
  """
  names = [
    _name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)
  ]
  for pattern, _ in pairs:
    if not any(re.search(pattern, name) for name in names):
      # Layers that are apart differ by a number: one of them says it.
      known = {re.sub(r'^layer_\d+', 'layer_0', name) for name in names}
      raise ValueError(
        f'optimizer.lr_multipliers: got {pattern!r}, which matches no'
        f' parameter, expected part of one of {", ".join(sorted(known))}'
      )

  def multiplier(path, _):
    product = 1.0
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


def is_decayed(mask: str, params: Any) -> Any:
  """Marks the parameters that weight decay applies to.

  Args:
    mask: matrices, tables of embeddings and the head among them; no_embeddings,
      the matrices but for those; or all, with scales of norms and biases.
    params: the model's variables, arrays or shapes.
  """
  kinds = ('kernel', 'embedding') if mask == 'matrices' else ('kernel',)
  return jax.tree_util.tree_map_with_path(
    lambda path, _: mask == 'all' or axes.names(path)[-1] in kinds, params
  )


def is_hidden_matrix(params: Any) -> Any:
  """Marks linear maps from one vector of the model to another.

  Those of attention, feed-forward blocks and experts. Not embeddings and head,
  whose rows are tokens; not a router, whose columns are experts.
  """
  return _by_own_axes(
    lambda own: (
      len(own) == 2 and None not in own and not set(own) & set(_TABLES)
    ),
    params,
  )


def own_ndims(params: Any) -> Any:
  """Returns how many axes each parameter has besides layers and experts."""
  return _by_own_axes(len, params)


def is_stacked(params: Any) -> Any:
  """Marks what has the stack of layers as its first axis."""
  return _by_axes(lambda names: names[0] == axes.LAYERS, params)


def _by_own_axes(fn, params):
  return _by_axes(
    lambda names: fn(tuple(name for name in names if name not in _STACKS)),
    params,
  )


def _by_axes(fn, params):
  return jax.tree.map(fn, axes.param_axes(params), is_leaf=_is_axes)


def _is_axes(node) -> bool:
  # The placeholder of what is not selected is a tuple, too.
  return isinstance(node, tuple) and not isinstance(node, optax.MaskedNode)


def selected(is_selected: Any, tree: Any) -> Any:
  """Replaces what is not selected by optax's placeholder, which is no leaf."""
  return jax.tree.map(
    lambda keep, leaf: leaf if keep else optax.MaskedNode(), is_selected, tree
  )
