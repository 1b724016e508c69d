"""TrainState: all that training changes, as one pytree."""

from typing import Any

from flax import linen as nn, struct
import jax
import jax.numpy as jnp
import optax


@struct.dataclass
class TrainState:
  """What a step takes and returns. The key itself never changes."""

  step: jax.Array  # int32 scalar: how many steps were taken
  params: Any  # the model's variables, float32
  opt_state: Any
  key: jax.Array  # typed; the step's key is fold_in(key, step)
  average: Any = (
    None  # of params, see training/optimizer/average.py; None: not kept
  )


def init(
  model: nn.Module,
  optimizer: optax.GradientTransformation,
  key: jax.Array,
  *,
  has_average: bool = False,
) -> TrainState:
  """Returns the state before the first step. Pure: jit or eval_shape it."""
  init_key, _ = jax.random.split(key)
  params = model.init(init_key, jnp.zeros((1, 1), jnp.int32))
  return init_with(optimizer, key, params, has_average=has_average)


def init_with(
  optimizer: optax.GradientTransformation,
  key: jax.Array,
  params: Any,
  *,
  has_average: bool = False,
) -> TrainState:
  """Returns the state before the first step of training on from `params`."""
  _, train_key = jax.random.split(key)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=optimizer.init(params),
    key=train_key,
    average=params if has_average else None,
  )


def abstract_params(model: nn.Module) -> Any:
  """Returns the shapes and dtypes of a model's variables."""
  return jax.eval_shape(
    lambda key: model.init(key, jnp.zeros((1, 1), jnp.int32)), jax.random.key(0)
  )


def logical_axes(state: TrainState, param_axes: Any) -> TrainState:
  """Names the logical axes of every leaf of an (abstract) state.

  What belongs to a parameter lies at that parameter's path inside whatever
  holds it (an optimizer's state inside others, an average), and is laid out as
  the parameter is. What is neither (counts, the key) has no axes.

  Args:
    state: arrays or shapes.
    param_axes: `models.axes.param_axes` of its parameters.

  Raises:
    ValueError: of a parameter's state the axes cannot be told.
  """
  params = {
    path: (leaf.shape, axes)
    for (path, leaf), axes in zip(
      jax.tree_util.tree_leaves_with_path(state.params),
      jax.tree.leaves(param_axes, is_leaf=lambda x: isinstance(x, tuple)),
      strict=True,
    )
  }

  def leaf_axes(path, leaf):
    for start in range(len(path)):
      if path[start:] in params:
        return _axes_like(path, leaf.shape, *params[path[start:]])
    return (None,) * leaf.ndim

  return jax.tree_util.tree_map_with_path(leaf_axes, state)


def _axes_like(path, shape, param_shape, axes):
  """Returns the axes of what an optimizer keeps of a parameter.

  Besides moments those are the row and column means of Adafactor, which leave
  out the larger and the smaller one of a matrix's axes, or of equal ones the
  last (`v_row`) and the one before (`v_col`); and the placeholder, of size 1,
  that stands where there are none.
  """
  if shape == param_shape:
    return axes
  if shape == (*param_shape[: len(shape) - 1], 1):
    return (*axes[: len(shape) - 1], None)
  last_first = (-1, -2) if _is_rows(path) else (-2, -1)
  for axis in last_first:
    if shape == _without(param_shape, axis):
      return _without(axes, axis)
  raise ValueError(
    f'optimizer state {jax.tree_util.keystr(path)}: got shape {shape} for a'
    f' parameter of {param_shape}, expected its own, or that without one of its'
    ' last two axes; name its axes in training/state.py'
  )


def _is_rows(path) -> bool:
  return any(getattr(key, 'name', None) == 'v_row' for key in path)


def _without(items, axis):
  axis += len(items)
  return (*items[:axis], *items[axis + 1 :])
