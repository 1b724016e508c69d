"""A draft head: it learns to guess what the frozen model will sample next.

    objective = draft_head.DraftHead(num_ids=16384)

The weights of `config.init_from` stay as they are; the head alone is trained
(`models/layers/draft_head.py`), on the model's own final hidden states. At
every token, the head guesses the next but one, and so on for `num_steps`
tokens, each time behind the text's own tokens. Its distribution Q becomes like
the model's own distribution P of the same token:

    kl    sum_v P(v) log(P(v) / (m Q(v))), m: the mass of P that Q can have
    tv    1 - sum_v min(P(v), Q(v))

tv is the share of drafts that rejection sampling rejects (Leviathan et al.,
arXiv:2211.17192, corollary 3.6), and its gradient is small while Q is far from
P; kl bounds it (Pinsker), and has a steady gradient. A guess of step k
counts `step_decay`^(k - 1), since it is of use only after k - 1 right ones.

Nothing of a text is needed but its tokens; drafts are best for the text that
the model writes itself (`studies/answers.py`).

Reference: ReDrafter, arXiv:2403.09919, section 4: distillation of several steps
behind a recurrent head.
"""

from collections.abc import Mapping
import dataclasses

import jax
import jax.numpy as jnp

from checks import expect
from models.layers import draft_head as head_lib
from training.objectives import port

KL, TV = 'kl', 'tv'
LOSSES = KL, TV


