"""The optimizer of an experiment: clip, direct, scale, decay, step.

    gradient -> clipped by its global norm
             -> direction of the named optimizer (transforms.py)
             -> times the multipliers of its group and of muP
             -> + weight_decay x parameter
             -> times -lr(t)

from optax, and the same chain for all of them. Decay comes after the
multipliers and before the learning rate: in every group a weight loses
lr(t) x weight_decay of itself per step, as AdamW has it (arXiv:1711.05101) and
muP wants it (models/mup.py); with Muon each half by its own learning rate.

A multiplier of 0 freezes a group: not moved, not decayed, not counted by
clipping, and without a state.

The state has the same structure whatever the numbers are; only the optimizer
and the groups that are frozen decide it. Shampoo and SOAP are not here: optax
has neither.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from models import model_config as model_config_lib, mup
from training.optimizer import checks, param_groups, schedules, transforms


@dataclasses.dataclass(kw_only=True)
class OptimizerConfig:
  """An optimizer and its schedule.

  adamw arXiv:1711.05101, muon kellerjordan.github.io/posts/muon, adafactor
  arXiv:1804.04235, lion arXiv:2302.06675, schedule_free (AdamW)
  arXiv:2405.15682, ademamix arXiv:2409.03137. A field that the one chosen does
  not use must be left at its default.
  """

  name: str = 'adamw'  # one of OPTIMIZERS
  peak_lr: float = 1e-3
  end_lr: float = 1e-4  # reached at the last step: linear | cosine | wsd
  # constant | linear | cosine | wsd | inverse_sqrt
  schedule: str = 'cosine'
  warmup_steps: int = 100  # linear from 0 to peak_lr
  decay_steps: int = 0  # wsd only: length of the final decay
  decay_shape: str = 'linear'  # wsd only: linear | sqrt, for 1 - sqrt(progress)
  beta1: float = 0.9  # schedule_free: how near gradients are to the average
  beta2: float = 0.95
  epsilon: float = 1e-8
  weight_decay: float = 0.1  # a weight loses lr(t) x weight_decay per step
  weight_decay_mask: str = 'matrices'  # matrices | no_embeddings | all
  clip_norm: float = 1.0  # global gradient norm; 0 does not clip
  # (regular expression, factor) pairs: 'attention/' matches a group by name,
  # factors of all that match multiply, 0 freezes.
  lr_multipliers: param_groups.LrMultipliers = ()
  state_dtype: str = 'float32'  # moments are kept in: float32 | bfloat16
  muon: transforms.MuonConfig = dataclasses.field(
    default_factory=transforms.MuonConfig
  )
  adafactor: transforms.AdafactorConfig = dataclasses.field(
    default_factory=transforms.AdafactorConfig
  )
  ademamix: transforms.AdemamixConfig = dataclasses.field(
    default_factory=transforms.AdemamixConfig
  )

  def validate(self, num_steps: int) -> None:
    """Raises ValueError for values no run can use."""
    checks.check(self, num_steps)


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
) -> optax.GradientTransformation:
  """Returns the optimizer of a validated config.

  Args:
    config: which one, and its numbers.
    num_steps: of the whole run.
    model_config: says whether muP scales the learning rates.
    params: the model's variables, arrays or shapes, with layers as a checkpoint
      has them. Their names decide what is decayed, scaled and orthogonalised.
    is_staged: layers are spread over the stages of a pipeline, each of which
      goes through its own: in turn, every stage would need all of them.

  Raises:
    ValueError: what the config asks for, these parameters do not have.
  """
  _check_mup(config, model_config)
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
  if config.name == 'muon':
    is_hidden = param_groups.is_hidden_matrix(trained)
    _check_muon(is_hidden)
    # Orthogonalised, an update is right for every width: see directions.muon.
    scales = jax.tree.map(lambda m, s: 1.0 if m else s, is_hidden, scales)
  multipliers = jax.tree.map(lambda a, b: a * b, multipliers, scales)
  direction = _direction(config, num_steps, trained, is_staged)
  steps = _steps(config, num_steps, trained, direction, multipliers)
  clip = (
    optax.clip_by_global_norm(config.clip_norm)
    if config.clip_norm
    else optax.identity()
  )
  optimizer = optax.chain(clip, steps)
  if all(jax.tree.leaves(is_trained)):
    return optimizer
  return optax.partition(
    {'trained': optimizer, 'frozen': optax.set_to_zero()},
    jax.tree.map(lambda t: 'trained' if t else 'frozen', is_trained),
  )


def eval_params(config: OptimizerConfig, opt_state: Any, params: Any) -> Any:
  """Returns the parameters to evaluate and serve, or None: those in training.

  Schedule-free trains at points between its iterates and their average; the
  average is the result. Works on states as they lie on devices, too.

  Args:
    config: of the optimizer.
    opt_state: a state of it, possibly inside those of wrappers.
    params: of the same step.
  """
  if config.name != 'schedule_free':
    return None
  (found,) = (
    node
    for node in jax.tree.leaves(
      opt_state,
      is_leaf=lambda node: isinstance(node, contrib.ScheduleFreeState),
    )
    if isinstance(node, contrib.ScheduleFreeState)
  )
  is_masked = lambda node: isinstance(node, optax.MaskedNode)  # noqa: E731
  is_trained = jax.tree.map(
    lambda node: not is_masked(node), found.z, is_leaf=is_masked
  )
  # The state's own beta1 has an axis for devices under pmap.
  average = contrib.schedule_free_eval_params(
    found._replace(b1=config.beta1), param_groups.selected(is_trained, params)
  )
  return jax.tree.map(
    lambda trained, param, new: new if trained else param,
    is_trained,
    params,
    average,
  )


def _steps(
  config: OptimizerConfig,
  num_steps: int,
  params: Any,
  direction: optax.GradientTransformation,
  multipliers: Any,
) -> optax.GradientTransformation:
  """Returns what comes after clipping."""
  schedule = make_schedule(config, num_steps)
  steps = optax.chain(
    direction,
    _times(multipliers),
    optax.add_decayed_weights(
      config.weight_decay,
      mask=param_groups.is_decayed(config.weight_decay_mask, params),
    ),
    _times(_own_rates(config, params)),
    optax.scale_by_learning_rate(schedule),
  )
  if config.name == 'schedule_free':
    return contrib.schedule_free(steps, schedule, b1=config.beta1)
  return steps


def _own_rates(config: OptimizerConfig, params: Any) -> Any:
  """Returns each learning rate over peak_lr: of Muon's AdamW another one."""
  ratio = config.muon.adam_peak_lr / config.peak_lr
  return jax.tree.map(
    lambda hidden: 1.0 if hidden or config.name != 'muon' else ratio,
    param_groups.is_hidden_matrix(params),
  )


