"""Skips steps whose gradient norm is far from what it has been lately.

    optimizer = outliers.skipping(SpikeConfig(skip_std=6.0), optimizer)

A few batches give a gradient many times as long as the others do; the step that
is taken with one throws the run back for hundreds of others. PaLM went back to
an older checkpoint and left out the batches around the spike
(arXiv:2204.02311, section 5.1); OLMo 2 (arXiv:2501.00656) judges each step
before it is taken, as is done here: skipped where the norm lies 6 standard
deviations above the mean of the last 128 steps. Here mean and deviation are
those of its logarithm, since norms are spread by factors, and are running
averages: two numbers instead of a window.

Of a skipped step nothing remains but what it was judged by: parameters and the
optimizer's moments are those from before. The learning rate remains a function
of the step, and the data moves on to the next batch.

What is not finite is never skipped: an overflow comes from the weights, not
from the batch, and would come again. `training/diagnosis/diagnose.py` is for
that.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

# Of the logarithm: where gradients hardly differ (tiny data, huge batches), 6
# deviations of less than this would skip what is 30 % longer.
_LEAST_STD = 0.05


@dataclasses.dataclass(kw_only=True)
class SpikeConfig:
  """Which steps are not taken."""

  skip_std: float = 0.0  # standard deviations above the mean; 0 skips none
  window_steps: int = 128  # the running averages decay by 1 / window per step
  min_steps: int = 64  # are measured before one may be skipped
  max_skipped: int = 8  # in a row; the next is taken, and all is measured anew

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
      if getattr(self, name) < least:
        raise ValueError(
          f'spikes.{name}: got {getattr(self, name)}, expected at least {least}'
        )


class OutlierState(NamedTuple):
  """The optimizer's state, and what gradient norms have been like."""

  inner: Any
  num_measured: jax.Array  # int32: steps that mean and variance are of
  mean: jax.Array  # of the log norm, of the steps that were taken
  variance: jax.Array
  num_in_row: jax.Array  # int32: steps skipped since the last that was taken


def skipping(
  config: SpikeConfig, optimizer: optax.GradientTransformation
) -> optax.GradientTransformation:
  """Returns the optimizer, which takes no step on an outlier.

  Args:
    config: what an outlier is; of `skip_std` 0 the optimizer is returned as it
      is.
    optimizer: what takes the others. Its update is computed in any case.
  """
  if not config.skip_std:
    return optimizer
  optimizer = optax.with_extra_args_support(optimizer)

  def init(params):
    zero, none = jnp.zeros(()), jnp.zeros((), jnp.int32)
    return OutlierState(optimizer.init(params), none, zero, zero, none)

  def update(updates, state, params=None, **extra):
    log_norm = jnp.log(optax.tree.norm(updates))
    is_outlier = _is_outlier(config, state, log_norm)
    # A change for good is accepted after so many steps, and measured anew.
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

  return optax.GradientTransformationExtraArgs(init, update)


def was_skipped(opt_state: Any) -> jax.Array | None:
  """Returns whether the last step was skipped; None if none ever is."""
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
  """Returns (count, mean, variance) with one more log norm in them.

  A plain average until there are `window_steps` of them, exponential from then
  on; West's update of the variance (CACM 22(9), 1979), weighted.
  """
  count = jnp.where(is_change, 0, state.num_measured) + 1
  share = jnp.maximum(1.0 / count, 1.0 / config.window_steps)
  delta = log_norm - state.mean
  mean = state.mean + share * delta
  variance = (1 - share) * (state.variance + share * delta * delta)
  # Saturates: a run may have more steps than int32 has numbers.
  return (
    jnp.minimum(count, config.min_steps + config.window_steps),
    mean,
    variance,
  )


def _kept_if(condition, old, new):
  """Returns `old` where the condition holds, but for a schedule's count."""

  def choose(old, new):
    if isinstance(new, optax.ScaleByScheduleState):
      return new
    return jnp.where(condition, old, new)

  return jax.tree.map(
    choose,
    old,
    new,
    is_leaf=lambda x: isinstance(x, optax.ScaleByScheduleState),
  )
