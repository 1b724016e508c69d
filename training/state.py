"""TrainState: all arrays of a training run, as one pytree."""

from collections.abc import Callable
import dataclasses
from typing import Any

from flax import linen as nn, struct
import jax
import jax.numpy as jnp
import optax

from models import axes, param_shapes, transformer
from training.objectives import port

MakeHeads = Callable[[jax.Array], Any]


@struct.dataclass
class TrainState:
  """The state that a step takes and returns."""

  step: jax.Array  # int32 scalar: number of steps taken
  # The model's variables at 'params', or its 'adapters' in place of them; and
  # the objective's own parameters, if it has any, at 'heads'; float32.
  params: Any
  opt_state: Any
  key: jax.Array  # typed; never changes: a step's key is fold_in(key, step)
  # Average of params, see training/optimizer/average.py; None: the run keeps
  # none.
  average: Any = None
  # Variables of the objective's frozen models, by name, and of the base of
  # adapters. No step changes them and no checkpoint holds them:
  # training/frozen_inputs/frozen_models.py, training/adapters.py.
  frozen_params: Any = None


def init(
  model: nn.Module,
  optimizer: optax.GradientTransformation,
  key: jax.Array,
  *,
  has_average: bool = False,
  make_heads: MakeHeads | None = None,
) -> TrainState:
  """Returns the state before the first step. Pure: jit or eval_shape it.

  Args:
    has_average: whether the state keeps an average of the parameters.
    make_heads: draws the objective's own parameters from a key.
  """
  init_key, _ = jax.random.split(key)
  params = model.init(init_key, jnp.zeros((1, 1), jnp.int32))
  return init_with(
    optimizer, key, params, has_average=has_average, make_heads=make_heads
  )


def init_with(
  optimizer: optax.GradientTransformation,
  key: jax.Array,
  params: Any,
  *,
  has_average: bool = False,
  make_heads: MakeHeads | None = None,
) -> TrainState:
  """Returns the state before the first step, given the model's variables."""
  _, train_key = jax.random.split(key)
  params = _with_heads(params, key, make_heads)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=optimizer.init(params),
    key=train_key,
    average=params if has_average else None,
  )


def abstract_params(
  model: transformer.Transformer, make_heads: MakeHeads | None = None
) -> Any:
  """Returns the shapes and dtypes of the parameters."""
  return jax.eval_shape(
    lambda key, params: _with_heads(params, key, make_heads),
    jax.random.key(0),
    param_shapes.of(model.config),
  )


def _with_heads(params: Any, key: jax.Array, make_heads: MakeHeads | None):
  # The key of heads is not one of `split`: so a model starts from the same
  # weights with and without heads.
  # A run that begins with a frozen reward model has its head already.
  heads = make_heads(jax.random.fold_in(key, 1)) if make_heads else None
  return params if heads is None else {port.HEADS: heads, **params}


def logical_axes(state: TrainState, param_axes: Any) -> TrainState:
  """Returns the logical axes of every leaf of an (abstract) state.

  Moments and averages of a parameter lie at the parameter's own path inside
  their container (an optimizer's state, possibly inside others), and are laid
  out like the parameter. Counts and the key have no axes. Frozen models have
  the axes of their own names.

  Raises:
    ValueError: the axes of a leaf beside a parameter are ambiguous.
  """
  params = {
    path: (leaf.shape, leaf_axes)
    for (path, leaf), leaf_axes in zip(
      jax.tree_util.tree_leaves_with_path(state.params),
      jax.tree.leaves(param_axes, is_leaf=lambda x: isinstance(x, tuple)),
      strict=True,
    )
  }

  def axes_of(path, leaf):
    for start in range(len(path)):
      if path[start:] in params:
        return _axes_like(path, leaf.shape, *params[path[start:]])
    return (None,) * leaf.ndim

  named = jax.tree_util.tree_map_with_path(
    axes_of, dataclasses.replace(state, frozen_params=None)
  )
  if state.frozen_params is None:
    return named
  frozen = {k: axes.param_axes(v) for k, v in state.frozen_params.items()}
  return dataclasses.replace(named, frozen_params=frozen)


def _axes_like(path, shape, param_shape, axes):
  """Returns the axes of an array that an optimizer keeps for a parameter.

  A moment has the parameter's shape. Adafactor's row and column means leave out
  one axis of a matrix: the larger one and the smaller one, or, if both are
  equal, the last (`v_row`) and the one before (`v_col`). Adafactor has a
  placeholder of size 1 in place of means that it does not keep.
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
