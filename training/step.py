"""The train step: value_and_grad of an objective, then an optax update.

    state, metrics = train_step(state, batch)

Pure, and written once without collectives. `parallel/` runs it: under `jit`
over a mesh as it is, under `pmap` with `all_sum` adding across devices.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from models import transformer
from models.moe import layer as moe_layer
from training import state as state_lib
from training.objectives import port
from training.optimizer import average, param_groups, spikes

Metrics = dict[str, jax.Array]
# An instance of `port.Objective`, or a function with the signature of its
# `__call__`.
Objective = Callable[..., tuple[jax.Array, Metrics]]
TrainStep = Callable[
  [state_lib.TrainState, Any], tuple[state_lib.TrainState, Metrics]
]
# (state.params, state.frozen_params) -> the params of an objective
Joined = Callable[[Any, Any], Any]
# Names of parts of the step, in profiles and in training/diagnosis/diagnose.py.
UPDATE, MICROBATCHES = 'optimizer', 'microbatches'


def _identity(tree: Any) -> Any:
  return tree


def _params(params: Any, frozen_params: Any) -> Any:
  del frozen_params
  return params


def make_train_step(
  model: transformer.Transformer,
  objective: Objective,
  optimizer: optax.GradientTransformation,
  *,
  frozen_models: Mapping[str, transformer.Transformer] | None = None,
  joined: Joined = _params,
  num_microbatches: int = 1,
  ema_decay: float = 0.0,
  all_sum: Callable[[Any], Any] = _identity,
  shard_key: Callable[[jax.Array], jax.Array] = _identity,
) -> TrainStep:
  """Builds the step, to be jitted once with its state donated.

  Args:
    objective: returns sums over its batch, see `training.objectives.port`.
    frozen_models: the other models that the objective needs, by name; their
      weights are `state.frozen_params`.
    joined: makes the objective's params from `state.params` and
      `state.frozen_params`: adapters are stored apart from their base.
    ema_decay: decay of `state.average`, if the run keeps one.
    all_sum: adds a tree of sums across devices where the caller must (pmap).
    shard_key: gives each device a dropout key of its own (pmap).
  """

  def train_step(state, batch):
    frozen = _frozen(frozen_models, state.frozen_params)
    is_trained = param_groups.trained_by(optimizer, state.params)
    trained = param_groups.selected(is_trained, state.params)
    asked = _asked(objective, model, frozen)
    before = joined(state.params, state.frozen_params)
    totals = _totals(asked, before, batch, num_microbatches, all_sum)

    def loss(trained, batch, key):
      params = param_groups.replaced(is_trained, trained, state.params)
      params = joined(params, state.frozen_params)
      return objective(
        params, batch, port.Model(model, key), **frozen, **totals
      )

    def gradient_sums(trained, batch, key):
      grad_fn = jax.value_and_grad(loss, has_aux=True)
      (loss_sum, sums), grads = grad_fn(trained, batch, key)
      return grads, {**sums, 'loss': loss_sum}

    key = shard_key(jax.random.fold_in(state.key, state.step))
    grads, sums = _accumulate(
      gradient_sums, trained, batch, key, num_microbatches
    )
    grads, sums = all_sum((grads, sums))
    # A batch of only padding is a step of zero gradient, not of NaN.
    weight = jnp.maximum(sums.pop('weight'), 1e-9)
    grads = jax.tree.map(lambda g: g / weight, grads)
    with jax.named_scope(UPDATE):
      params, opt_state = _update(optimizer, grads, state, is_trained)
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
    # A function in place of an objective derives no figures.
    derived = getattr(objective, 'derived', _identity)
    metrics = dict(derived(_reported(sums, weight)))
    metrics['grad_norm'] = optax.tree.norm(grads)
    metrics['param_norm'] = _norm_of_written(params)
    if skipped is not None:
      metrics['skipped'] = skipped.astype(jnp.float32)
    return new_state, metrics

  return train_step


def make_eval_step(
  model: transformer.Transformer,
  objective: Objective,
  *,
  frozen_models: Mapping[str, transformer.Transformer] | None = None,
  joined: Joined = _params,
  all_sum: Callable[[Any], Any] = _identity,
) -> Callable[..., Metrics]:
  """Builds `eval_step(params, batch, frozen_params=None) -> sums`.

  Runs without dropout and updates nothing. For the arguments, see
  `make_train_step`; `frozen_params` belong to a state.
  """

  def eval_step(params, batch, frozen_params=None):
    frozen = _frozen(frozen_models, frozen_params)
    params = joined(params, frozen_params)
    asked = _asked(objective, model, frozen)
    totals = _totals(asked, params, batch, 1, all_sum)
    loss_sum, sums = objective(
      params, batch, port.Model(model), **frozen, **totals
    )
    return all_sum({**sums, 'loss': loss_sum})

  return eval_step


def make_annotate_step(
  model: transformer.Transformer,
  objective: port.Objective,
  *,
  num_places: int,
  frozen_models: Mapping[str, transformer.Transformer] | None = None,
  joined: Joined = _params,
  num_microbatches: int = 1,
  all_sum: Callable[[Any], Any] = _identity,
) -> Callable[..., dict[str, jax.Array]]:
  """Builds `annotate_step(params, batch, frozen_params=None)`.

  For the arguments, see `make_train_step`. The batch is cut into the parts of
  the train step, so that both compute a row with the same other rows.

  Args:
    num_places: B x T of the whole batch.

  Returns:
    A function of a batch with one more array, `places`, int32 [B, T]: the
    numbers 0..B x T - 1 in any order. It returns the arrays of
    `objective.annotated`, float32 [B x T] by place.
  """

  def annotate_step(params, batch, frozen_params=None):
    frozen = _frozen(frozen_models, frozen_params)

    def by_place(params, part, _):
      arrays = {name: x for name, x in part.items() if name != 'places'}
      found = objective.annotate(
        joined(params, frozen_params), arrays, port.Model(model), **frozen
      )
      # Each device and each part has its own rows, and time may be laid out in
      # any order. The sum by place is the whole result.
      return {
        name: jnp.zeros(num_places, jnp.float32)
        .at[part['places'].reshape(-1)]
        .set(found[name].reshape(-1))
        for name in objective.annotated
      }

    # No part draws random numbers; `_accumulate` needs a key all the same.
    key = jax.random.key(0)
    return all_sum(_accumulate(by_place, params, batch, key, num_microbatches))

  return annotate_step


def _frozen(models, params) -> dict[str, port.FrozenModel]:
  """Joins frozen models to their weights, through which no gradient goes."""
  return {
    name: port.FrozenModel(
      port.Model(model), jax.lax.stop_gradient(params[name])
    )
    for name, model in (models or {}).items()
  }


def _update(optimizer, grads, state, is_trained):
  """Returns the new params and the optimizer's new state."""
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  trained, updates = (
    param_groups.selected(is_trained, tree) for tree in (state.params, updates)
  )
  params = param_groups.replaced(
    is_trained, optax.apply_updates(trained, updates), state.params
  )
  return params, opt_state


