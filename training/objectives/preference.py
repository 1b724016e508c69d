"""Direct preference optimisation: a policy learns from preferred completions.

One objective for all losses; `training.objectives.preference_losses` has their
formulas. Rows hold units of two documents (data/rows.py): the chosen and the
rejected completion of a prompt, or for KTO a labelled completion and one that
belongs to another prompt. The reference is a frozen model. Its
log-probabilities are an array of the batch, which
training/frozen_inputs/reference.py computes once.

    objective = preference.Preference(loss='dpo', beta=0.1)
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from checks import expect
from training.objectives import port, preference_losses, routing, segments
from training.objectives.preference_losses import LOSSES, UNSET

_ARRAY_BT = port.ArraySpec('BT', jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preference(port.Objective):
  """A loss of preferences. An option that the loss does not have is refused."""

  loss: str = 'dpo'  # one of `preference_losses.LOSSES`
  # Strength of the tie to the reference; tau of IPO, lambda of ORPO. -1: the
  # default of the loss, 2 for SimPO and 0.1 for the others.
  beta: float = UNSET
  # Probability that a label is wrong. dpo trusts labels less; robust corrects
  # for the flipped labels.
  label_smoothing: float = 0.0
  # Whether log ratios are means over tokens, not sums: dpo, robust, ipo. The
  # means of orpo and simpo are part of their definition.
  length_normalised: bool = False
  gamma: float = UNSET  # target margin of SimPO; -1: 1
  # Weight of the chosen completions' cross-entropy in nats per token. -1: 1 for
  # orpo and cpo, which are defined with it, else 0.
  imitation_weight: float = UNSET
  # Weights of KTO's two kinds of examples. Where labels are uneven, the paper
  # wants desirable_weight x desirable examples within 1 to 4/3 of
  # undesirable_weight x undesirable ones (equation 8).
  desirable_weight: float = 1.0
  undesirable_weight: float = 1.0
  reference: str = ''  # frozen directory; '': config.init_from

  def validate(self):
    expect.one_of('objective.loss', self.loss, LOSSES)
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.name in ('loss', 'beta', *self._loss.options):
        self._check_range(field.name, value)
      elif value != field.default:
        raise ValueError(
          f'objective.{field.name}: got {value!r} with objective.loss ='
          f' {self.loss}, expected {field.default!r}: this loss has no such'
          ' option; leave it out, or take another loss'
        )

  def _check_range(self, name, value):
    if name == 'label_smoothing':
      ok, expected = 0 <= value < 0.5, 'a number from 0 to below 0.5'
    elif name == 'beta':
      ok, expected = 0 < value < math.inf or value == UNSET, 'a number above 0'
    elif name in ('gamma', 'imitation_weight'):
      ok = 0 <= value < math.inf or value == UNSET
      expected = "a number of at least 0, or -1 for the loss's default"
    elif name in ('desirable_weight', 'undesirable_weight'):
      ok, expected = 0 < value < math.inf, 'a number above 0'
    else:
      return
    if not ok:
      raise ValueError(f'objective.{name}: got {value}, expected {expected}')

  @property
  def _loss(self) -> preference_losses.Loss:
    return LOSSES[self.loss]

  @property
  def _beta(self) -> float:
    return self._loss.beta if self.beta == UNSET else self.beta

  @property
  def _imitation_weight(self) -> float:
    given = self.imitation_weight
    return self._loss.imitation_weight if given == UNSET else given

  @property
  def examples(self):
    return ('pairs',) if self._loss.of_pairs else ('labelled',)

  @property
  def predicts_text(self):
    return False

  @property
  def logprobs_needed(self):
    if not self._loss.has_reference:
      return {}
    return {'ref_logprobs': port.ModelSource(self.reference)}

  def batch_spec(self):
    spec = {**port.TOKEN_ROWS}
    if self._loss.has_reference:
      spec['ref_logprobs'] = _ARRAY_BT
    if not self._loss.of_pairs:
      spec['labels'] = _ARRAY_BT
    return spec

  def totals(self, params, batch, model, **others):
    """Returns the denominators of terms that are not means over units.

    For KTO, also the log ratios of mismatched completions: a forward pass of
    its own, because the loss of every example depends on their mean.
    """
    del others
    is_mixture = bool(model.module.config.num_experts)
    if not (is_mixture or self._imitation_weight or self.loss == 'kto'):
      return None
    lengths_BU2 = segments.sums(batch['weights'], batch['segment_ids'])
    is_unit_BU = self._is_unit(lengths_BU2)
    sums: port.Sums = {
      'units': _count(is_unit_BU),
      'chosen_tokens': _sum(is_unit_BU, lengths_BU2[:, :, 0]),
      'real_tokens': routing.num_real(batch),
    }
    if self.loss == 'kto':
      logprobs_BU2, _ = self._logprobs(params, batch, model)
      is_there_BU = lengths_BU2[:, :, 1] > 0
      sums['divergence'] = port.Mean(
        _sum(is_there_BU, logprobs_BU2.ratios[:, :, 1]), _count(is_there_BU)
      )
    return sums

  def __call__(self, params, batch, model, *, totals: Any = None, **others):
    """Returns the loss, summed over units, and sums.

    Returns:
      The sums: `weight`, the number of units; `tokens`, the trained targets of
      them; and as means over units accuracy, margin, rewards (beta x score) and
      log-probabilities of chosen and rejected completions. KTO has them as
      means over desirable and undesirable examples, and its `kl`.
    """
    del others
    logprobs, hidden = self._logprobs(params, batch, model)
    lengths_BU2 = segments.sums(batch['weights'], batch['segment_ids'])
    is_unit_BU = self._is_unit(lengths_BU2)
    if self._loss.of_pairs:
      loss, sums = self._of_pairs(logprobs, lengths_BU2, is_unit_BU)
    else:
      labels_BU = segments.sums(batch['labels'], batch['segment_ids'])[:, :, 0]
      loss, sums = self._of_examples(
        logprobs, labels_BU > 0, is_unit_BU, totals['divergence']
      )
    sums['weight'] = _count(is_unit_BU)
    sums['tokens'] = _sum(is_unit_BU, self._trained(lengths_BU2))
    if self._imitation_weight:
      nll = -_sum(is_unit_BU, logprobs.own[:, :, 0])
      num_tokens = _sum(is_unit_BU, lengths_BU2[:, :, 0])
      sums['chosen_nll'] = port.Mean(nll, num_tokens)
      # A mean over all tokens of the batch. It cancels the step's factor
      # 1 / units.
      per_token = _ratio(totals['units'], totals['chosen_tokens'])
      loss += self._imitation_weight * per_token * nll
    if hidden.routing is not None:
      per_token = _ratio(totals['units'], totals['real_tokens'])
      router_loss, routed = routing.losses(hidden.routing, batch, per_token)
      loss, sums = loss + router_loss, sums | routed
    return loss, sums

  def _is_unit(self, lengths_BU2):
    """Returns the units that are trained; the others are padding."""
    if self._loss.of_pairs:
      return jnp.all(lengths_BU2 > 0, axis=2)
    return lengths_BU2[:, :, 0] > 0

  def _trained(self, lengths_BU2):
    if self._loss.of_pairs:
      return jnp.sum(lengths_BU2, axis=2)
    return lengths_BU2[:, :, 0]

  def _logprobs(self, params, batch, model):
    """Returns the log-probabilities of completions, and the hidden states."""
    hidden = model.hidden(
      params, batch['tokens'], batch['positions'], batch['segment_ids']
    )
    own_BT = model.token_logprobs(params, hidden.states_BTD, batch['targets'])
    weights_BT, segment_ids_BT = batch['weights'], batch['segment_ids']

    def sums(logprobs_BT):
      # An id that no token has may be an untrained target, of probability 0.
      counted_BT = jnp.where(weights_BT > 0, logprobs_BT * weights_BT, 0.0)
      return segments.sums(counted_BT, segment_ids_BT)

    own_BU2 = sums(own_BT)
    if not self._loss.has_reference:
      return _Logprobs(own_BU2, own_BU2), hidden
    # Subtracted token by token before the sum: the difference of two sums of
    # hundreds of nats would have lost its last digits.
    return _Logprobs(own_BU2, sums(own_BT - batch['ref_logprobs'])), hidden

  def _of_pairs(self, logprobs, lengths_BU2, is_unit_BU):
    scores_BU2 = logprobs.ratios
    if self._loss.is_per_token or self.length_normalised:
      scores_BU2 = scores_BU2 / jnp.maximum(lengths_BU2, 1.0)
    # Absent units get a score of their own, which keeps their gradient finite;
    # it is then multiplied by 0.
    scores_BU2 = jnp.where(is_unit_BU[:, :, None], scores_BU2, -1.0)
    chosen_BU, rejected_BU = scores_BU2[:, :, 0], scores_BU2[:, :, 1]
    gamma = self._loss.gamma if self.gamma == UNSET else self.gamma
    options = preference_losses.Options(self._beta, self.label_smoothing, gamma)
    assert self._loss.of_pairs is not None
    losses_BU = self._loss.of_pairs(chosen_BU, rejected_BU, options)
    means = {
      'accuracy': (chosen_BU > rejected_BU).astype(jnp.float32),
      'margin': self._beta * (chosen_BU - rejected_BU),
      'chosen_reward': self._beta * chosen_BU,
      'rejected_reward': self._beta * rejected_BU,
      'chosen_logprob': logprobs.own[:, :, 0],
      'rejected_logprob': logprobs.own[:, :, 1],
    }
    return _sum(is_unit_BU, losses_BU), _means(is_unit_BU, means)

  def _of_examples(self, logprobs, is_desirable_BU, is_unit_BU, divergence):
    scores_BU = logprobs.ratios[:, :, 0]
    kl = jnp.maximum(_ratio(divergence.total, divergence.weight), 0.0)
    weights_BU = jnp.where(
      is_desirable_BU, self.desirable_weight, self.undesirable_weight
    )
    losses_BU = weights_BU * preference_losses.kto(
      scores_BU, is_desirable_BU, self._beta, kl
    )
    kinds = {
      'chosen': is_unit_BU & is_desirable_BU,
      'rejected': is_unit_BU & ~is_desirable_BU,
    }
    sums: port.Sums = {}
    for side, is_of_kind_BU in kinds.items():
      sums |= _means(
        is_of_kind_BU,
        {
          f'{side}_reward': self._beta * scores_BU,
          f'{side}_logprob': logprobs.own[:, :, 0],
        },
      )
    # An example is right if its score is above `kl` and it is desirable, or if
    # neither holds.
    is_right_BU = (scores_BU > kl) == is_desirable_BU
    sums |= _means(
      is_unit_BU,
      {
        'accuracy': is_right_BU.astype(jnp.float32),
        'kl': jnp.broadcast_to(kl, scores_BU.shape),
      },
    )
    return _sum(is_unit_BU, losses_BU), sums


@dataclasses.dataclass(frozen=True)
class _Logprobs:
  """Log-probabilities of the documents of units, [B, units, 2]."""

  own: jax.Array
  ratios: jax.Array  # minus the reference's, where the loss has a reference


def _count(mask: jax.Array) -> jax.Array:
  return jnp.sum(mask, dtype=jnp.float32)


def _sum(mask: jax.Array, values: jax.Array) -> jax.Array:
  return jnp.sum(jnp.where(mask, values, 0.0))


def _means(mask: jax.Array, values: dict[str, jax.Array]) -> dict[str, Any]:
  count = _count(mask)
  return {
    name: port.Mean(_sum(mask, value), count) for name, value in values.items()
  }


def _ratio(total: jax.Array, weight: jax.Array) -> jax.Array:
  return total / jnp.maximum(weight, 1e-9)
