"""Averages of the weights along a run, served in place of the last weights.

With a high learning rate the weights move around a point that is better than
any point on their path (Polyak and Juditsky 1992). There are two ways to that
point:

    EMA            `Experiment.ema_decay`: an exponential average, one more copy
                   of the parameters, updated in the train step
    schedule-free  `rules.ScheduleFree`: the optimizer's own average. Gradients
                   are taken at another point than the evaluated point
                   (arXiv:2405.15682)

The average is evaluated beside the raw weights and saved as the checkpoint's
item `average`. It is frozen unless `freeze.weights` says otherwise.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from checks import expect
from frozen import manifest
from training import state as state_lib
from training.optimizer import update_rules


def update(
  average: Any,
  params: Any,
  *,
  num_updates: jax.Array,
  decay: float,
  skipped: jax.Array | None = None,
) -> Any:
  """Returns the average, moved towards the parameters after a step.

  The decay at step t is min(decay, (1 + t) / (10 + t)), as in TensorFlow's
  ExponentialMovingAverage. So the useless weights of the start are forgotten
  soon, and the average needs no bias correction. A run that begins to average
  late starts from its weights at that step, with the same formula.

  Args:
    average: float32, like the parameters; None: the run keeps no average.
    params: the parameters after the step.
    num_updates: t, the number of steps before this one.
    decay: the largest decay, `Experiment.ema_decay`.
    skipped: whether the step was skipped; the average then stays, too.
  """
  if average is None:
    return None
  t = jnp.asarray(num_updates, jnp.float32)
  share = 1 - jnp.minimum(decay, (1 + t) / (10 + t))
  if skipped is not None:
    share = jnp.where(skipped, 0.0, share)
  return jax.tree.map(lambda a, p: a + share * (p - a), average, params)


def reader(
  rule: update_rules.Rule, ema_decay: float
) -> Callable[[state_lib.TrainState], Any] | None:
  """Returns a function from a state to its averaged weights.

  None if the run keeps no average. The function is pure and goes through jit
  and pmap.
  """
  if ema_decay:
    return lambda state: state.average
  if rule.keeps_average:
    return lambda state: rule.average(state.opt_state, state.params)
  return None


def validate(rule: update_rules.Rule, ema_decay: float, weights: str) -> None:
  """Refuses a missing average, and two averages.

  Args:
    rule: rule of the optimizer.
    ema_decay: `Experiment.ema_decay`.
    weights: `FreezeConfig.weights`.

  Raises:
    ValueError: names the field.
  """
  if not 0 <= ema_decay < 1:
    raise ValueError(
      f'config.ema_decay: got {ema_decay}, expected 0 <= ema_decay < 1; 0 keeps'
      ' no average'
    )
  update_rules.require_not_too_slow('config.ema_decay', ema_decay)
  if ema_decay and rule.keeps_average:
    raise ValueError(
      f'config.ema_decay: got {ema_decay} with rule {type(rule).__name__},'
      ' expected 0: that optimizer keeps an average of its own'
    )
  expect.one_of('freeze.weights', weights, manifest.WEIGHTS)
  if weights == 'average' and not (ema_decay or rule.keeps_average):
    raise ValueError(
      'freeze.weights: got average of a run that keeps none, expected auto or'
      ' raw; set config.ema_decay to keep one'
    )