@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftHead(port.Objective):
  """The divergence between the guesses of a head and the model's tokens."""

  loss: str = KL  # kl | tv
  # Tokens that are guessed behind each token of the text.
  num_steps: int = 3
  # Weight of the guesses of a step, per step before it.
  step_decay: float = 0.8
  # K, the ids that may be guessed: the first ones. 0: all. Fewer ids make a
  # guess cheaper, and tokens beyond them are never guessed.
  num_ids: int = 0
  # F, width of the gated layer of the head; 0: twice the model's width.
  inner_width: int = 0

  def validate(self):
    expect.one_of('objective.loss', self.loss, LOSSES)
    expect.at_least('objective.num_steps', self.num_steps, 1)
    expect.at_least('objective.num_ids', self.num_ids, 0)
    expect.at_least('objective.inner_width', self.inner_width, 0)
    if not 0 < self.step_decay <= 1:
      raise ValueError(
        f'objective.step_decay: got {self.step_decay}, expected a number above'
        ' 0 and at most 1; 1 counts the guesses of all steps alike'
      )

  def check_start(self, init_from):
    if not init_from:
      raise ValueError(
        "config.init_from: got '' for a draft head, expected the frozen"
        ' directory of the model that it drafts for; set config.init_from'
      )

  @property
  def trains_heads_alone(self):
    return True

  @property
  def predicts_text(self):
    return False

  def init_heads(self, config, key):
    if self.num_ids > config.vocab_size:
      raise ValueError(
        f'objective.num_ids: got {self.num_ids}, expected at most the'
        f' {config.vocab_size} ids of the model; 0 takes all'
      )
    width = config.model_width
    return {
      head_lib.NAME: head_lib.init(width, self.inner_width or 2 * width, key)
    }

  def __call__(self, params, batch, model, **others):
    """Returns the summed divergences, each times its weight, and sums.

    Returns:
      The sums: `weight`, that of all guesses; and of each step k, `overlap_k`,
      sum_v min(P(v), Q(v)), and `agreement_k`, the share of guesses whose
      likeliest token is the model's.
    """
    del others
    # No dropout: an engine has none, and the states are its states.
    model = dataclasses.replace(model, dropout_key=None)
    states_BTD = model.hidden(
      params, batch['tokens'], batch['positions'], batch['segment_ids']
    ).states_BTD
    rows = _in_order({**batch, 'states': jax.lax.stop_gradient(states_BTD)})
    states_BTD = rows['states']
    config, dtype = model.module.config, model.module.dtype
    table_KD = model.head_rows(params, self.num_ids or config.vocab_size)
    log_z_BT = self._log_sums(params, states_BTD, model, rows)
    head, guessing_BTD = params[port.HEADS][head_lib.NAME], states_BTD

    # Without it, the backward pass would keep the logits of all chunks.
    @jax.checkpoint
    def of_chunk(chunk, _):
      own_BtD, their_BtD, log_z_Bt = chunk
      own_BtK, their_BtK = (
        head_lib.logits(states, table_KD, config.logit_softcap, dtype)
        for states in (own_BtD, their_BtD)
      )
      return self._compared(
        jax.nn.log_softmax(own_BtK), their_BtK - log_z_Bt[..., None]
      )

    loss, weight, sums = 0.0, 0.0, {}
    for step in range(1, self.num_steps + 1):
      embeddings_BTD = model.embeddings(
        params, _later(rows['targets'], step - 1)
      )
      guessing_BTD = head_lib.advanced(
        head, guessing_BTD, embeddings_BTD, dtype
      )
      later = (_later(x, step) for x in (states_BTD, log_z_BT))
      found = model.map_chunks(
        of_chunk, (guessing_BTD, *later), rows['targets']
      )
      segment_ids_BT = rows['segment_ids']
      is_same_BT = _later(segment_ids_BT, step) == segment_ids_BT
      is_same_BT &= (segment_ids_BT > 0) & _has_later(segment_ids_BT, step)
      weights_BT = jnp.where(is_same_BT, _later(rows['weights'], step), 0.0)
      total = jnp.sum(weights_BT)
      scale = self.step_decay ** (step - 1)
      loss += scale * jnp.sum(weights_BT * found['loss'])
      weight += scale * total
      sums[f'overlap_{step}'] = port.Mean(
        jnp.sum(weights_BT * found['overlap']), total
      )
      is_counted_BT = weights_BT > 0
      sums[f'agreement_{step}'] = port.Share(
        jnp.sum(jnp.where(is_counted_BT, found['agreement'], 0.0)),
        jnp.sum(is_counted_BT, dtype=jnp.float32),
      )
    return loss, {'weight': weight, 'tokens': jnp.sum(rows['weights'])} | sums

  def _log_sums(self, params, states_BTD, model, rows):
    """Returns log sum(exp(logits)) of all ids, [B, T]."""

    def of_chunk(states_BtD, _):
      return jax.nn.logsumexp(model.logits(params, states_BtD), axis=-1)

    found = model.map_chunks(of_chunk, states_BTD, rows['targets'])
    return jax.lax.stop_gradient(found)

  def _compared(self, own, theirs):
    """Returns the figures of each guess, [B, t] each.

    Args:
      own: log Q, [B, t, K].
      theirs: log P of the same ids, which add up to at most 1.
    """
    probs = jnp.exp(theirs)
    overlap_Bt = jnp.sum(jnp.minimum(probs, jnp.exp(own)), axis=-1)
    loss_Bt = 1 - overlap_Bt
    if self.loss == KL:
      log_mass_Bt1 = jax.nn.logsumexp(theirs, axis=-1, keepdims=True)
      loss_Bt = jnp.sum(probs * (theirs - log_mass_Bt1 - own), axis=-1)
    is_same_Bt = jnp.argmax(own, axis=-1) == jnp.argmax(theirs, axis=-1)
    # The model's likeliest token may be beyond the ids of the head.
    is_same_Bt &= jnp.max(probs, axis=-1) >= 1 - jnp.sum(probs, axis=-1)
    return {
      'loss': loss_Bt,
      'overlap': jax.lax.stop_gradient(overlap_Bt),
      'agreement': is_same_Bt.astype(jnp.float32),
    }


def _in_order(batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  """Returns arrays [B, T, ...] with documents one after the other.

  A mesh that splits time has reordered the tokens of a row, and a guess needs
  the tokens behind its own.
  """
  order_BT = jnp.lexsort((batch['positions'], batch['segment_ids']), axis=1)

  def ordered(x):
    shape = *order_BT.shape, *[1] * (x.ndim - 2)
    return jnp.take_along_axis(x, order_BT.reshape(shape), axis=1)

  names = *port.TOKEN_ROWS, 'states'
  return {name: ordered(batch[name]) for name in names}


def _later(x: jax.Array, steps: int) -> jax.Array:
  """Returns the values [B, T, ...] of `steps` tokens later; the last wrap."""
  return jnp.roll(x, -steps, axis=1) if steps else x


def _has_later(x_BT: jax.Array, steps: int) -> jax.Array:
  """Marks the places that do not wrap."""
  return (jnp.arange(x_BT.shape[1]) < x_BT.shape[1] - steps)[None, :]
