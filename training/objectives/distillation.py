"""Distillation: a student becomes like a frozen teacher, token by token.

    objective = distillation.Distillation(teacher='runs/teacher/frozen')

The loss of a token is a divergence between the teacher's and the student's
distribution of it, both softened by one temperature. A share of the loss may be
the cross-entropy of the text itself:

    (1 - imitation_share) T^2 D(P_T, Q_T) + imitation_share (-log Q(target))

It fits any text: that of a data set, completions of the teacher
(sequence-level, `studies/answers.py`), or the student's own (on-policy, with
`config.rollouts`). The teacher is computed in every step; or, with `top_k`, its
k likeliest tokens are computed once before the first step and kept on disk.

References: Hinton et al. 2015 (arXiv:1503.02531), section 2: temperature and
T^2; Kim & Rush 2016 (arXiv:1606.07947); Agarwal et al. 2023, GKD
(arXiv:2306.13649); Gu et al. 2023, MiniLLM (arXiv:2306.08543): reverse KL.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from checks import expect
from training.frozen_inputs import frozen_models
from training.objectives import divergences, port, routing

FORWARD, REVERSE, JENSEN_SHANNON = 'forward', 'reverse', 'jensen_shannon'
DIVERGENCES = FORWARD, REVERSE, JENSEN_SHANNON
_BETA = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distillation(port.Objective):
  """The divergence of a student from its teacher."""

  teacher: str = ''  # frozen directory; the same tokenizer as the run
  # forward: KL(teacher || student). reverse: KL(student || teacher).
  # jensen_shannon: between them, by `beta`.
  divergence: str = FORWARD
  # For jensen_shannon: the teacher's share in the mixture that both models are
  # compared with. Near 0 it is like forward, near 1 like reverse.
  beta: float = _BETA
  # Divides both models' logits. Above 1, improbable tokens count more.
  temperature: float = 1.0
  # Whether the divergence is multiplied by temperature^2, so that its gradient
  # has the same size at every temperature (Hinton, section 2.1).
  is_rescaled: bool = True
  # Share of the loss that is the cross-entropy of the text, without a
  # temperature.
  imitation_share: float = 0.0
  # 0: the teacher is computed in each step. k: its k likeliest tokens of each
  # place are computed once and kept, 8 k bytes per token of text; all others
  # count as one token, so the divergence is at most that of the whole
  # distributions. The teacher then takes no memory while the student trains.
  top_k: int = 0

  def validate(self):
    if not self.teacher:
      raise ValueError(
        "objective.teacher: got '', expected the frozen directory of a teacher"
        ' with the tokenizer of this run; set it'
      )
    expect.one_of('objective.divergence', self.divergence, DIVERGENCES)
    if not 0 < self.beta < 1:
      raise ValueError(
        f'objective.beta: got {self.beta}, expected a number above 0 and below'
        ' 1; at the ends the divergences are objective.divergence = forward'
        ' and reverse'
      )
    if self.beta != _BETA and self.divergence != JENSEN_SHANNON:
      raise ValueError(
        f'objective.beta: got {self.beta} with objective.divergence ='
        f' {self.divergence}, expected {_BETA}: only {JENSEN_SHANNON} has it;'
        ' leave it out, or take that divergence'
      )
    if not 0 < self.temperature < math.inf:
      raise ValueError(
        f'objective.temperature: got {self.temperature}, expected a number'
        ' above 0; 1 leaves the distributions as they are'
      )
    expect.at_least('objective.top_k', self.top_k, 0)
    if not 0 <= self.imitation_share < 1:
      raise ValueError(
        f'objective.imitation_share: got {self.imitation_share}, expected a'
        ' number from 0 to below 1; for 1, take the default objective, which'
        ' needs no teacher'
      )

  def check_start(self, init_from):
    super().check_start(init_from)
    frozen_models.refuse_same('objective.teacher', self.teacher, init_from)

  @property
  def models_needed(self):
    return {} if self.top_k else {'teacher': port.ModelSource(self.teacher)}

  @property
  def top_tokens_needed(self):
    if not self.top_k:
      return {}
    source = port.ModelSource(self.teacher)
    return {'teacher': port.TopTokens(source, self.top_k, self.temperature)}

  def batch_spec(self):
    spec = {**port.TOKEN_ROWS}
    for name, top in self.top_tokens_needed.items():
      spec |= top.specs(name)
    return spec

  def totals(self, params, batch, model, **others):
    """Returns the denominators of the routers' losses of a mixture."""
    del params, others
    if not model.module.config.num_experts:
      return None
    return {
      'weight': jnp.sum(batch['weights']),
      'real_tokens': routing.num_real(batch),
    }

  def __call__(self, params, batch, model, *, teacher=None, totals=None):
    """Returns the loss, summed over targets by their weights, and sums.

    Returns:
      The sums: `weight`; `nll`, the cross-entropy of the text, which evaluation
      reports as the loss; `divergence`, at the temperature and before it is
      rescaled; `teacher_nll`, the teacher's cross-entropy, unless the teacher
      is known by its likeliest tokens only; `agreement`, the share of targets
      where both models have the same most probable token.
    """
    hidden = model.hidden(
      params, batch['tokens'], batch['positions'], batch['segment_ids']
    )
    if self.top_k:
      found = self._of_known(params, hidden.states_BTD, model, batch)
    else:
      assert teacher is not None  # one of `models_needed`
      found = divergences.over_vocabulary(
        self._of_logits, params, hidden.states_BTD, model, teacher, batch
      )
    weights_BT = batch['weights']
    is_trained_BT = weights_BT > 0
    # An untrained target may be an id without a token: this avoids 0 x inf.
    found = {
      name: jnp.where(is_trained_BT, values_BT, 0.0)
      for name, values_BT in found.items()
    }
    sums: port.Sums = {'weight': jnp.sum(weights_BT)}
    sums['nll'] = jnp.sum(weights_BT * found['nll'])
    for name in ('divergence', *({'teacher_nll'} & found.keys())):
      total = jnp.sum(weights_BT * found[name])
      sums[name] = port.Mean(total, sums['weight'])
    sums['agreement'] = port.Share(
      jnp.sum(found['agreement']), jnp.sum(is_trained_BT, dtype=jnp.float32)
    )
    scale = self.temperature**2 if self.is_rescaled else 1.0
    loss = (1 - self.imitation_share) * scale * sums['divergence'].total
    if self.imitation_share:
      loss += self.imitation_share * sums['nll']
    if hidden.routing is not None:
      assert totals is not None  # `totals` returns some with experts
      per_token = totals['weight'] / jnp.maximum(totals['real_tokens'], 1.0)
      router_loss, routed = routing.losses(hidden.routing, batch, per_token)
      loss, sums = loss + router_loss, sums | routed
    return loss, sums

  def _of_known(self, params, states_BTD, model, batch):
    """Returns the figures of each token, [B, T], by the arrays of a batch."""

    # Without it, the backward pass would keep the logits of all chunks.
    @jax.checkpoint
    def of_chunk(chunk, targets_Bt):
      states_BtD, ids_Btk, their_Btk = chunk
      own_BtV = model.logits(params, states_BtD)
      is_same_Bt = jnp.argmax(own_BtV, -1) == ids_Btk[:, :, 0]
      own_Btk = divergences.coarse(own_BtV / self.temperature, ids_Btk)
      return {
        'divergence': self._divergence(their_Btk, own_Btk),
        'nll': _nll(own_BtV, targets_Bt),
        'agreement': is_same_Bt.astype(jnp.float32),
      }

    known = batch['teacher_ids'], batch['teacher_logprobs']
    return model.map_chunks(of_chunk, (states_BTD, *known), batch['targets'])

  def _of_logits(self, own_BtV, their_BtV, targets_Bt):
    """Returns the figures of each token, [B, t] each."""
    is_same_Bt = jnp.argmax(own_BtV, -1) == jnp.argmax(their_BtV, -1)
    return {
      'divergence': self._divergence(
        jax.nn.log_softmax(their_BtV / self.temperature),
        jax.nn.log_softmax(own_BtV / self.temperature),
      ),
      'nll': _nll(own_BtV, targets_Bt),
      'teacher_nll': _nll(their_BtV, targets_Bt),
      'agreement': is_same_Bt.astype(jnp.float32),
    }

  def _divergence(self, theirs, own):
    if self.divergence == FORWARD:
      return divergences.forward(theirs, own)
    if self.divergence == REVERSE:
      return divergences.reverse(theirs, own)
    return divergences.jensen_shannon(theirs, own, self.beta)


def _nll(logits_BtV: jax.Array, targets_Bt: jax.Array) -> jax.Array:
  """Returns -log p(target) of each token."""
  logprobs_BtV = jax.nn.log_softmax(logits_BtV)
  found_Bt1 = jnp.take_along_axis(logprobs_BtV, targets_Bt[:, :, None], -1)
  return -found_Bt1[:, :, 0]
