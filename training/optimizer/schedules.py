"""Learning-rate schedules: functions of the step, counted from 0.

Every schedule warms up linearly, from 0 at step 0 to the peak at step
`warmup_steps`. Schedules that decay reach their end at step `num_steps`, one
after the last step of the run.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax

DECAY_SHAPES = ('linear', 'sqrt')
# The fields that each schedule uses besides the peak and the warm-up.
SCHEDULES = {
  'constant': (),
  'linear': ('end_lr',),
  'cosine': ('end_lr',),
  'wsd': ('end_lr', 'decay_steps', 'decay_shape'),
  'inverse_sqrt': (),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
  """The numbers of a schedule, in steps and learning rates."""

  peak_lr: float
  end_lr: float
  num_steps: int
  warmup_steps: int
  decay_steps: int
  decay_shape: str


def make_schedule(name: str, shape: Shape) -> optax.Schedule:
  """Returns the schedule of a name in `SCHEDULES`.

  Reference:
    wsd: warm-up, stable, decay (MiniCPM, arXiv:2404.06395). The decay is linear
    or 1 - sqrt of the progress (Haegele et al., arXiv:2405.18392).
    inverse_sqrt: peak x sqrt(warmup_steps / step) (T5, arXiv:1910.10683).
  """
  peak, end = shape.peak_lr, shape.end_lr
  rest = shape.num_steps - shape.warmup_steps
  if name == 'constant':
    main = optax.constant_schedule(peak)
  elif name == 'linear':
    main = optax.linear_schedule(peak, end, rest)
  elif name == 'cosine':
    main = optax.cosine_decay_schedule(peak, max(rest, 1), alpha=end / peak)
  elif name == 'inverse_sqrt':
    main = _inverse_sqrt(peak, shape.warmup_steps)
  else:
    decay = (
      optax.linear_schedule(peak, end, shape.decay_steps)
      if shape.decay_shape == 'linear'
      else _one_minus_sqrt(peak, end, shape.decay_steps)
    )
    main = optax.join_schedules(
      [optax.constant_schedule(peak), decay], [rest - shape.decay_steps]
    )
  if not shape.warmup_steps:
    return main
  warmup = optax.linear_schedule(0.0, peak, shape.warmup_steps)
  return optax.join_schedules([warmup, main], [shape.warmup_steps])


def _inverse_sqrt(peak: float, warmup_steps: int) -> optax.Schedule:
  # optax counts the steps of a joined schedule from its own start, and also
  # evaluates it before its start, at negative steps.
  def schedule(since_warmup: jax.typing.ArrayLike) -> jax.Array:
    since_warmup = jnp.maximum(since_warmup, 0)
    return peak * jnp.sqrt(warmup_steps / (since_warmup + warmup_steps))

  return schedule


def _one_minus_sqrt(peak: float, end: float, num_steps: int) -> optax.Schedule:
  def schedule(since_stable: jax.typing.ArrayLike) -> jax.Array:
    progress = jnp.clip(jnp.asarray(since_stable) / num_steps, 0, 1)
    return end + (peak - end) * (1 - jnp.sqrt(progress))

  return schedule
