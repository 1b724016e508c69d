"""Optimizer rules: from a gradient to the direction of a step.

A rule is an optimizer without its learning rate, weight decay and clipping,
which training/optimizer/chain.py adds to all rules alike. The parts come from
optax. Where optax has a whole optimizer (`optax.contrib.muon`,
`optax.adafactor`), the rule joins its parts, because the whole optimizer decays
weights in its own way: Muon's Adam half decays norms and biases too, Adafactor
decays without the learning rate.

A new optimizer is one dataclass in this file and its name in `RULES`. Shampoo
and SOAP are missing: optax has neither.
"""

import abc
import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from checks import expect
from models import model_config as model_config_lib
from training.optimizer import param_groups, per_matrix

STATE_DTYPES = ('float32', 'bfloat16')
# Names of moments in the states of optax, for all optimizers.
_MOMENTS = ('mu', 'nu', 'm1', 'm2')
# The slowest running average. Float32 rounds a change of less than 2^-24 of a
# value back to the old value, so a running average stops at a distance of up to
# 2^-24 / (1 - beta) from its new level: here at 1 %.
SLOWEST_BETA = 1 - 2**-17


class Rule(abc.ABC):
  """The base class of rules: their contract, and its defaults.

  A rule is a frozen dataclass. Its fields are its hyper-parameters.
  """

  # Fields that must lie in [0, 1). All other numbers must be above 0.
  betas: ClassVar[tuple[str, ...]] = ()
  # Whether the state holds an average of the weights, see `average`.
  keeps_average: ClassVar[bool] = False

  def validate(self) -> None:
    """Raises ValueError for values that no run can use."""
    for name, value in vars(self).items():
      if name in self.betas:
        require(0 <= value < 1, f'rule.{name}', value, '0 <= beta < 1')
        require_not_too_slow(f'optimizer.rule.{name}', value)
      elif name == 'state_dtype':
        expect.one_of('optimizer.rule.state_dtype', value, STATE_DTYPES)
      elif isinstance(value, float | int) and not isinstance(value, bool):
        require_positive(f'rule.{name}', value)

  def check(
    self, params: Any, model_config: model_config_lib.ModelConfig
  ) -> None:
    """Raises ValueError if the rule does not fit the trained parameters."""
    del params, model_config

  @abc.abstractmethod
  def direction(
    self, params: Any, *, num_steps: int, is_staged: bool
  ) -> optax.GradientTransformation:
    """Returns the transformation from gradients to directions.

    Args:
      params: the trained parameters, arrays or shapes.
      num_steps: number of steps of the whole run.
      is_staged: layers are spread over the stages of a pipeline.
    """

  def orthogonalised(self, params: Any) -> Any:
    """Marks the matrices whose updates are orthogonalised.

    Such an update needs its matrix whole, and fits every width: muP's
    multipliers do not apply to it.
    """
    return jax.tree.map(lambda _: False, params)

  def lr_ratios(self, params: Any, peak_lr: float | jax.Array) -> Any:
    """Returns each parameter's own peak learning rate over `peak_lr`."""
    del peak_lr
    return jax.tree.map(lambda _: 1.0, params)

  def wrap(
    self, steps: optax.GradientTransformation, schedule: optax.Schedule
  ) -> optax.GradientTransformation:
    """Returns the complete optimizer, given all of its steps but clipping."""
    del schedule
    return steps

  def average(self, opt_state: Any, params: Any) -> Any:
    """Returns the averaged weights that the state holds.

    Only rules that set `keeps_average` have them.

    Args:
      opt_state: a state of the optimizer, possibly inside states of wrappers.
        It may also have a first axis of devices (pmap).
      params: parameters of the same step.
    """
    raise NotImplementedError(f'{type(self).__name__} keeps no average')


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW(Rule):
  """Adam; `chain.py` adds the decoupled weight decay (arXiv:1711.05101)."""

  betas = 'beta1', 'beta2'

  beta1: float = 0.9  # decay of the first moment per step
  # Decay of the second moment per step; optax and the paper take 0.999.
  beta2: float = 0.95
  epsilon: float = 1e-8  # added to the root of the second moment
  state_dtype: str = 'float32'  # of stored moments: float32 | bfloat16

  def direction(self, params, *, num_steps, is_staged):
    del params, num_steps, is_staged
    return stored_as(
      self.state_dtype,
      optax.scale_by_adam(self.beta1, self.beta2, self.epsilon),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Muon(AdamW):
  """Orthogonalises the momentum of hidden matrices (Jordan et al. 2024).

  Embeddings, head, router and vectors are updated by the inherited AdamW.

  An update has a spectral norm of about sqrt(max(1, out / in)). Of the two
  scalings in use, this one keeps the effect of a step on the activations
  independent of width (arXiv:2310.17813). The other one, 0.2 sqrt(max(in,
  out)), has Adam's root mean square instead (arXiv:2502.16982).

  Reference: https://kellerjordan.github.io/posts/muon
  """

  betas = 'beta1', 'beta2', 'momentum'

  momentum: float = 0.95  # Nesterov's, decay per step
  newton_schulz_steps: int = 5  # iterations of the orthogonalisation
  # AdamW's peak learning rate; it follows the schedule of `peak_lr`, the rate
  # of the hidden matrices.
  adam_peak_lr: float = 2e-3

  def check(self, params, model_config):
    del model_config
    if not any(jax.tree.leaves(self.orthogonalised(params))):
      raise ValueError(
        'optimizer.rule: got Muon without any matrix of attention or of a'
        ' feed-forward layer to orthogonalise, expected one that is trained;'
        ' take multipliers of 0 out of optimizer.lr_multipliers or use adamw'
      )

  def direction(self, params, *, num_steps, is_staged):
    is_hidden = self.orthogonalised(params)
    orthogonalise = contrib.scale_by_muon(
      beta=self.momentum,
      ns_steps=self.newton_schulz_steps,
      weight_dimension_numbers=contrib.MuonDimensionNumbers(0, 1),
    )
    # Stacked layers one after the other: only one is gathered at a time. With
    # stages every stage has to go through its own layers, so all at once.
    in_turn = jax.tree.map(
      lambda stacked: stacked and not is_staged, param_groups.is_stacked(params)
    )
    ndims, in_turn = (
      param_groups.selected(is_hidden, tree)
      for tree in (jax.tree.map(lambda _: 2, is_hidden), in_turn)
    )
    hidden = optax.chain(
      stored_as(
        self.state_dtype, per_matrix.per_matrix(orthogonalise, ndims, in_turn)
      ),
      optax.stateless(lambda updates, _: jax.tree.map(_by_shape, updates)),
    )
    others = super().direction(params, num_steps=num_steps, is_staged=is_staged)
    return optax.partition(
      {'muon': hidden, 'others': others},
      jax.tree.map(lambda hidden: 'muon' if hidden else 'others', is_hidden),
    )

  def orthogonalised(self, params):
    return param_groups.is_hidden_matrix(params)

  def lr_ratios(self, params, peak_lr):
    return jax.tree.map(
      lambda hidden: 1.0 if hidden else self.adam_peak_lr / peak_lr,
      self.orthogonalised(params),
    )


def _by_shape(update: jax.Array) -> jax.Array:
  fan_in, fan_out = update.shape[-2:]
  return update * max(1, fan_out / fan_in) ** 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adafactor(Rule):
  """Divides by the root of a second moment that is kept as rows and columns.

  Defaults of optax and of the paper.

  Reference: arXiv:1804.04235, algorithm 4.
  """

  decay_exponent: float = 0.8  # step t forgets 1 - t^-decay_exponent
  # A matrix whose smaller side is below this keeps its whole second moment.
  min_factored_size: int = 128
  clip_rms: float = 1.0  # root mean square of a matrix's update, at most
  # Multiplies steps by the RMS of the matrix: peak_lr is relative to it.
  scale_by_parameter: bool = True

  def check(self, params, model_config):
    del params
    if self.scale_by_parameter and model_config.mup_base_width:
      raise ValueError(
        'optimizer.rule.scale_by_parameter: got True with'
        f' model.mup_base_width = {model_config.mup_base_width}, expected'
        " False: muP's learning rates are for absolute steps, as Adam's"
        ' are'
      )

  def direction(self, params, *, num_steps, is_staged):
    del num_steps, is_staged
    parts = [
      optax.scale_by_factored_rms(
        decay_rate=self.decay_exponent,
        min_dim_size_to_factor=self.min_factored_size,
      ),
      optax.clip_by_block_rms(self.clip_rms),
    ]
    if self.scale_by_parameter:
      parts.append(optax.scale_by_param_block_rms())
    own_ndims = param_groups.own_ndims(params)
    return optax.chain(
      *(per_matrix.per_matrix(part, own_ndims) for part in parts)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lion(Rule):
  """The sign of a momentum (arXiv:2302.06675)."""

  betas = 'beta1', 'beta2'

  beta1: float = 0.9  # share of the momentum in the direction
  beta2: float = 0.95  # decay of the momentum per step; 0.99 in optax
  state_dtype: str = 'float32'  # of the stored momentum: float32 | bfloat16

  def direction(self, params, *, num_steps, is_staged):
    del params, num_steps, is_staged
    return stored_as(
      self.state_dtype, optax.scale_by_lion(self.beta1, self.beta2)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleFree(Rule):
  """AdamW with an average of its iterates in place of a decaying rate.

  Gradients are taken between the iterates and their average. The average is the
  result: it is evaluated and frozen.

  Reference: arXiv:2405.15682
  """

  betas = 'beta1', 'beta2'
  keeps_average = True

  beta1: float = 0.9  # how near to the average gradients are taken; above 0
  beta2: float = 0.95  # decay of the second moment per step
  epsilon: float = 1e-8  # added to the root of the second moment

  def validate(self):
    super().validate()
    # The average is recovered through a division by beta1.
    require(self.beta1 > 0, 'rule.beta1', self.beta1, '> 0')

  def direction(self, params, *, num_steps, is_staged):
    del params, num_steps, is_staged
    # Adam without its momentum: the interpolation takes its place.
    return optax.scale_by_rms(
      self.beta2, self.epsilon, eps_in_sqrt=False, bias_correction=True
    )

  def wrap(self, steps, schedule):
    return contrib.schedule_free(steps, schedule, b1=self.beta1)

  def average(self, opt_state, params):
    is_state = lambda node: isinstance(node, contrib.ScheduleFreeState)  # noqa: E731
    (found,) = filter(is_state, jax.tree.leaves(opt_state, is_leaf=is_state))
    is_masked = lambda node: isinstance(node, optax.MaskedNode)  # noqa: E731
    is_trained = jax.tree.map(
      lambda node: not is_masked(node), found.z, is_leaf=is_masked
    )
    # The state's own beta1 has an axis for devices under pmap.
    averaged = contrib.schedule_free_eval_params(
      found._replace(b1=self.beta1), param_groups.selected(is_trained, params)
    )
    return jax.tree.map(
      lambda trained, param, new: new if trained else param,
      is_trained,
      params,
      averaged,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ademamix(AdamW):
  """Adam with a second, slow momentum (arXiv:2409.03137)."""

  betas = 'beta1', 'beta2', 'beta3'

  beta3: float = 0.9999  # decay of the slow momentum at the last step; above 0
  alpha: float = 5.0  # weight of the slow momentum at the last step

  def validate(self):
    super().validate()
    require_positive('rule.beta3', self.beta3)

  def direction(self, params, *, num_steps, is_staged):
    del params, is_staged

    def slow_decay(step: jax.typing.ArrayLike) -> jax.Array:
      # Equation 4: in proportion to the step, the half-life grows from beta1's
      # to beta3's.
      share = jnp.minimum(jnp.asarray(step) / num_steps, 1.0)
      # beta1 = 0 has no half-life: start from one that is almost 0.
      first, last = math.log(max(self.beta1, 1e-8)), math.log(self.beta3)
      return jnp.exp(first * last / ((1 - share) * last + share * first))

    return stored_as(
      self.state_dtype,
      contrib.scale_by_ademamix(
        self.beta1,
        self.beta2,
        slow_decay,
        optax.linear_schedule(0.0, self.alpha, num_steps),
        self.epsilon,
      ),
    )


# The rules that a flag can name, as in --config.optimizer.rule=lion.
RULES: dict[str, type[Rule]] = {
  'adamw': AdamW,
  'muon': Muon,
  'adafactor': Adafactor,
  'lion': Lion,
  'schedule_free': ScheduleFree,
  'ademamix': Ademamix,
}


def stored_as(
  dtype: str, inner: optax.GradientTransformation
) -> optax.GradientTransformation:
  """Keeps all moments as `dtype` between steps; `inner` sees float32.

  Moments in bfloat16 are rounded stochastically, with bits that depend on the
  step and on the place in the array alone: a resumed run and a run on other
  devices round alike.
  """
  if dtype == 'float32':
    return inner

  def init(params):
    state: Any = inner.init(params)  # a named tuple of the optimizer
    return state._replace(**_cast(_moments_of(state), dtype))

  def update(updates, state, params=None):
    wide = state._replace(**_cast(_moments_of(state), jnp.float32))
    new: Any
    updates, new = inner.update(updates, wide, params)
    leaves, treedef = jax.tree.flatten(_moments_of(new))
    key = jax.random.fold_in(jax.random.key(0), new.count)
    rounded = [
      round_stochastically(jax.random.fold_in(key, i), leaf)
      for i, leaf in enumerate(leaves)
    ]
    return updates, new._replace(**treedef.unflatten(rounded))

  return optax.GradientTransformation(init, update)


def _moments_of(state: Any) -> dict[str, Any]:
  names = [name for name in state._fields if name in _MOMENTS]
  return {name: getattr(state, name) for name in names}


def _cast(tree: Any, dtype: Any) -> Any:
  return jax.tree.map(lambda x: x.astype(dtype), tree)


def round_stochastically(key: jax.Array, x: jax.Array) -> jax.Array:
  """Returns a float32 array as bfloat16: the mean over keys is the array.

  A value between two neighbours in bfloat16 becomes the upper one with the
  probability of its distance from the lower one. Rounding to nearest would stop
  a running average far from its level: a step moves a moment by less than half
  of the distance between neighbours, 2^-8 of the value (arXiv:2010.06192).
  """
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  # bfloat16 is the upper half of float32. A carry out of the lower half makes
  # the upper half the next magnitude.
  carried = bits + jax.random.bits(key, x.shape, jnp.uint16)
  upper = jax.lax.convert_element_type(carried >> 16, jnp.uint16)
  rounded = jax.lax.bitcast_convert_type(upper, jnp.bfloat16)
  # The next magnitude after infinity is NaN.
  return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def require_positive(name: str, value: float) -> None:
  """Raises ValueError unless `optimizer.NAME` is above 0 and finite."""
  require(value > 0, name, value, '> 0')
  require(math.isfinite(value), name, value, 'a finite number')


def require_not_too_slow(name: str, beta: float) -> None:
  """Raises ValueError if a running average with this decay stands still."""
  if beta > SLOWEST_BETA:
    raise ValueError(
      f'{name}: got {beta}, expected at most {SLOWEST_BETA:.6f}: float32 rounds'
      ' slower changes of a running average away; lower it'
    )


def require(ok: bool, name: str, value: Any, expected: str) -> None:
  """Raises ValueError about `optimizer.NAME` if a condition does not hold."""
  if not ok:
    raise ValueError(f'optimizer.{name}: got {value}, expected {expected}')
