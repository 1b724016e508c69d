"""Optax transformations of single matrices, applied to stacks of matrices.

Scanned layers and experts are stacked: [N, in, out], [N, E, in, out]. Muon's
orthogonalisation, and Adafactor's row and column means and root mean squares,
look at a leaf as one matrix. Here such a transformation is mapped over the axes
before the matrix's own. The stacking axes are not reshaped into one: that would
gather a stack that is split over devices along them.

Stacked layers may also be processed one after the other. A product of matrices
needs them whole, and so only one layer at a time is gathered, not all.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import optax

# State fields that exist once for all parameters. All other fields are trees
# like the parameters.
_SHARED = ('count', 'ns_coeffs')


def per_matrix(
  inner: optax.GradientTransformation, own_ndims: Any, in_turn: Any = None
) -> optax.GradientTransformation:
  """Returns `inner` mapped over all axes of a leaf but its last few.

  Args:
    inner: its state is a named tuple of trees like the parameters, and of the
      fields in `_SHARED`.
    own_ndims: per parameter, the number of its own axes, the last ones: 2 for a
      matrix, 1 for a vector. The axes before may be reshaped between steps, as
      a circular pipeline does.
    in_turn: per parameter, whether the entries of its first axis are processed
      one after the other. None: no parameter's.
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
  """Returns `update` mapped over the first axis, as a loop.

  It computes the same as `jax.vmap`, except that shared fields are not mapped.
  """

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
  """Returns the mapped axis of each field of a state, or None."""
  return type(state)(
    *(None if field in _SHARED else 0 for field in state._fields)
  )


def _split(state: Any, num_leaves: int) -> Iterator[Any]:
  """Yields the state of one parameter after the other."""
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
