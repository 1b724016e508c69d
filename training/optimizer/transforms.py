"""In which direction each optimizer goes: a gradient, made comparable.

Everything an optimizer is but for its learning rate, weight decay and clipping,
which training/optimizer/chain.py adds to all of them alike. From optax; where
optax has a whole optimizer (`optax.contrib.muon`, `optax.adafactor`), its parts
are put together here, because the whole decays weights by rules of its own:
Muon's Adam half norms and biases too, Adafactor without the learning rate.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from training.optimizer import param_groups, per_matrix

# Fields of optax's states that are moments, whatever the optimizer.
_MOMENTS = ('mu', 'nu', 'm1', 'm2')


@dataclasses.dataclass(kw_only=True)
class MuonConfig:
  """Of hidden matrices; embeddings, head, router and vectors are AdamW's."""

  momentum: float = 0.95
  newton_schulz_steps: int = 5
  adam_peak_lr: float = 2e-3  # AdamW's; it follows the schedule of peak_lr


@dataclasses.dataclass(kw_only=True)
class AdafactorConfig:
  """Defaults of optax and of the paper."""

  decay_exponent: float = 0.8  # step t forgets 1 - t^-decay_exponent
  min_factored_size: int = 128  # of a matrix's smaller side; below, keep all
  clip_rms: float = 1.0  # of a matrix's update
  scale_by_parameter: bool = True  # peak_lr is relative to a matrix's RMS


@dataclasses.dataclass(kw_only=True)
class AdemamixConfig:
  """The slow momentum; both numbers are reached at the last step."""

  beta3: float = 0.9999
  alpha: float = 5.0  # its weight beside the fast one


def muon(
  is_hidden: Any,
  others: optax.GradientTransformation,
  config: MuonConfig,
  dtype: jnp.dtype,
  in_turn: Any,
) -> optax.GradientTransformation:
  """Orthogonalises the momentum of hidden matrices (Jordan et al. 2024).

  An update of spectral norm about sqrt(max(1, out / in)): of the two scalings
  in use the one that keeps what a step does to the activations independent of
  width (arXiv:2310.17813), so that muP's multipliers do not apply to it. The
  other one, 0.2 sqrt(max(in, out)), has Adam's root mean square instead
  (arXiv:2502.16982).

  Args:
    is_hidden: marks the matrices, in a tree like the parameters.
    others: what is done with all other parameters.
    config: momentum (Nesterov's) and iterations.
    dtype: the momentum is kept in.
    in_turn: marks stacks to be gone through layer by layer.
  """
  orthogonalize = contrib.scale_by_muon(
    beta=config.momentum,
    ns_steps=config.newton_schulz_steps,
    weight_dimension_numbers=contrib.MuonDimensionNumbers(0, 1),
  )
  ndims, in_turn = (
    param_groups.selected(is_hidden, tree)
    for tree in (jax.tree.map(lambda _: 2, is_hidden), in_turn)
  )
  return optax.partition(
    {
      'muon': optax.chain(
        stored_as(dtype, per_matrix.per_matrix(orthogonalize, ndims, in_turn)),
        optax.stateless(lambda updates, _: jax.tree.map(_by_shape, updates)),
      ),
      'others': others,
    },
    jax.tree.map(lambda hidden: 'muon' if hidden else 'others', is_hidden),
  )


def _by_shape(update: jax.Array) -> jax.Array:
  fan_in, fan_out = update.shape[-2:]
  return update * max(1, fan_out / fan_in) ** 0.5


def adafactor(
  own_ndims: Any, config: AdafactorConfig
) -> optax.GradientTransformation:
  """Divides by the root of a second moment that is kept as rows and columns.

  Args:
    own_ndims: see `per_matrix.per_matrix`.
    config: its numbers.

  Reference: arXiv:1804.04235, algorithm 4.
  """
  parts = [
    optax.scale_by_factored_rms(
      decay_rate=config.decay_exponent,
      min_dim_size_to_factor=config.min_factored_size,
    ),
    optax.clip_by_block_rms(config.clip_rms),
  ]
  if config.scale_by_parameter:
    parts.append(optax.scale_by_param_block_rms())
  return optax.chain(
    *(per_matrix.per_matrix(part, own_ndims) for part in parts)
  )


def ademamix(
  beta1: float,
  beta2: float,
  epsilon: float,
  config: AdemamixConfig,
  num_steps: int,
) -> optax.GradientTransformation:
  """Adam with a second, slow momentum (arXiv:2409.03137).

  Its weight and its memory grow over all of the run: alpha in proportion to the
  step, the half-life of beta3 from that of beta1 (equation 4).
  """

  def memory(step: jax.typing.ArrayLike) -> jax.Array:
    share = jnp.minimum(jnp.asarray(step) / num_steps, 1.0)
    # beta1 = 0 has no half-life: begin with one that is as good as none.
    first, last = math.log(max(beta1, 1e-8)), math.log(config.beta3)
    return jnp.exp(first * last / ((1 - share) * last + share * first))

  return contrib.scale_by_ademamix(
    beta1,
    beta2,
    memory,
    optax.linear_schedule(0.0, config.alpha, num_steps),
    epsilon,
  )


def stored_as(
  dtype: jnp.dtype, inner: optax.GradientTransformation
) -> optax.GradientTransformation:
  """Keeps all moments as `dtype` between steps; `inner` sees float32."""
  if dtype == jnp.float32:
    return inner

  def cast(state, to):
    moments = {
      field: jax.tree.map(lambda x: x.astype(to), getattr(state, field))
      for field in state._fields
      if field in _MOMENTS
    }
    return state._replace(**moments)

  def init(params):
    return cast(inner.init(params), dtype)

  def update(updates, state, params=None):
    updates, state = inner.update(updates, cast(state, jnp.float32), params)
    return updates, cast(state, dtype)

  return optax.GradientTransformation(init, update)