def _asked(objective, model, frozen):
  """Returns the objective's `totals` as a function of (params, batch)."""
  # A function in place of an objective has no totals.
  totals = getattr(objective, 'totals', lambda *_, **__: None)
  return lambda params, batch: totals(
    params, batch, port.Model(model), **frozen
  )


def _totals(asked, params, batch, num_microbatches, all_sum):
  """Returns the argument `totals` of an objective; nothing without totals.

  The totals are known before the loss of any part, so that the loss of a part
  does not depend on the rows that happen to be in it.
  """
  if jax.eval_shape(asked, params, batch) is None:
    return {}
  # No part draws random numbers; `_accumulate` needs a key all the same.
  found = _accumulate(
    lambda params, part, _: asked(params, part),
    params,
    batch,
    jax.random.key(0),
    num_microbatches,
  )
  return {'totals': all_sum(found)}


def _reported(sums, weight):
  """Divides sums by their weights; adds the evenness of arrays of counts."""
  metrics = {'weight': weight}
  for name, value in sums.items():
    if name == 'tokens':
      metrics[name] = value
    elif isinstance(value, port.Mean):
      metrics[name] = value.total / jnp.maximum(value.weight, 1e-9)
    elif value.ndim:
      for figure, how_even in moe_layer.load_evenness(value).items():
        metrics[f'{name}_{figure}'] = how_even
    else:
      metrics[name] = value / weight
  return metrics


def _norm_of_written(params):
  """Returns the norm of the new weights."""
  # A finite gradient may leave non-finite weights, and no other metric tells.
  # The barrier makes the sum read the new weights: fused with the update, it
  # would read gradients and moments once more.
  return optax.tree.norm(jax.lax.optimization_barrier(params))


def _accumulate(sums_of, params, batch, key, num_microbatches):
  """Adds up sums, such as gradients, over equal parts of the batch.

  Rows are dealt out one by one. Where the batch axis is laid out over devices,
  each device keeps its own rows and nothing is moved.
  """
  if num_microbatches == 1:
    return sums_of(params, batch, key)
  parts = jax.tree.map(
    lambda x: x.reshape(
      (x.shape[0] // num_microbatches, num_microbatches, *x.shape[1:])
    ).swapaxes(0, 1),
    batch,
  )
  zeros = jax.tree.map(
    lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
    jax.eval_shape(sums_of, params, jax.tree.map(lambda x: x[0], parts), key),
  )

  def add_part(total, indexed_part):
    index, part = indexed_part
    part_key = jax.random.fold_in(key, index)
    new = sums_of(params, part, part_key)
    return jax.tree.map(jnp.add, total, new), None

  with jax.named_scope(MICROBATCHES):
    total, _ = jax.lax.scan(
      add_part, zeros, (jnp.arange(num_microbatches), parts)
    )
  return total
