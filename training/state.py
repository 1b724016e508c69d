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


def init(
  model: nn.Module, optimizer: optax.GradientTransformation, key: jax.Array
) -> TrainState:
  """Returns the state before the first step. Pure: jit or eval_shape it."""
  init_key, train_key = jax.random.split(key)
  params = model.init(init_key, jnp.zeros((1, 1), jnp.int32))
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=optimizer.init(params),
    key=train_key,
  )


def logical_axes(
  state: TrainState, optimizer: optax.GradientTransformation, param_axes: Any
) -> TrainState:
  """Names the logical axes of every leaf of an (abstract) state.

  The optimizer's moments are laid out as the parameters they belong to; what
  is neither (counts, the key) has no axes.
  """
  unnamed = jax.tree.map(lambda leaf: (None,) * leaf.ndim, state)
  opt_axes = optax.tree_utils.tree_map_params(
    optimizer,
    lambda _, axes: axes,
    state.opt_state,
    param_axes,
    transform_non_params=lambda leaf: (None,) * leaf.ndim,
    is_leaf=lambda x: isinstance(x, tuple) and not hasattr(x, '_fields'),
  )
  return unnamed.replace(params=param_axes, opt_state=opt_axes)
