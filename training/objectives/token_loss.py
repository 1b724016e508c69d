"""One loss of three terms, each with a weight for every token.

    loss = policy_scale    * mean of -min(ratio A, clip(ratio) A)
         + imitation_scale * mean of -log p(target)
         + distance_scale  * mean of an estimator of KL(policy || reference)

An algorithm is the weights that it puts on tokens, as arrays of a batch; the
loss knows no algorithm. A mean is over the weights of its own term in the whole
batch, whatever the micro-batches and devices: a term that trains few tokens is
as strong as its scale says.

REINFORCE, RLOO, GRPO and PPO's policy loss are policy terms with different
advantages (`training.objectives.advantages`); supervised fine-tuning is the
imitation term; distillation is the distance to a teacher.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from checks import expect
from training import frozen_models
from training.objectives import advantages as advantages_lib, port, routing

_ARRAY_BT = port.ArraySpec('BT', jnp.float32)
TERMS = 'policy', 'imitation', 'distance'
RECOMPUTED, OWN, SAMPLER = PROXIMALS = 'recomputed', 'own', 'sampler'


def k1(log_ratio, importance):
  """Returns rho r, r = log(policy / reference).

  Its mean is the divergence, and its gradient's mean the divergence's, because
  the importance ratio rho has a gradient. Without rho, the mean of the gradient
  is 0: the classic mistake.
  """
  return importance * log_ratio


def k2(log_ratio, importance):
  """Returns r^2 / 2: a biased value, with the gradient of the divergence.

  Its gradient is r grad log p: that of `k1` without a part of mean 0.
  """
  del importance
  return jnp.square(log_ratio) / 2


def k3(log_ratio, importance):
  """Returns exp(-r) - 1 + r: an unbiased value of low variance, at least 0.

  Its gradient is that of KL(reference || policy), as in GRPO
  (arXiv:2402.03300, equation 4).
  """
  del importance
  return jnp.expm1(-log_ratio) + log_ratio


def k3_unbiased(log_ratio, importance):
  """Returns rho (exp(-r) - 1 + r): value and gradient of the divergence.

  As in DeepSeek-V3.2 (arXiv:2512.02556, section 3.1).
  """
  return importance * k3(log_ratio, importance)


# Estimators from the log-probability of the one token that was drawn, as in
# http://joschu.net/blog/kl-approx.html. They take tokens for samples of the
# policy; `full` sums over the vocabulary, and fits any text. The divergence is
# that of the next token given the tokens before it, which have no gradient.
ESTIMATORS = {'k1': k1, 'k2': k2, 'k3': k3, 'k3_unbiased': k3_unbiased}
FULL = 'full'


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenLoss(port.Objective):
  """Policy gradient, imitation and distance to a reference; a scale of 0: none.

  Arrays of a batch, float32 [B, T], of its targets:

    weights            of every term; or, with `is_stamped`, for each term
    policy_weights,    weights of its own, at least 0
    imitation_weights,
    distance_weights
    advantages, old_logprobs   of the policy term: how much better than expected
                       a token was, and its log-probability when it was drawn
    ref_logprobs       of the distance: log p(target) under the reference; not
                       for `full`

  Of fixed data, training/reference.py computes `ref_logprobs` once. Where the
  policy samples its own text (`is_sampled`), `annotate` makes `ref_logprobs`
  and `old_logprobs`.
  """

  policy_scale: float = 0.0
  imitation_scale: float = 0.0
  distance_scale: float = 0.0
  is_stamped: bool = False  # whether each term has an array of weights
  # Whether batches are sampled by the policy while it trains.
  is_sampled: bool = False
  # Sampled batches: the policy that ratios compare with. recomputed: the policy
  # before the first step on a batch, which costs a forward pass. own: the
  # policy itself, for one step on each batch: all ratios are 1. sampler: the
  # log-probabilities that the sampler gave, `sampler_logprobs`.
  proximal: str = RECOMPUTED
  # Of the distribution that was sampled from: it divides the logits.
  temperature: float = 1.0
  # The ratio of new to old probability counts from 1 - clip_low to 1 +
  # clip_high (PPO, arXiv:1707.06347, equation 7; DAPO raises clip_high). 0 for
  # both: no limits.
  clip_low: float = 0.2
  clip_high: float = 0.2
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
        ' expected a term at least; set one of them above 0'
      )
    expect.one_of('objective.distance', self.distance, (*ESTIMATORS, FULL))
    for name, term in (
      ('clip_low', 'policy'),
      ('clip_high', 'policy'),
      ('advantages', 'policy'),
      ('distance', 'distance'),
      ('reference', 'distance'),
    ):
      self._refuse_unused(name, term)
    if not 0 <= self.clip_low < 1 or not 0 <= self.clip_high < math.inf:
      raise ValueError(
        f'objective.clip_low, clip_high: got {self.clip_low} and'
        f' {self.clip_high}, expected 0 <= clip_low < 1 and clip_high >= 0;'
        ' 0 for both does not clip'
      )
    if (self.clip_low == 0) != (self.clip_high == 0):
      raise ValueError(
        f'objective.clip_low, clip_high: got {self.clip_low} and'
        f' {self.clip_high}, expected both above 0, or 0 for both: a ratio is 1'
        ' where the policy has not moved, and would never count beyond it'
      )
    self.advantages.validate()
    self._check_sampled()
    if self._is_full and not self.reference:
      raise ValueError(
        "objective.reference: got '' with objective.distance = full, expected"
        ' the frozen directory of a reference or teacher, whose whole'
        ' distribution each step computes; set it'
      )

  def _check_sampled(self):
    expect.one_of('objective.proximal', self.proximal, PROXIMALS)
    if not 0 < self.temperature < math.inf:
      raise ValueError(
        f'objective.temperature: got {self.temperature}, expected a number'
        ' above 0, the one that text is sampled with'
      )
    if self.is_sampled:
      return
    for name in ('proximal', 'temperature'):
      default = type(self).__dataclass_fields__[name].default
      if (value := getattr(self, name)) != default:
        raise ValueError(
          f'objective.{name}: got {value!r} with objective.is_sampled = False,'
          f' expected {default!r}: the batches are fixed data; set'
          f' objective.is_sampled, or leave {name} out'
        )

  def _refuse_unused(self, name, term):
    default = type(self).__dataclass_fields__[name].default
    value = getattr(self, name)
    if value != default and not self._scale(term):
      raise ValueError(
        f'objective.{name}: got {value!r} with objective.{term}_scale = 0,'
        f' expected {default!r}: the {term} term is left out; set its scale, or'
        f' leave {name} out'
      )

  def check_start(self, init_from):
    super().check_start(init_from)
    if self._active != ('distance',):
      return
    # The distance is 0 at its least, and the policy would start there.
    reference = self.reference or init_from
    if frozen_models.is_same(reference, init_from):
      raise ValueError(
        f'objective.reference: got the weights of config.init_from'
        f' ({init_from}), expected another model: a policy that only imitates'
        ' its teacher learns nothing from itself; set objective.reference to a'
        ' teacher, or a scale of another term'
      )

  def _scale(self, term: str) -> float:
    return getattr(self, f'{term}_scale')

  @property
  def _active(self) -> tuple[str, ...]:
    return tuple(term for term in TERMS if self._scale(term))

  @property
  def _is_full(self) -> bool:
    return bool(self.distance_scale) and self.distance == FULL

  @property
  def examples(self):
    # Which records hold stamped arrays is known once their batches are made.
    return 'text', 'chat', 'pairs', 'labelled'

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
    return bool(self.distance_scale) and not self._is_full

  @property
  def _old(self) -> str:
    """The array of log-probabilities that ratios compare with; '': its own."""
    if not self.policy_scale or (self.is_sampled and self.proximal == OWN):
      return ''
    is_sampler = self.is_sampled and self.proximal == SAMPLER
    return 'sampler_logprobs' if is_sampler else 'old_logprobs'

  def annotate(self, params, batch, model, *, reference=None):
    """Returns `old_logprobs` and `ref_logprobs`, as far as they are read."""
    found = {}
    if 'old_logprobs' in self.annotated:
      found['old_logprobs'] = self._logprobs(params, batch, model)[0]
    if 'ref_logprobs' in self.annotated:
      assert reference is not None
      found['ref_logprobs'] = self._logprobs(
        reference.params, batch, reference.model
      )[0]
    # The target of padding may be an id without a token, of probability 0.
    return {
      name: jnp.where(batch['segment_ids'] > 0, values_BT, 0.0)
      for name, values_BT in found.items()
    }

  def _logprobs(self, params, batch, model):
    """Returns log p(target), [B, T], and the hidden states."""
    hidden = model.hidden(
      params, batch['tokens'], batch['positions'], batch['segment_ids']
    )
    logprobs_BT = model.token_logprobs(
      params, hidden.states_BTD, batch['targets'], self.temperature
    )
    return logprobs_BT, hidden

  def _weights(self, batch, term):
    return batch[f'{term}_weights' if self.is_stamped else 'weights']

  def _num_tokens(self, batch):
    """Returns the number of targets that any term trains."""
    is_trained_BT = sum(self._weights(batch, term) for term in self._active) > 0
    return jnp.sum(is_trained_BT, dtype=jnp.float32)

  def totals(self, params, batch, model, **others):
    """Returns the sum of the weights of each term, and counts of tokens."""
    del params, model, others
    return {
      **{term: jnp.sum(self._weights(batch, term)) for term in self._active},
      'tokens': self._num_tokens(batch),
      'real_tokens': routing.num_real(batch),
    }

  def __call__(self, params, batch, model, *, totals, reference=None):
    """Returns the summed loss, and sums.

    Returns:
      The sums: `weight`, the number of trained targets; each term by its name;
      `ratio`, `clipped_low` and `clipped_high` of the policy term, the last two
      the shares of tokens whose gradient is cut off.
    """
    logprobs_BT, hidden = self._logprobs(params, batch, model)
    found = {}
    sums: port.Sums = {}
    importance_BT = self._importance(logprobs_BT, batch)
    if self.policy_scale:
      found['policy'], sums = self._policy(importance_BT, batch)
    if self.imitation_scale:
      found['imitation'] = -logprobs_BT
    if self._is_full:
      found['distance'] = _divergence(
        params, hidden.states_BTD, model, reference, batch, self.temperature
      )
    elif self.distance_scale:
      found['distance'] = ESTIMATORS[self.distance](
        logprobs_BT - batch['ref_logprobs'], importance_BT
      )
    # The step divides by all tokens; each term is over its own weights.
    loss = jnp.zeros(())
    for term, values_BT in found.items():
      mean = _mean(values_BT, self._weights(batch, term))
      per_weight = totals['tokens'] / jnp.maximum(totals[term], 1e-9)
      loss += self._scale(term) * per_weight * mean.total
      sums[term] = mean
    if hidden.routing is not None:
      per_token = totals['tokens'] / jnp.maximum(totals['real_tokens'], 1.0)
      router_loss, routed = routing.losses(hidden.routing, batch, per_token)
      loss, sums = loss + router_loss, sums | routed
    return loss, {**sums, 'weight': self._num_tokens(batch)}

  def _importance(self, logprobs_BT, batch):
    """Returns new over old probability, of tokens that the policy drew."""
    # Without them, the tokens count as the policy's own: a ratio of 1, with the
    # gradient of a probability.
    old_BT = jax.lax.stop_gradient(logprobs_BT)
    if self._old:
      old_BT = batch[self._old]
    # exp(20) is far beyond any clip, and still has a finite gradient.
    return jnp.exp(jnp.clip(logprobs_BT - old_BT, -20.0, 20.0))

  def _policy(self, ratio_BT, batch):
    advantages_BT = batch['advantages']
    weights_BT = self._weights(batch, 'policy')
    objective_BT = ratio_BT * advantages_BT
    sums: port.Sums = {'ratio': _mean(ratio_BT, weights_BT)}
    if self.clip_low or self.clip_high:
      low, high = 1 - self.clip_low, 1 + self.clip_high
      clipped_BT = jnp.clip(ratio_BT, low, high) * advantages_BT
      objective_BT = jnp.minimum(objective_BT, clipped_BT)
      sums |= {
        'clipped_low': _mean(
          (ratio_BT < low) & (advantages_BT < 0), weights_BT
        ),
        'clipped_high': _mean(
          (ratio_BT > high) & (advantages_BT > 0), weights_BT
        ),
      }
    return -objective_BT, sums


def _mean(values_BT, weights_BT) -> port.Mean:
  # A target that is not trained may be an id without a token: 0 x inf.
  weighted_BT = jnp.where(weights_BT > 0, values_BT * weights_BT, 0.0)
  return port.Mean(jnp.sum(weighted_BT), jnp.sum(weights_BT))


def _divergence(
  params, states_BTD, model, reference, batch, temperature
) -> jax.Array:
  """Returns KL(policy || reference) of the next token at each place, [B, T]."""
  hidden = reference.model.hidden(
    reference.params,
    batch['tokens'],
    batch['positions'],
    batch['segment_ids'],
  )

  # Without it, the backward pass would keep the logits of all chunks.
  @jax.checkpoint
  def of_chunk(states, targets_Bt):
    del targets_Bt
    own_BtD, their_BtD = states
    own_BtV = jax.nn.log_softmax(model.logits(params, own_BtD) / temperature)
    their_BtV = jax.nn.log_softmax(
      reference.model.logits(reference.params, their_BtD) / temperature
    )
    return jnp.sum(jnp.exp(own_BtV) * (own_BtV - their_BtV), axis=-1)

  return model.map_chunks(
    of_chunk, (states_BTD, hidden.states_BTD), batch['targets']
  )
