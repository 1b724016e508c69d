"""The train step: value_and_grad of an objective, then an optax update.

    state, metrics = train_step(state, batch)

Pure, and written once without collectives. `parallel/` runs it: under `jit`
over a mesh as it stands, under `pmap` with `all_sum` adding across devices.
"""

from collections.abc import Callable
import functools
import math
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import optax

from training import state as state_lib
from training.optimizer import average, spikes

Metrics = dict[str, jax.Array]
# (params, batch, apply) -> (loss summed, sums with 'weight'). Sums are scalars,
# or counts [..., shares] of which evenness is reported.
Objective = Callable[[Any, Any, Callable[..., Any]], tuple[jax.Array, Metrics]]
TrainStep = Callable[
  [state_lib.TrainState, Any], tuple[state_lib.TrainState, Metrics]
]
# Names of parts of the step, in profiles and in training/diagnosis/diagnose.py.
UPDATE, MICROBATCHES = 'optimizer', 'microbatches'


def _identity(tree: Any) -> Any:
  return tree


def make_train_step(
  model: nn.Module,
  objective: Objective,
  optimizer: optax.GradientTransformation,
  *,
  num_microbatches: int = 1,
  ema_decay: float = 0.0,
  all_sum: Callable[[Any], Any] = _identity,
  shard_key: Callable[[jax.Array], jax.Array] = _identity,
) -> TrainStep:
  """Builds the step, to be jitted once with its state donated.

  Args:
    model: the transformer.
    objective: returns sums over its batch, see `training.objectives`.
    optimizer: optax.
    num_microbatches: how many parts the gradient is accumulated over.
    ema_decay: of `state.average`, where there is one.
    all_sum: adds a tree of sums across devices where the caller must (pmap).
    shard_key: gives each device a dropout key of its own (pmap).
  """
  grad_fn = jax.value_and_grad(objective, has_aux=True)

  def gradient_sums(params, batch, key):
    apply = functools.partial(model.apply, rngs={'dropout': key})
    (loss_sum, sums), grads = grad_fn(params, batch, apply)
    return grads, {**sums, 'loss': loss_sum}

  def train_step(state, batch):
    key = shard_key(jax.random.fold_in(state.key, state.step))
    grads, sums = _accumulate(
      gradient_sums, state.params, batch, key, num_microbatches
    )
    grads, sums = all_sum((grads, sums))
    # A batch of nothing but padding is a step of zero gradient, not of NaN.
    weight = jnp.maximum(sums.pop('weight'), 1e-9)
    grads = jax.tree.map(lambda g: g / weight, grads)
    with jax.named_scope(UPDATE):
      updates, opt_state = optimizer.update(
        grads, state.opt_state, state.params
      )
      params = optax.apply_updates(state.params, updates)
    skipped = spikes.was_skipped(opt_state)
    new_state = state.replace(
      step=state.step + 1,
      params=params,
      opt_state=opt_state,
      average=average.update(
        state.average,
        params,
        num_updates=state.step,
        decay=ema_decay,
        skipped=skipped,
      ),
    )
    metrics = _reported(sums, weight)
    metrics['weight'] = weight
    metrics['grad_norm'] = optax.tree.norm(grads)
    # Where a finite gradient leaves weights that are not, nothing else tells.
    metrics['param_norm'] = optax.tree.norm(params)
    if skipped is not None:
      metrics['skipped'] = skipped.astype(jnp.float32)
    return new_state, metrics

  return train_step


def make_eval_step(
  model: nn.Module,
  objective: Objective,
  *,
  all_sum: Callable[[Any], Any] = _identity,
) -> Callable[[Any, Any], Metrics]:
  """Builds `eval_step(params, batch) -> sums`: no dropout, nothing updated."""

  def eval_step(params, batch):
    loss_sum, sums = objective(params, batch, model.apply)
    return all_sum({**sums, 'loss': loss_sum})

  return eval_step


def _reported(sums, weight):
  """Divides sums by the weight; of counts tells how even they are."""
  metrics = {}
  for name, value in sums.items():
    if value.ndim:
      metrics |= _evenness(name, value)
    else:
      metrics[name] = value / weight
  return metrics


def _evenness(name, counts_NE):
  """Returns three figures of how evenly each row of counts is spread.

  The largest and the smallest count of any layer, in multiples of an even
  share (1 and 1 is even, E and 0 the other extreme), and the mean over layers
  of the entropy over that of even shares (1 is even, 0 the other extreme).
  """
  num_shares = counts_NE.shape[-1]
  total_N1 = jnp.sum(counts_NE, axis=-1, keepdims=True)
  share_NE = counts_NE / jnp.maximum(total_N1, 1e-9)
  entropy_N = jnp.sum(jax.scipy.special.entr(share_NE), axis=-1)
  return {
    f'{name}_max': jnp.max(share_NE) * num_shares,
    f'{name}_min': jnp.min(share_NE) * num_shares,
    f'{name}_entropy': jnp.mean(entropy_N) / math.log(num_shares),
  }


def _accumulate(gradient_sums, params, batch, key, num_microbatches):
  """Adds up gradients and sums over equal parts of the batch.

  Rows are dealt out one by one: where the batch axis is laid out over devices,
  each of them keeps its own rows and nothing is moved.
  """
  if num_microbatches == 1:
    return gradient_sums(params, batch, key)
  parts = jax.tree.map(
    lambda x: x.reshape(
      (x.shape[0] // num_microbatches, num_microbatches, *x.shape[1:])
    ).swapaxes(0, 1),
    batch,
  )
  zeros = jax.tree.map(
    lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
    jax.eval_shape(
      gradient_sums, params, jax.tree.map(lambda x: x[0], parts), key
    ),
  )

  def add_part(total, indexed_part):
    index, part = indexed_part
    part_key = jax.random.fold_in(key, index)
    new = gradient_sums(params, part, part_key)
    return jax.tree.map(jnp.add, total, new), None

  with jax.named_scope(MICROBATCHES):
    total, _ = jax.lax.scan(
      add_part, zeros, (jnp.arange(num_microbatches), parts)
    )
  return total
