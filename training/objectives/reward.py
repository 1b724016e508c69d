"""The reward model: which of two answers people prefer, from pairs.

A scalar head reads the final hidden state at the last token of each answer
(`models/layers/reward_head.py`). With r(x, y) the reward of answer y to prompt
x, a pair of a chosen answer c and a rejected one j has the loss

    -log sigmoid(r(x, c) - r(x, j) - m) + centring * (r(x, c) + r(x, j))^2

where m is the pair's margin, if margins are used. Rows hold units of two
documents: segments 1, 3, 5, ... are chosen, segments 2, 4, 6, ... the rejected
answers to the same prompts.

References: Ouyang et al. 2022 (arXiv:2203.02155), equation 1; the margin: Llama
2 (arXiv:2307.09288), equation 2; the centring: Eisenstein et al. 2023
(arXiv:2312.09244), section 2.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from models.layers import reward_head
from training.objectives import port, routing, segments


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reward(port.Objective):
  """Bradley-Terry loss, in nats per pair."""

  # Factor of the margin of each pair, the array `margins` of the data. 0: the
  # data need no margins, and none are used.
  margin: float = 0.0
  # Weight of the squared sum of a pair's rewards, which keeps their mean near 0
  # and changes no comparison. Eisenstein et al. took 0.01.
  centring: float = 0.0

  def validate(self):
    for name in ('margin', 'centring'):
      if not 0 <= (value := getattr(self, name)) < math.inf:
        raise ValueError(
          f'objective.{name}: got {value}, expected a number >= 0; 0 trains'
          ' without it'
        )

  @property
  def examples(self):
    return ('pairs',)

  @property
  def predicts_text(self):
    return False

  def batch_spec(self):
    margins = {'margins': port.ArraySpec('BT', jnp.float32)}
    return {**port.TOKEN_ROWS, **(margins if self.margin else {})}

  def init_heads(self, config, key):
    return {reward_head.NAME: reward_head.init(config.model_width, key)}

  def totals(self, params, batch, model, **others):
    """Returns counts of pairs and tokens, the denominators of router losses."""
    del params, others
    if not model.module.config.num_experts:
      return None
    num_pairs = jnp.sum(at_ends(batch['weights'], batch)[1], dtype=jnp.float32)
    return {'pairs': num_pairs, 'tokens': routing.num_real(batch)}

  def __call__(self, params, batch, model, *, totals=None, **others):
    """Returns the summed loss of the pairs, and sums.

    Returns:
      The sum of the losses, and the sums: `weight`, the number of pairs;
      `tokens`, the tokens read; `accuracy`, the pairs whose chosen answer has
      the larger reward; `margin`, chosen minus rejected; `reward`, of all
      answers.
    """
    del others
    hidden = model.hidden(
      params, batch['tokens'], batch['positions'], batch['segment_ids']
    )
    head = params[port.HEADS][reward_head.NAME]
    rewards_BU2, is_pair_BU = at_ends(
      reward_head.rewards(head, hidden.states_BTD), batch
    )
    gaps_BU = rewards_BU2[:, :, 0] - rewards_BU2[:, :, 1]
    wanted_BU = gaps_BU
    if self.margin:
      margins_BU2, _ = at_ends(batch['margins'], batch)
      wanted_BU = gaps_BU - self.margin * margins_BU2[:, :, 0]
    losses_BU = -jax.nn.log_sigmoid(wanted_BU)
    if self.centring:
      losses_BU += self.centring * jnp.sum(rewards_BU2, axis=2) ** 2
    num_pairs = jnp.sum(is_pair_BU, dtype=jnp.float32)

    def total(values_BU):
      return jnp.sum(jnp.where(is_pair_BU, values_BU, 0.0))

    loss, sums = total(losses_BU), {}
    if hidden.routing is not None:
      assert totals is not None
      per_token = totals['pairs'] / jnp.maximum(totals['tokens'], 1.0)
      router_loss, sums = routing.losses(hidden.routing, batch, per_token)
      loss += router_loss
    return loss, sums | {
      'weight': num_pairs,
      'tokens': routing.num_real(batch),
      'accuracy': port.Share(total(gaps_BU > 0), num_pairs),
      'margin': port.Mean(total(gaps_BU), num_pairs),
      'reward': port.Mean(total(jnp.mean(rewards_BU2, axis=2)), num_pairs),
    }


def at_ends(
  values_BT: jax.Array, batch: port.Batch
) -> tuple[jax.Array, jax.Array]:
  """Returns the values at the last token of both documents of each unit.

  The tokens of a row may be in any order: a mesh that splits time reorders
  them.

  Returns:
    Values [B, U, 2], and whether the row has the unit, [B, U].
  """
  segment_ids_BT = batch['segment_ids']
  is_token_BT = segment_ids_BT > 0
  lengths_BU2 = segments.sums(is_token_BT.astype(jnp.float32), segment_ids_BT)
  lengths_BS = lengths_BU2.reshape((len(segment_ids_BT), -1))
  lengths_BT = jnp.take_along_axis(
    lengths_BS, jnp.maximum(segment_ids_BT - 1, 0), axis=1, mode='clip'
  )
  is_end_BT = is_token_BT & (batch['positions'] == lengths_BT - 1)
  ends_BU2 = segments.sums(jnp.where(is_end_BT, values_BT, 0.0), segment_ids_BT)
  return ends_BU2, lengths_BU2[:, :, 1] > 0
