"""One loss of three terms, each with a weight for every token.

    loss = policy_scale    * mean of -min(ratio A, clip(ratio) A)
         + imitation_scale * mean of -log p(target)
         + distance_scale  * mean of an estimator of KL(policy || reference)

An algorithm is the weights that it gives to tokens, as arrays of a batch; the
loss knows no algorithm. A mean is over the weights of its own term in the whole
batch, for any micro-batches and devices: a term that trains few tokens is as
strong as its scale says.

REINFORCE, RLOO, GRPO and their kin are policy terms with different advantages
(`training.objectives.advantages`), ratios and means; `policy/recipes.py` has
them by name, and `policy/ppo.py` adds a critic. Supervised fine-tuning is the
imitation term; distillation is the distance to a teacher.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from training.frozen_inputs import frozen_models
from training.objectives import (
  advantages as advantages_lib,
  divergences,
  port,
  routing,
)
from training.objectives.policy import (
  corrections,
  estimators,
  refusals,
  sequences,
  terms,
)

_ARRAY_BT = port.ArraySpec('BT', jnp.float32)
_EPSILON = 1e-8  # added to a deviation of advantages
TERMS = 'policy', 'imitation', 'distance'


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenLoss(port.Objective):
  """Policy gradient, imitation and distance; a scale of 0 leaves a term out.

  Arrays of a batch, float32 [B, T], of its targets:

    weights            of every term; or, with `is_stamped`, for each term
    policy_weights,    weights of its own, at least 0
    imitation_weights,
    distance_weights
    advantages, old_logprobs   of the policy term: how much better than expected
                       a token was, and its log-probability when it was drawn
    ref_logprobs       of the distance: log p(target) under the reference; not
                       for `full`

  For fixed data, training/frozen_inputs/reference.py computes `ref_logprobs`
  once. Where the policy samples its own text (`is_sampled`), `annotate` makes
  `ref_logprobs` and `old_logprobs`.
  """

  policy_scale: float = 0.0
  imitation_scale: float = 0.0
  distance_scale: float = 0.0
  is_stamped: bool = False  # whether each term has an array of weights
  # token: each mean is over tokens. sequence: over completions, of their means.
  # constant: the sum, divided by the number of completions x max_length.
  aggregation: str = terms.TOKEN
  max_length: int = 0  # for constant: the most sampled tokens of a completion
  # Whether batches are sampled by the policy while it trains.
  is_sampled: bool = False
  # Sampled batches: the policy that ratios compare with. recomputed: the policy
  # before the first step on a batch, which costs a forward pass. own: the
  # policy itself, for one step on each batch: all ratios are 1. sampler: the
  # log-probabilities that the sampler gave, `sampler_logprobs`.
  proximal: str = refusals.RECOMPUTED
  # Temperature of the sampling distribution: it divides the logits.
  temperature: float = 1.0
  # token | sequence: ratios of new to old probability, of each token or of the
  # whole completion (GSPO).
  ratio: str = terms.TOKEN
  # clipped | cispo: the gradient ends at the limits of the ratio (PPO), or the
  # limited ratio is a weight and every token has a gradient (CISPO).
  form: str = terms.CLIPPED
  # The ratio counts from 1 - clip_low to 1 + clip_high; DAPO raises clip_high.
  # 0 for both: no limits.
  clip_low: float = 0.2
  clip_high: float = 0.2
  # Whether advantages are scaled to mean 0 and variance 1 over the tokens of
  # each step's batch (PPO, REINFORCE++).
  is_whitened: bool = False
  # Sampled batches: factor of log(policy / reference) of each token, which is
  # subtracted from the rewards. Unlike the distance, it counts the effect of a
  # token on the divergence of all tokens after it.
  kl_reward: float = 0.0
  # Sampled batches: importance weights against the sampler.
  correction: corrections.Correction = corrections.Correction()
  # k1 | k2 | k3 | k3_unbiased | full: estimator of the distance.
  distance: str = 'k2'
  # Frozen directory of the reference, or of a teacher; '': config.init_from.
  reference: str = ''
  # Recipe of the array `advantages`, for the program that makes batches.
  advantages: advantages_lib.Advantages = advantages_lib.Advantages()

  def validate(self):
    for name in TERMS:
      scale = self._scale(name)
      if not 0 <= scale < math.inf:
        raise ValueError(
          f'objective.{name}_scale: got {scale}, expected a number of at least'
          ' 0; 0 leaves the term out'
        )
    if not self._active:
      raise ValueError(
        'objective: got 0 for policy_scale, imitation_scale and distance_scale,'
        ' expected at least one term; set one of them above 0'
      )
    refusals.check(self)
    if self._is_full and not self.reference:
      raise ValueError(
        "objective.reference: got '' with objective.distance = full, expected"
        ' the frozen directory of a reference or teacher, whose whole'
        ' distribution each step computes; set it'
      )

  def check_start(self, init_from):
    super().check_start(init_from)
    if self._active != ('distance',):
      return
    frozen_models.refuse_same(
      'objective.reference', self.reference or init_from, init_from
    )

  def _scale(self, term: str) -> float:
    return getattr(self, f'{term}_scale')

  @property
  def _active(self) -> tuple[str, ...]:
    return tuple(term for term in TERMS if self._scale(term))

  @property
  def _is_full(self) -> bool:
    return bool(self.distance_scale) and self.distance == refusals.FULL

  @property
  def examples(self):
    # Only the batches show which records hold stamped arrays.
    return 'text', 'chat', 'pairs', 'labelled'

  @property
  def sampled_at(self):
    return self.temperature

  @property
  def predicts_text(self):
    return False

  def batch_spec(self):
    spec = {**port.TOKEN_ROWS}
    if self.is_stamped:
      del spec['weights']
      spec |= {f'{term}_weights': _ARRAY_BT for term in self._active}
    if self.policy_scale:
      spec['advantages'] = _ARRAY_BT
    if self._old:
      spec[self._old] = _ARRAY_BT
    if self._is_corrected:
      spec['sampler_logprobs'] = _ARRAY_BT
    if self._reads_reference:
      spec['ref_logprobs'] = _ARRAY_BT
    return spec

  @property
  def annotated(self):
    if not self.is_sampled:
      return ()
    return tuple(
      name
      for name in ('old_logprobs', 'ref_logprobs')
      if name in self.batch_spec()
    )

  @property
  def logprobs_needed(self):
    if self.is_sampled or not self._reads_reference:
      return {}
    return {'ref_logprobs': port.ModelSource(self.reference)}

  @property
  def models_needed(self):
    if not self._is_full and not (self.is_sampled and self._reads_reference):
      return {}
    return {'reference': port.ModelSource(self.reference)}

  @property
  def _reads_reference(self) -> bool:
    """Whether batches have the log-probabilities of a reference."""
    is_estimated = bool(self.distance_scale) and not self._is_full
    return is_estimated or bool(self.kl_reward)

  @property
  def _old(self) -> str:
    """The array of log-probabilities that ratios compare with; '': own."""
    if not self.policy_scale or self.proximal == refusals.OWN:
      return ''
    is_sampler = self.proximal == refusals.SAMPLER
    return 'sampler_logprobs' if is_sampler else 'old_logprobs'

  @property
  def is_penalised(self) -> bool:
    """Whether the loss subtracts `kl_reward` from the advantages."""
    return bool(self.kl_reward)

  @property
  def _is_corrected(self) -> bool:
    return self.correction.level != corrections.NONE

  def annotate(self, params, batch, model, *, reference=None):
    """Returns `old_logprobs` and `ref_logprobs`, as far as they are read."""
    own = None
    if 'old_logprobs' in self.annotated:
      own = self._own(params, batch, model)
    return self._annotations(own, batch, reference)

  def _annotations(self, own, batch, reference):
    found = {}
    if 'old_logprobs' in self.annotated:
      found['old_logprobs'] = own.logprobs_BT
    if 'ref_logprobs' in self.annotated:
      assert reference is not None
      theirs = self._own(reference.params, batch, reference.model)
      found['ref_logprobs'] = theirs.logprobs_BT
    # The target of padding may be an id without a token, of probability 0.
    return {
      name: jnp.where(batch['segment_ids'] > 0, values_BT, 0.0)
      for name, values_BT in found.items()
    }

  def _own(self, params, batch, model) -> '_Own':
    """Returns the log-probabilities of the targets under a model."""
    hidden = model.hidden(
      params, batch['tokens'], batch['positions'], batch['segment_ids']
    )
    logprobs_BT, entropy_BT = model.token_logprobs_and_entropy(
      params, hidden.states_BTD, batch['targets'], self.temperature
    )
    return _Own(hidden, logprobs_BT, entropy_BT)

  def _weights(self, batch, term):
    return batch[f'{term}_weights' if self.is_stamped else 'weights']

  def _num_tokens(self, batch):
    """Returns the number of targets that any term trains."""
    is_trained_BT = sum(self._weights(batch, term) for term in self._active) > 0
    return jnp.sum(is_trained_BT, dtype=jnp.float32)

  def _shares(self, batch, term) -> terms.Shares:
    weights_BT = self._weights(batch, term)
    return terms.shares(self.aggregation, weights_BT, batch, self.max_length)

  def totals(self, params, batch, model, **others):
    """Returns the denominator of each term, and counts of tokens."""
    del params, model, others
    sums: port.Sums = {
      **{term: self._shares(batch, term).count for term in self._active},
      'tokens': self._num_tokens(batch),
      'real_tokens': routing.num_real(batch),
    }
    if self.is_whitened:
      weights_BT = self._weights(batch, 'policy')
      old_BT = batch[self._old] if self.is_penalised else None
      advantages_BT = self._penalised(batch, old_BT)
      for name, power in ('mean', 1), ('square', 2):
        total = jnp.sum(advantages_BT**power * weights_BT)
        sums[name] = port.Mean(total, jnp.sum(weights_BT))
    return sums

  def __call__(self, params, batch, model, *, totals, reference=None):
    """Returns the summed loss, and sums.

    Returns:
      The sums: `weight`, the number of trained targets; each term by its name.
      For the policy term, as means over tokens: `entropy`; `ratio`;
      `clipped_low` and `clipped_high`, the shares beyond the limits of the
      ratio; `old_kl`, the divergence from the old policy; `reference_kl`, the
      divergence from the reference, if the reward has it; and the sums of the
      correction.
    """
    own = self._own(params, batch, model)
    found: dict[str, jax.Array] = {}
    sums: port.Sums = {}
    old_BT = batch[self._old] if self._old else None
    if old_BT is None:
      # The policy's own tokens have a ratio of 1, with the gradient of a
      # probability.
      old_BT = jax.lax.stop_gradient(own.logprobs_BT)
    if self.policy_scale:
      found['policy'], sums = self._policy(own, old_BT, batch, totals)
    if self.imitation_scale:
      found['imitation'] = -own.logprobs_BT
    if self._is_full:
      assert reference is not None  # one of `models_needed`
      # KL(policy || reference) of the next token at each place.
      found['distance'] = divergences.over_vocabulary(
        lambda own_BtV, their_BtV, _: divergences.reverse(
          jax.nn.log_softmax(their_BtV / self.temperature),
          jax.nn.log_softmax(own_BtV / self.temperature),
        ),
        params,
        own.hidden.states_BTD,
        model,
        reference,
        batch,
      )
    elif self.distance_scale:
      weights_BT = self._weights(batch, 'distance')
      found['distance'] = estimators.ESTIMATORS[self.distance](
        own.logprobs_BT - batch['ref_logprobs'],
        terms.ratios(own.logprobs_BT - old_BT, weights_BT, batch, terms.TOKEN),
      )
      if self._is_corrected:
        found['distance'] *= self._corrected(old_BT, batch)[0]
    more, more_sums = self._more_terms(params, own.hidden, batch)
    found, sums = found | more, sums | more_sums
    # The step divides by all tokens; each term is over its own denominator.
    loss = jnp.zeros(())
    for term, values_BT in found.items():
      mean = self._shares(batch, term).mean(values_BT)
      per_count = totals['tokens'] / jnp.maximum(totals[term], 1e-9)
      loss += self._scale(term) * per_count * mean.total
      sums[term] = mean
    if own.hidden.routing is not None:
      per_token = totals['tokens'] / jnp.maximum(totals['real_tokens'], 1.0)
      router_loss, routed = routing.losses(own.hidden.routing, batch, per_token)
      loss, sums = loss + router_loss, sums | routed
    return loss, {**sums, 'weight': self._num_tokens(batch)}

  def derived(self, metrics):
    """Returns the metrics with the effective sample size."""
    return (
      corrections.effective_size(metrics) if self._is_corrected else metrics
    )

  def _more_terms(self, params, hidden, batch):
    """Returns the values [B, T] of further terms, and their sums."""
    del params, hidden, batch
    return {}, {}

  def _policy(self, own, old_BT, batch, totals):
    """Returns the policy term of each token, [B, T], and sums."""
    weights_BT = self._weights(batch, 'policy')
    log_ratio_BT = own.logprobs_BT - old_BT
    ratio_BT = terms.ratios(log_ratio_BT, weights_BT, batch, self.ratio)
    advantages_BT = self._penalised(batch, jax.lax.stop_gradient(old_BT))
    if self.is_whitened:
      mean, square = (
        totals[name].total / jnp.maximum(totals[name].weight, 1e-9)
        for name in ('mean', 'square')
      )
      deviation = jnp.sqrt(jnp.maximum(square - mean**2, 0.0))
      advantages_BT = (advantages_BT - mean) / (deviation + _EPSILON)
    low, high = 1 - self.clip_low, 1 + self.clip_high
    if self.form == terms.CISPO:
      values_BT, means = terms.cispo(
        ratio_BT, advantages_BT, own.logprobs_BT, low, high
      )
    elif self.clip_low:
      values_BT, means = terms.clipped(ratio_BT, advantages_BT, low, high)
    else:
      values_BT, means = ratio_BT * advantages_BT, {}
    means |= {'ratio': ratio_BT, 'entropy': own.entropy_BT}
    if self._old:
      # k3 of tokens that the old policy drew: KL(old || new).
      limit = corrections.MAX_LOG
      log_BT = jnp.clip(log_ratio_BT, -limit, limit)
      means['old_kl'] = jnp.expm1(log_BT) - log_BT
    if self.kl_reward:  # for PPO too, whose rewards include it
      means['reference_kl'] = old_BT - batch['ref_logprobs']
    shares = terms.shares(terms.TOKEN, weights_BT, batch, 0)
    sums: port.Sums = {name: shares.mean(x) for name, x in means.items()}
    if self._is_corrected:
      importance_BT, found = self._corrected(old_BT, batch)
      values_BT, sums = values_BT * importance_BT, sums | found
    return -values_BT, sums

  def _penalised(self, batch, old_BT):
    """Returns the advantages minus the penalties from each token on."""
    advantages_BT = batch['advantages']
    if not self.is_penalised:
      return advantages_BT
    is_trained_BT = self._weights(batch, 'policy') > 0
    penalties_BT = jnp.where(
      is_trained_BT, self.kl_reward * (old_BT - batch['ref_logprobs']), 0.0
    )
    return advantages_BT - sequences.to_go(penalties_BT, batch)

  def _corrected(self, old_BT, batch):
    """Returns the importance weights against the sampler, and their sums."""
    log_ratio_BT = jax.lax.stop_gradient(old_BT) - batch['sampler_logprobs']
    return self.correction(log_ratio_BT, self._weights(batch, 'policy'), batch)


class _Own(NamedTuple):
  """The results of a forward pass."""

  hidden: port.Hidden
  logprobs_BT: jax.Array
  entropy_BT: jax.Array  # of the next token at each place, without gradient
