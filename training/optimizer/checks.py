"""What an optimizer's config must be, before anything is built from it."""

import math
from typing import Any

from training.optimizer import param_groups, schedules

# What each optimizer reads, of the fields that not all of them do.
OPTIMIZERS = {
  'adamw': ('beta1', 'beta2', 'epsilon', 'state_dtype'),
  'muon': ('beta1', 'beta2', 'epsilon', 'state_dtype', 'muon'),
  'adafactor': ('adafactor',),
  'lion': ('beta1', 'beta2', 'state_dtype'),
  'schedule_free': ('beta1', 'beta2', 'epsilon'),
  'ademamix': ('beta1', 'beta2', 'epsilon', 'state_dtype', 'ademamix'),
}
STATE_DTYPES = ('float32', 'bfloat16')

# Which betas are the memory of a state; one of Lion's two only mixes.
_DECAYS = {
  'adamw': ('beta1', 'beta2'),
  'muon': ('beta1', 'beta2', 'muon.momentum'),
  'lion': ('beta2',),
  'ademamix': ('beta1', 'beta2', 'ademamix.beta3'),
}
# Where nothing new comes in, a moment shrinks by 1 - beta of itself per step.
# bfloat16 keeps 8 bits, neighbours up to 2^-7 of a value apart: what is moved
# by less than half of that can round back to where it was, for good.
_LEAST_DECAY_IN_BFLOAT16 = 2**-8

_POSITIVE = (
  'peak_lr',
  'epsilon',
  'muon.newton_schulz_steps',
  'muon.adam_peak_lr',
  'adafactor.decay_exponent',
  'adafactor.min_factored_size',
  'adafactor.clip_rms',
  'ademamix.beta3',
  'ademamix.alpha',
)
_NOT_NEGATIVE = 'end_lr', 'weight_decay', 'clip_norm', 'warmup_steps'
_BETAS = 'beta1', 'beta2', 'muon.momentum', 'ademamix.beta3'


def check(config: Any, num_steps: int) -> None:
  """Raises ValueError for values no run can use.

  Args:
    config: an OptimizerConfig.
    num_steps: of the whole run.
  """
  for name, allowed in (
    ('name', OPTIMIZERS),
    ('schedule', schedules.SCHEDULES),
    ('decay_shape', schedules.DECAY_SHAPES),
    ('state_dtype', STATE_DTYPES),
    ('weight_decay_mask', param_groups.DECAY_MASKS),
  ):
    if getattr(config, name) not in allowed:
      raise ValueError(
        f'optimizer.{name}: got {getattr(config, name)!r}, expected one of'
        f' {", ".join(allowed)}'
      )
  _check_numbers(config)
  param_groups.check_lr_multipliers(config.lr_multipliers)
  _check_unused(config)
  _check_state(config)
  _check_schedule(config, num_steps)


def _check_numbers(config: Any) -> None:
  for names, is_good, expected in (
    (_POSITIVE, lambda x: x > 0, '> 0'),
    (_NOT_NEGATIVE, lambda x: x >= 0, '>= 0'),
    (_BETAS, lambda x: 0 <= x < 1, '0 <= beta < 1'),
    ((*_POSITIVE, *_NOT_NEGATIVE), math.isfinite, 'a finite number'),
  ):
    for name in names:
      value = _field(config, name)
      _require(is_good(value), name, value, expected)
  if config.name == 'schedule_free':
    # The average is found again by dividing by beta1.
    _require(config.beta1 > 0, 'beta1', config.beta1, '> 0 with schedule_free')


def _check_unused(config: Any) -> None:
  """Refuses what would be ignored."""
  defaults = type(config)()
  for chosen, table in (
    ('schedule', schedules.SCHEDULES),
    ('name', OPTIMIZERS),
  ):
    value = getattr(config, chosen)
    optional = {name for names in table.values() for name in names}
    for name in sorted(optional - set(table[value])):
      got, default = getattr(config, name), getattr(defaults, name)
      if got != default:
        raise ValueError(
          f'optimizer.{name}: got {got} with {chosen} {value!r}, which does not'
          f' use it, expected its default, {default}; set optimizer.{name} back'
          f' or choose another optimizer.{chosen}'
        )


def _check_state(config: Any) -> None:
  if config.state_dtype == 'float32':
    return
  most = 1 - _LEAST_DECAY_IN_BFLOAT16
  for name in _DECAYS[config.name]:
    value = _field(config, name)
    if value > most:
      raise ValueError(
        f'optimizer.{name}: got {value} with state_dtype ='
        f' {config.state_dtype}, expected at most {most}: a slower change is'
        f' rounded away; lower optimizer.{name} or set'
        ' optimizer.state_dtype = float32'
      )


def _check_schedule(config: Any, num_steps: int) -> None:
  schedule = config.schedule
  if config.name == 'schedule_free' and schedule != 'constant':
    raise ValueError(
      f'optimizer.schedule: got {schedule!r} with name schedule_free, expected'
      ' constant: the average of the iterates takes the place of a decay;'
      ' warm-up is kept; set optimizer.schedule = constant'
    )
  if 'end_lr' in schedules.SCHEDULES[schedule]:
    expected = f'at most optimizer.peak_lr = {config.peak_lr}'
    is_below = config.end_lr <= config.peak_lr
    _require(is_below, 'end_lr', config.end_lr, expected)
  if config.warmup_steps + config.decay_steps > num_steps:
    raise ValueError(
      f'optimizer: got warmup_steps = {config.warmup_steps} and decay_steps ='
      f' {config.decay_steps}, expected together at most num_steps ='
      f' {num_steps}'
    )
  if schedule == 'wsd':
    _require(
      config.decay_steps > 0,
      'decay_steps',
      config.decay_steps,
      '> 0 with schedule wsd',
    )
  if schedule == 'inverse_sqrt':
    _require(
      config.warmup_steps > 0,
      'warmup_steps',
      config.warmup_steps,
      '> 0 with schedule inverse_sqrt: it is the time scale of the decay',
    )


def _field(config: Any, name: str) -> Any:
  for part in name.split('.'):
    config = getattr(config, part)
  return config


def _require(ok: bool, name: str, value: float, expected: str) -> None:
  if not ok:
    raise ValueError(f'optimizer.{name}: got {value}, expected {expected}')
