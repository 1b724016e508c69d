"""Applies an optax transformation to every matrix of a stack by itself.

Layers that are scanned over, and experts, lie stacked: [N, in, out],
[N, E, in, out]. What looks at a leaf as a whole (Muon's orthogonalisation,
Adafactor's row and column means and its root mean squares) would take the stack
for one matrix; here it is mapped over the axes before the matrix's own. They
stay apart, where reshaping them into one would gather a stack that is split
over devices along them.

Layers may be gone through one after the other: what multiplies matrices needs
them whole, and then one layer at a time is gathered instead of all of them.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import optax

# What a state has once for all parameters; its other fields are trees of them.
_SHARED = ('count', 'ns_coeffs')


def per_matrix(
  inner: optax.GradientTransformation, own_ndims: Any, in_turn: Any = None
) -> optax.GradientTransformation:
  """Returns `inner` mapped over all axes of a leaf but its last few.

  Args:
    inner: with a state that is a named tuple of trees like the parameters, and
      of `count` and the like.
    own_ndims: per parameter, how many of its last axes are its own: 2 of a
      matrix, 1 of a vector. The others may be reshaped between steps, as a
      circular pipeline does.
    in_turn: per parameter, whether the entries of its first axis are taken one
      after the other; None: of none.
  """
  ndims = jax.tree.leaves(own_ndims)
  turns = [False] * len(ndims) if in_turn is None else jax.tree.leaves(in_turn)

  def init(params):
    leaves, treedef = jax.tree.flatten(params)
    states = []
    for leaf, ndim in zip(leaves, ndims, strict=True):
      axes = _mapped(jax.eval_shape(inner.init, leaf))
      states.append(_over(inner.init, leaf.ndim - ndim, 0, axes)(leaf))
    return _joined(states, treedef)

  def update(updates, state, params=None):
    leaves, treedef = jax.tree.flatten(updates)
    axes = _mapped(state)
    new_updates, states = [], []
    for leaf, ndim, turn, own_state, param in zip(
      leaves,
      ndims,
      turns,
      _split(state, len(leaves)),
      jax.tree.leaves(params),
      strict=True,
    ):
      num_axes = leaf.ndim - ndim - turn
      mapped = _over(inner.update, num_axes, (0, axes, 0), (0, axes))
      mapped = _in_turn(mapped) if turn else mapped
      new_update, new_state = mapped(leaf, own_state, param)
      new_updates.append(new_update)
      states.append(new_state)
    return treedef.unflatten(new_updates), _joined(states, treedef)

  return optax.GradientTransformation(init, update)


def _over(fn: Callable, num_axes: int, in_axes: Any, out_axes: Any) -> Callable:
  for _ in range(num_axes):
    fn = jax.vmap(fn, in_axes=in_axes, out_axes=out_axes)
  return fn


def _in_turn(update: Callable) -> Callable:
  """As `jax.vmap` over the first axis of all but what is shared, in a loop."""

  def mapped(leaf, state, param):
    shared = {f: getattr(state, f) for f in state._fields if f in _SHARED}

    def one(own):
      own_leaf, own_state, own_param = own
      return update(own_leaf, own_state._replace(**shared), own_param)

    own = leaf, state._replace(**dict.fromkeys(shared)), param
    updates, states = jax.lax.map(one, own)
    first = {field: getattr(states, field)[0] for field in shared}
    return updates, states._replace(**first)

  return mapped


def _mapped(state: Any) -> Any:
  """Returns, per field of a state, the axis it is mapped over, or None."""
  return type(state)(
    *(None if field in _SHARED else 0 for field in state._fields)
  )


def _split(state: Any, num_leaves: int) -> Iterator[Any]:
  """Yields the state of each parameter alone."""
  fields = [
    [getattr(state, field)] * num_leaves
    if field in _SHARED
    else jax.tree.leaves(getattr(state, field))
    for field in state._fields
  ]
  for i in range(num_leaves):
    yield type(state)(*(leaves[i] for leaves in fields))


def _joined(states: list[Any], treedef: Any) -> Any:
  """The inverse of `_split`."""
  first = states[0]
  return type(first)(
    *(
      getattr(first, field)
      if field in _SHARED
      else treedef.unflatten([getattr(state, field) for state in states])
      for field in first._fields
    )
  )