def _direction(
  config: OptimizerConfig, num_steps: int, params: Any, is_staged: bool
) -> optax.GradientTransformation:
  betas = config.beta1, config.beta2
  dtype = jnp.dtype(config.state_dtype)
  if config.name == 'adafactor':
    return transforms.adafactor(
      param_groups.own_ndims(params), config.adafactor
    )
  if config.name == 'schedule_free':
    # AdamW without its momentum, which the interpolation takes the place of.
    return optax.scale_by_rms(
      config.beta2, config.epsilon, eps_in_sqrt=False, bias_correction=True
    )
  if config.name == 'lion':
    return transforms.stored_as(dtype, optax.scale_by_lion(*betas))
  if config.name == 'ademamix':
    slow = transforms.ademamix(
      *betas, config.epsilon, config.ademamix, num_steps
    )
    return transforms.stored_as(dtype, slow)
  adam = transforms.stored_as(
    dtype, optax.scale_by_adam(*betas, config.epsilon)
  )
  if config.name == 'adamw':
    return adam
  return transforms.muon(
    param_groups.is_hidden_matrix(params),
    adam,
    config.muon,
    dtype,
    jax.tree.map(
      lambda stacked: stacked and not is_staged, param_groups.is_stacked(params)
    ),
  )


def _times(factors: Any) -> optax.GradientTransformation:
  return optax.stateless(
    lambda updates, _: jax.tree.map(
      lambda factor, x: x if factor == 1 else factor * x, factors, updates
    )
  )


def _check_muon(is_hidden: Any) -> None:
  if not any(jax.tree.leaves(is_hidden)):
    raise ValueError(
      "optimizer.name: got 'muon' without any matrix of attention or of a"
      ' feed-forward block to orthogonalise, expected one that is trained; take'
      ' multipliers of 0 out of optimizer.lr_multipliers or use adamw'
    )


def _check_mup(config, model_config) -> None:
  if (
    config.name == 'adafactor'
    and config.adafactor.scale_by_parameter
    and model_config.mup_base_width
  ):
    raise ValueError(
      'optimizer.adafactor.scale_by_parameter: got True with'
      f' model.mup_base_width = {model_config.mup_base_width}, expected False:'
      " muP's learning rates are those of absolute steps, as Adam's are"
    )
