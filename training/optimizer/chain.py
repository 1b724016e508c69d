"""The optimizer of an experiment: clip, direct, scale, decay, step.

    gradient -> clipped by its global norm
             -> direction of the rule (rules.py)
             -> times the multipliers of its group and of muP
             -> + weight_decay x parameter
             -> times -lr(t)

All rules share this chain of optax transformations. Decay comes after the
multipliers and before the learning rate: in every group a weight loses
lr(t) x weight_decay of itself per step, as in AdamW (arXiv:1711.05101), and as
muP needs it (models/mup.py). With Muon each half decays by its own learning
rate.

A multiplier of 0 freezes a group: it is not moved and not decayed, has no state
and no gradient, and counts in no norm. Parameters that no gradient reaches are
always frozen, such as a mixture's routing corrections.

The structure of the state depends on the rule and on the frozen groups, not on
any number.
"""

import dataclasses
import math
from typing import Any

import jax
import optax

from checks import expect
from models import model_config as model_config_lib, mup
from training.optimizer import param_groups, schedules, update_rules


@dataclasses.dataclass(kw_only=True)
class OptimizerConfig:
  """A rule, its learning-rate schedule, and the numbers that all rules share.

  A field that the chosen schedule does not use must be left at its default.
  """

  # The rule and its hyper-parameters. As flags: --config.optimizer.rule=lion
  # picks a rule of `rules.RULES` with its defaults, and
  # --config.optimizer.rule.beta1=0.95 changes one of its fields.
  rule: update_rules.Rule = dataclasses.field(
    default=update_rules.AdamW(), metadata={'choices': update_rules.RULES}
  )
  peak_lr: float = 1e-3  # per step; with Muon, the rate of hidden matrices
  end_lr: float = 1e-4  # reached at the last step: linear | cosine | wsd
  # constant | linear | cosine | wsd | inverse_sqrt
  schedule: str = 'cosine'
  warmup_steps: int = 100  # linear from 0 to peak_lr
  decay_steps: int = 0  # wsd only: length of the final decay
  decay_shape: str = 'linear'  # wsd only: linear | sqrt, for 1 - sqrt(progress)
  weight_decay: float = 0.1  # a weight loses lr(t) x weight_decay per step
  weight_decay_mask: str = 'matrices'  # matrices | no_embeddings | all
  clip_norm: float = 1.0  # largest global gradient norm; 0 does not clip
  # (regular expression, factor) pairs: 'attention/' matches a group by name,
  # the factors of all matching pairs are multiplied, 0 freezes the group.
  lr_multipliers: param_groups.LrMultipliers = ()

  def validate(self, num_steps: int) -> None:
    """Raises ValueError for values that no run can use.

    Args:
      num_steps: number of steps of the whole run.
    """
    if not isinstance(self.rule, update_rules.Rule):
      raise ValueError(
        f'optimizer.rule: got {self.rule!r}, expected a rule of'
        ' training/optimizer/update_rules.py, as AdamW(beta2=0.99)'
      )
    for name, allowed in (
      ('schedule', schedules.SCHEDULES),
      ('decay_shape', schedules.DECAY_SHAPES),
      ('weight_decay_mask', param_groups.DECAY_MASKS),
    ):
      expect.one_of(f'optimizer.{name}', getattr(self, name), allowed)
    update_rules.require_positive('peak_lr', self.peak_lr)
    for name in ('end_lr', 'weight_decay', 'clip_norm', 'warmup_steps'):
      value = getattr(self, name)
      update_rules.require(value >= 0, name, value, '>= 0')
      update_rules.require(math.isfinite(value), name, value, 'a finite number')
    self.rule.validate()
    param_groups.check_lr_multipliers(self.lr_multipliers)
    self._check_unused()
    self._check_schedule(num_steps)

  def _check_unused(self) -> None:
    """Refuses values that the schedule would ignore."""
    defaults = type(self)()
    used = schedules.SCHEDULES[self.schedule]
    for name in ('decay_shape', 'decay_steps', 'end_lr'):
      got, default = getattr(self, name), getattr(defaults, name)
      if name not in used and got != default:
        raise ValueError(
          f'optimizer.{name}: got {got} with schedule {self.schedule!r}, which'
          f' does not use it, expected its default, {default}; set'
          f' optimizer.{name} back or choose another optimizer.schedule'
        )

  def _check_schedule(self, num_steps: int) -> None:
    schedule = self.schedule
    if self.rule.keeps_average and schedule != 'constant':
      raise ValueError(
        f'optimizer.schedule: got {schedule!r} with rule'
        f' {type(self.rule).__name__}, expected constant: the average of the'
        ' iterates takes the place of a decay; warm-up is kept; set'
        ' optimizer.schedule = constant'
      )
    if 'end_lr' in schedules.SCHEDULES[schedule]:
      update_rules.require(
        self.end_lr <= self.peak_lr,
        'end_lr',
        self.end_lr,
        f'at most optimizer.peak_lr = {self.peak_lr}',
      )
    if self.warmup_steps + self.decay_steps > num_steps:
      raise ValueError(
        f'optimizer: got warmup_steps = {self.warmup_steps} and decay_steps ='
        f' {self.decay_steps}, expected together at most num_steps ='
        f' {num_steps}'
      )
    if schedule == 'wsd':
      update_rules.require(
        self.decay_steps > 0,
        'decay_steps',
        self.decay_steps,
        '> 0 with schedule wsd',
      )
    if schedule == 'inverse_sqrt':
      update_rules.require(
        self.warmup_steps > 0,
        'warmup_steps',
        self.warmup_steps,
        '> 0 with schedule inverse_sqrt: it is the time scale of the decay',
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Numbers:
  """The numbers of an optimizer that one program may take as arguments.

  They may be traced, so that a program trains with many of them
  (`studies/sweeps/groups/programs.py`). The config decides the structure, for
  example whether there is a clip.
  """

  schedule: optax.Schedule
  peak_lr: float | jax.Array
  weight_decay: float | jax.Array
  clip_norm: float | jax.Array


def make_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
  """Returns the learning rate as a function of the step, from 0."""
  return schedules.make_schedule(
    config.schedule,
    schedules.Shape(
      peak_lr=config.peak_lr,
      end_lr=config.end_lr,
      num_steps=num_steps,
      warmup_steps=config.warmup_steps,
      decay_steps=config.decay_steps,
      decay_shape=config.decay_shape,
    ),
  )


def make_optimizer(
  config: OptimizerConfig,
  num_steps: int,
  model_config: model_config_lib.ModelConfig,
  params: Any,
  *,
  is_staged: bool = False,
  numbers: Numbers | None = None,
) -> optax.GradientTransformation:
  """Returns the optimizer of a validated config.

  Args:
    config: the rule, its schedule and the numbers that all rules share.
    num_steps: number of steps of the whole run.
    model_config: says whether muP scales the learning rates.
    params: arrays or shapes, with layers as a checkpoint has them. Names decide
      which parameters are decayed, scaled and orthogonalised.
    is_staged: whether layers are spread over the stages of a pipeline. Every
      stage then updates its own layers at once: a loop over all layers would
      gather each of them on every stage.
    numbers: numbers in place of the config's; None: the config's.

  Raises:
    ValueError: the parameters lack a group that the config names, or do not fit
      the rule.
  """
  multipliers = param_groups.lr_multipliers(config.lr_multipliers, params)
  is_trained = jax.tree.map(lambda factor: factor > 0, multipliers)
  multipliers, trained, scales = (
    param_groups.selected(is_trained, tree)
    for tree in (
      multipliers,
      params,
      mup.lr_multipliers(model_config, params),
    )
  )
  config.rule.check(trained, model_config)
  # An orthogonalised update fits every width, see `rules.Muon`.
  scales = jax.tree.map(
    lambda is_whole, scale: 1.0 if is_whole else scale,
    config.rule.orthogonalised(trained),
    scales,
  )
  multipliers = jax.tree.map(lambda a, b: a * b, multipliers, scales)
  direction = config.rule.direction(
    trained, num_steps=num_steps, is_staged=is_staged
  )
  if numbers is None:
    numbers = Numbers(
      schedule=make_schedule(config, num_steps),
      peak_lr=config.peak_lr,
      weight_decay=config.weight_decay,
      clip_norm=config.clip_norm,
    )
  steps = _steps(config, numbers, trained, direction, multipliers)
  clip = (
    optax.clip_by_global_norm(numbers.clip_norm)
    if config.clip_norm
    else optax.identity()
  )
  optimizer = optax.chain(clip, steps)
  if all(jax.tree.leaves(is_trained)):
    return optimizer
  partition = optax.partition(
    {'trained': optimizer, 'frozen': optax.set_to_zero()},
    jax.tree.map(lambda t: 'trained' if t else 'frozen', is_trained),
  )
  return param_groups.PartialOptimizer(partition, is_trained)


def _steps(
  config: OptimizerConfig,
  numbers: Numbers,
  params: Any,
  direction: optax.GradientTransformation,
  multipliers: Any,
) -> optax.GradientTransformation:
  """Returns all transformations after clipping."""
  steps = optax.chain(
    direction,
    _times(multipliers),
    optax.add_decayed_weights(
      numbers.weight_decay,
      mask=param_groups.is_decayed(config.weight_decay_mask, params),
    ),
    _times(config.rule.lr_ratios(params, numbers.peak_lr)),
    optax.scale_by_learning_rate(numbers.schedule),
  )
  return config.rule.wrap(steps, numbers.schedule)


def _times(factors: Any) -> optax.GradientTransformation:
  def times(factor, x):
    # A traced factor has no value yet.
    is_one = not isinstance(factor, jax.Array) and factor == 1
    return x if is_one else factor * x

  return optax.stateless(
    lambda updates, _: jax.tree.map(times, factors, updates)
  )
