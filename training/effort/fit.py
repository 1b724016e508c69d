"""Fits the predictor of P(correct | question, effort), then calibrates it.

    found = fit(table.split('train'), table.split('calibration'), config)

Life one of a router: the weights of `models/effort_predictor.py` are fitted to
logged outcomes by cross-entropy, all questions in each step. A fifth of the
training questions is held out: the weights of the step with the least held-out
loss are kept. The calibration questions are read only after that, to fit a line
in the logits of each effort.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from checks import expect
from evals.results import recalibration
from models import effort_predictor
from training.effort import outcomes

KINDS = ('platt', 'temperature', 'none')
_STOP_EVERY = 5  # every fifth training question is held out
_RIDGE = 1.0  # strength in the regression of costs, in units of one question


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitConfig:
  """The settings of a fit."""

  num_hidden: int = 16
  num_steps: int = 600
  learning_rate: float = 1e-2
  weight_decay: float = 1e-1  # AdamW's
  calibration: str = 'platt'  # platt | temperature | none
  seed: int = 0

  def __post_init__(self):
    """Raises ValueError, naming the value."""
    expect.at_least('num_hidden', self.num_hidden, 1)
    expect.at_least('num_steps', self.num_steps, 1)
    expect.one_of('calibration', self.calibration, KINDS)
    if not 0 < self.learning_rate < math.inf:
      raise ValueError(
        f'learning_rate: got {self.learning_rate}, expected a positive number'
      )
    expect.at_least('weight_decay', self.weight_decay, 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fitted:
  """A predictor, and how its fit went."""

  params: dict[str, np.ndarray]
  efforts: tuple[str, ...]
  best_step: int
  train_loss: float  # nats per question and effort, at the best step
  stop_loss: float  # the same, on the held-out questions


def fit(
  train: outcomes.Outcomes,
  calibration: outcomes.Outcomes,
  config: FitConfig = FitConfig(),
) -> Fitted:
  """Returns the calibrated predictor.

  Raises:
    ValueError: fewer than ten training questions, or tables that differ in
      their efforts.
  """
  expect.at_least('training questions', len(train), 10, 'log more questions')
  if train.efforts != calibration.efforts:
    raise ValueError(
      f'calibration: got the efforts {calibration.efforts}, expected the'
      f' training efforts {train.efforts}'
    )
  order = np.random.default_rng(config.seed).permutation(len(train))
  stop = train.take(order[::_STOP_EVERY])
  rest = train.take(np.setdiff1d(order, order[::_STOP_EVERY]))
  params = effort_predictor.init(
    jax.random.key(config.seed),
    train.features_BF.shape[1],
    config.num_hidden,
    len(train.efforts),
  )
  spread_F = rest.features_BF.std(axis=0)
  rate_E = np.clip(rest.correct_BE.mean(axis=0), 0.01, 0.99)
  params |= {
    'mean_F': jnp.asarray(rest.features_BF.mean(axis=0), jnp.float32),
    # A feature that never varies has no information; it must not divide by 0.
    'scale_F': jnp.asarray(
      np.where(spread_F > 1e-6, spread_F, 1.0), jnp.float32
    ),
    'outer_E': jnp.asarray(np.log(rate_E / (1 - rate_E)), jnp.float32),
  }
  params, step, losses = _trained(params, rest, stop, config)
  params |= _costs(params, train)
  params |= _calibrated(params, calibration, config.calibration)
  return Fitted(
    params={name: np.asarray(x) for name, x in params.items()},
    efforts=train.efforts,
    best_step=step,
    train_loss=losses[0],
    stop_loss=losses[1],
  )


_LEARNT = ('inner_FH', 'inner_H', 'outer_HE', 'outer_E')


def _trained(
  params: dict[str, Any],
  rest: outcomes.Outcomes,
  stop: outcomes.Outcomes,
  config: FitConfig,
) -> tuple[dict[str, Any], int, tuple[float, float]]:
  """Returns the weights of the best step, the step, and both losses there."""
  fixed = {name: x for name, x in params.items() if name not in _LEARNT}
  learnt = {name: params[name] for name in _LEARNT}
  optimizer = optax.adamw(
    config.learning_rate,
    weight_decay=config.weight_decay,
    mask={name: name in ('inner_FH', 'outer_HE') for name in _LEARNT},
  )

  def loss(learnt, features_BF, correct_BE):
    logits_BE = effort_predictor.raw_logits(fixed | learnt, features_BF)
    return jnp.mean(optax.sigmoid_binary_cross_entropy(logits_BE, correct_BE))

  arrays = [
    jnp.asarray(x, jnp.float32)
    for part in (rest, stop)
    for x in (part.features_BF, part.correct_BE)
  ]

  def one(carry, step):
    learnt, state, best = carry
    value, grads = jax.value_and_grad(loss)(learnt, *arrays[:2])
    held_out = loss(learnt, *arrays[2:])
    is_best = held_out < best[2]
    now = (learnt, value, held_out, step)
    best = jax.tree.map(lambda a, b: jnp.where(is_best, a, b), now, best)
    updates, state = optimizer.update(grads, state, learnt)
    return (optax.apply_updates(learnt, updates), state, best), None

  first = (learnt, jnp.float32(jnp.inf), jnp.float32(jnp.inf), jnp.int32(0))
  (_, _, best), _ = jax.jit(
    lambda carry: jax.lax.scan(one, carry, jnp.arange(config.num_steps))
  )((learnt, optimizer.init(learnt), first))
  found, value, held_out, step = best
  if not np.isfinite(float(held_out)):
    raise ValueError(
      'fit: got a loss that is not finite, expected a number; lower'
      ' learning_rate, or look for very large features'
    )
  return fixed | found, int(step), (float(value), float(held_out))


def _costs(params: dict[str, Any], train: outcomes.Outcomes) -> dict[str, Any]:
  """Returns the ridge regression of the costs, in FLOPs."""
  centred_BF = train.features_BF - np.asarray(params['mean_F'], np.float64)
  scaled_BF = centred_BF / np.asarray(params['scale_F'], np.float64)
  inputs_BF = scaled_BF - scaled_BF.mean(axis=0)
  num_features = inputs_BF.shape[1]
  flops_E = train.flops_BE.mean(axis=0)
  slope_FE = np.linalg.solve(
    inputs_BF.T @ inputs_BF + _RIDGE * np.eye(num_features),
    inputs_BF.T @ (train.flops_BE - flops_E),
  )
  return {
    'cost_FE': jnp.asarray(slope_FE, jnp.float32),
    'cost_E': jnp.asarray(
      flops_E - scaled_BF.mean(axis=0) @ slope_FE, jnp.float32
    ),
    'least_cost_E': jnp.asarray(train.flops_BE.min(axis=0), jnp.float32),
  }


def _calibrated(
  params: dict[str, Any], table: outcomes.Outcomes, kind: str
) -> dict[str, Any]:
  """Returns slope and offset of each effort."""
  if kind == 'none':
    return {}
  raw_BE = np.asarray(
    effort_predictor.raw_logits(
      params, jnp.asarray(table.features_BF, jnp.float32)
    )
  )
  lines = [
    recalibration.fit(
      raw_BE[:, e], table.correct_BE[:, e], has_offset=kind == 'platt'
    )
    for e in range(len(table.efforts))
  ]
  slopes, offsets = zip(*lines, strict=True)
  return {
    'slope_E': jnp.asarray(slopes, jnp.float32),
    'offset_E': jnp.asarray(offsets, jnp.float32),
  }
