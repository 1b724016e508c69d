"""Spikes: skips steps whose gradient norm is far above recent norms.

    optimizer = spikes.skipping(SpikeConfig(skip_std=6.0), optimizer)

A few batches give a gradient many times as long as usual. One step along such a
gradient can cost a run the progress of hundreds of steps. PaLM restarted from
an older checkpoint and left out the batches around the spike (arXiv:2204.02311,
section 5.1). OLMo 2 (arXiv:2501.00656) judges each step before it is taken, and
skips it if its norm lies 6 standard deviations above the mean of the last 128
steps. This file does the same, with two changes. Mean and deviation are taken
of the norm's logarithm, because norms differ by factors. Both are running
averages: two numbers instead of a window.

A skipped step leaves the parameters and the optimizer's moments as they were.
The learning rate and all other schedules stay functions of the step, and the
data moves on to the next batch. Frozen parameters count in no norm.

A non-finite gradient is never skipped. An overflow comes from the weights, not
from the batch, so the next step would overflow too.
`training/diagnosis/diagnose.py` explains such steps.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from checks import expect
from training.optimizer import param_groups

# Least standard deviation of the log norm. If gradients hardly differ (tiny
# data, huge batches), 6 deviations of less than this would skip a gradient that
# is only 30 % longer.
_LEAST_STD = 0.05
# Counts of steps that schedules read, by the states that hold them. All other
# counts are numbers of gradients in a moment, as for Adam's bias correction.
_SCHEDULE_COUNTS = {
  optax.ScaleByScheduleState: 'count',
  contrib.ScaleByAdemamixState: 'count_m2',
  contrib.ScheduleFreeState: 'step_count',
}


@dataclasses.dataclass(kw_only=True)
class SpikeConfig:
  """The settings that decide which steps are skipped."""

  # A step is skipped if its log gradient norm lies more than this many standard
  # deviations above the mean. 0 skips no step; OLMo 2 takes 6.
  skip_std: float = 0.0
  # Steps that the running averages remember; they decay by 1 / window per step.
  window_steps: int = 128
  min_steps: int = 64  # steps to measure before the first step may be skipped
  # Most steps skipped in a row. The next step is taken in any case, and
  # measuring starts anew: the gradients have become longer for good.
  max_skipped: int = 8

  def validate(self) -> None:
    """Raises ValueError for values no run can use."""
    if not 0 <= self.skip_std < math.inf:
      raise ValueError(
        f'spikes.skip_std: got {self.skip_std}, expected a number >= 0:'
        ' standard deviations, or 0 to skip nothing'
      )
    for name, least in (
      ('window_steps', 2),
      ('min_steps', 2),
      ('max_skipped', 1),
    ):
      expect.at_least(f'spikes.{name}', getattr(self, name), least)


class OutlierState(NamedTuple):
  """The optimizer's state, and statistics of recent gradient norms."""

  inner: Any
  num_measured: jax.Array  # int32: steps in mean and variance
  mean: jax.Array  # mean of the log norms of taken steps
  variance: jax.Array  # variance of the same log norms
  num_in_row: jax.Array  # int32: steps skipped since the last taken step


def skipping(
  config: SpikeConfig, optimizer: optax.GradientTransformation
) -> optax.GradientTransformation:
  """Returns the optimizer with outliers skipped.

  Args:
    config: defines an outlier. With `skip_std` 0, the optimizer is returned
      unchanged.
    optimizer: takes all other steps. Its update is computed in any case.
  """
  if not config.skip_std:
    return optimizer
  given = optimizer
  optimizer = optax.with_extra_args_support(optimizer)

  def init(params):
    zero, none = jnp.zeros(()), jnp.zeros((), jnp.int32)
    return OutlierState(optimizer.init(params), none, zero, zero, none)

  def update(updates, state, params=None, **extra):
    is_trained = param_groups.trained_by(given, updates)
    log_norm = jnp.log(
      optax.tree.norm(param_groups.selected(is_trained, updates))
    )
    is_outlier = _is_outlier(config, state, log_norm)
    # After `max_skipped` outliers in a row, the longer norms are normal.
    is_change = is_outlier & (state.num_in_row >= config.max_skipped)
    skipped = is_outlier & ~is_change
    updates, inner = optimizer.update(updates, state.inner, params, **extra)
    updates = jax.tree.map(
      lambda x: jnp.where(skipped, jnp.zeros_like(x), x), updates
    )
    count, mean, variance = _kept_if(
      skipped | ~jnp.isfinite(log_norm),
      (state.num_measured, state.mean, state.variance),
      _measure(config, state, log_norm, is_change),
    )
    return updates, OutlierState(
      inner=_kept_if(skipped, state.inner, inner),
      num_measured=count,
      mean=mean,
      variance=variance,
      num_in_row=jnp.where(skipped, state.num_in_row + 1, 0),
    )

  skipping = optax.GradientTransformationExtraArgs(init, update)
  if isinstance(given, param_groups.PartialOptimizer):
    return param_groups.PartialOptimizer(skipping, given.is_trained)
  return skipping


def was_skipped(opt_state: Any) -> jax.Array | None:
  """Returns whether the last step was skipped; None if no step ever is."""
  return opt_state.num_in_row > 0 if _is_state(opt_state) else None


def _is_state(opt_state) -> bool:
  return isinstance(opt_state, OutlierState)


def _is_outlier(config, state, log_norm):
  std = jnp.maximum(jnp.sqrt(state.variance), _LEAST_STD)
  is_far = log_norm - state.mean > config.skip_std * std
  return (
    is_far & jnp.isfinite(log_norm) & (state.num_measured >= config.min_steps)
  )


def _measure(config, state, log_norm, is_change):
  """Returns (count, mean, variance) after one more log norm.

  The average is plain for the first `window_steps` norms, exponential from then
  on. The variance follows West (CACM 22(9), 1979), weighted.
  """
  count = jnp.where(is_change, 0, state.num_measured) + 1
  share = jnp.maximum(1.0 / count, 1.0 / config.window_steps)
  delta = log_norm - state.mean
  mean = state.mean + share * delta
  variance = (1 - share) * (state.variance + share * delta * delta)
  # The count saturates: a run may have more steps than an int32 can count.
  return (
    jnp.minimum(count, config.min_steps + config.window_steps),
    mean,
    variance,
  )


def _kept_if(condition, old, new):
  """Returns `old` if the condition holds, except for counts of schedules."""

  def choose(old, new):
    count = _SCHEDULE_COUNTS.get(type(new))
    if count is None:
      return jnp.where(condition, old, new)
    others = {
      field: _kept_if(condition, getattr(old, field), getattr(new, field))
      for field in new._fields
      if field != count
    }
    return new._replace(**others)

  return jax.tree.map(
    choose, old, new, is_leaf=lambda node: type(node) in _SCHEDULE_COUNTS
  )
