"""AdamW with clipping and a learning-rate schedule, from optax.

Adam's two moments are as large as the parameters each. In bfloat16 they take
half the memory; they are computed in float32 all the same, and rounded when
they are put away.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import optax

from models import axes

SCHEDULES = ('constant', 'linear', 'cosine', 'wsd')
STATE_DTYPES = ('float32', 'bfloat16')

# Where nothing new comes in, a moment shrinks by 1 - beta of itself per step.
# bfloat16 keeps 8 bits, neighbours up to 2^-7 of a value apart: what is moved
# by less than half of that can round back to where it was, for good.
_LEAST_DECAY_IN_BFLOAT16 = 2**-8


@dataclasses.dataclass(kw_only=True)
class OptimizerConfig:
  """AdamW (arXiv:1711.05101) and its schedule."""

  peak_lr: float = 1e-3
  end_lr: float = 1e-4  # reached at the last step; unused by constant
  schedule: str = 'cosine'  # constant | linear | cosine | wsd
  warmup_steps: int = 100  # linear from 0 to peak_lr
  decay_steps: int = 0  # wsd only: length of the final linear decay
  beta1: float = 0.9
  beta2: float = 0.95
  epsilon: float = 1e-8
  weight_decay: float = 0.1  # of matrices; norms and biases are left alone
  clip_norm: float = 1.0  # global gradient norm; 0 does not clip
  state_dtype: str = 'float32'  # both moments are kept in: float32 | bfloat16

  def validate(self, num_steps: int) -> None:
    """Raises ValueError for values no run can use."""
    if self.schedule not in SCHEDULES:
      raise ValueError(
        f'optimizer.schedule: got {self.schedule!r}, expected one of'
        f' {", ".join(SCHEDULES)}'
      )
    if self.state_dtype not in STATE_DTYPES:
      raise ValueError(
        f'optimizer.state_dtype: got {self.state_dtype!r}, expected one of'
        f' {", ".join(STATE_DTYPES)}'
      )
    for name in ('peak_lr', 'epsilon'):
      _require(getattr(self, name) > 0, name, getattr(self, name), '> 0')
    for name in ('end_lr', 'weight_decay', 'clip_norm', 'warmup_steps'):
      _require(getattr(self, name) >= 0, name, getattr(self, name), '>= 0')
    for name in ('beta1', 'beta2'):
      value = getattr(self, name)
      _require(0 <= value < 1, name, value, '0 <= beta < 1')
    self._validate_state()
    for name in ('peak_lr', 'end_lr', 'weight_decay', 'clip_norm', 'epsilon'):
      value = getattr(self, name)
      _require(math.isfinite(value), name, value, 'a finite number')
    if self.warmup_steps + self.decay_steps > num_steps:
      raise ValueError(
        f'optimizer: got warmup_steps = {self.warmup_steps} and decay_steps ='
        f' {self.decay_steps}, expected together at most num_steps ='
        f' {num_steps}'
      )
    if (self.schedule == 'wsd') != (self.decay_steps > 0):
      raise ValueError(
        f'optimizer.decay_steps: got {self.decay_steps} with schedule'
        f' {self.schedule!r}, expected a positive number with wsd and 0'
        ' without'
      )

  def _validate_state(self) -> None:
    if self.state_dtype == 'float32':
      return
    most = 1 - _LEAST_DECAY_IN_BFLOAT16
    for name in ('beta1', 'beta2'):
      value = getattr(self, name)
      if value > most:
        raise ValueError(
          f'optimizer.{name}: got {value} with state_dtype ='
          f' {self.state_dtype}, expected at most {most}: a slower change is'
          f' rounded away; lower optimizer.{name} or set'
          ' optimizer.state_dtype = float32'
        )


def make_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
  """Returns the learning rate as a function of the step, from 0."""
  peak, end = config.peak_lr, config.end_lr
  rest = num_steps - config.warmup_steps
  if config.schedule == 'constant':
    main = optax.constant_schedule(peak)
  elif config.schedule == 'linear':
    main = optax.linear_schedule(peak, end, rest)
  elif config.schedule == 'cosine':
    main = optax.cosine_decay_schedule(peak, max(rest, 1), alpha=end / peak)
  else:
    # Warm-up, stable, decay (MiniCPM, arXiv:2404.06395).
    main = optax.join_schedules(
      [
        optax.constant_schedule(peak),
        optax.linear_schedule(peak, end, config.decay_steps),
      ],
      [rest - config.decay_steps],
    )
  if not config.warmup_steps:
    return main
  warmup = optax.linear_schedule(0.0, peak, config.warmup_steps)
  return optax.join_schedules([warmup, main], [config.warmup_steps])


def make_optimizer(
  config: OptimizerConfig, num_steps: int
) -> optax.GradientTransformation:
  """Returns clipping followed by AdamW with its weight-decay mask."""
  # What optax.adamw chains, with a say in how the moments are kept.
  adamw = optax.chain(
    _stored_as(
      jnp.dtype(config.state_dtype),
      optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
    ),
    optax.add_decayed_weights(config.weight_decay, mask=axes.is_decayed),
    optax.scale_by_learning_rate(make_schedule(config, num_steps)),
  )
  if not config.clip_norm:
    return adamw
  return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


def _stored_as(
  dtype: jnp.dtype, adam: optax.GradientTransformation
) -> optax.GradientTransformation:
  """Keeps both moments as `dtype` between steps; Adam sees float32."""
  if dtype == jnp.float32:
    return adam

  def cast(state, to):
    mu, nu = jax.tree.map(lambda x: x.astype(to), (state.mu, state.nu))
    return state._replace(mu=mu, nu=nu)

  def init(params):
    return cast(adam.init(params), dtype)

  def update(updates, state, params=None):
    updates, state = adam.update(updates, cast(state, jnp.float32), params)
    return updates, cast(state, dtype)

  return optax.GradientTransformation(init, update)


def _require(ok: bool, name: str, value: float, expected: str) -> None:
  if not ok:
    raise ValueError(f'optimizer.{name}: got {value}, expected {expected}')
