"""Next-token prediction: the objective of pretraining and of fine-tuning."""

import dataclasses
import math

import jax.numpy as jnp

from training.objectives import port


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextToken(port.Objective):
  """Cross-entropy of the next token, in nats.

  With a mixture of experts, the loss includes the losses of the router, as
  weighted in the model's config.
  """

  # Weight of the z-loss, log(Z)^2 (models/layers/cross_entropy.py); 0: no
  # z-loss. PaLM took 1e-4 (arXiv:2204.02311, section 5).
  z_loss_weight: float = 0.0

  def validate(self):
    if not 0 <= self.z_loss_weight < math.inf:
      raise ValueError(
        f'objective.z_loss_weight: got {self.z_loss_weight}, expected a number'
        ' >= 0; 0 trains without z-loss'
      )

  def __call__(self, params, batch, model, **others):
    """Returns the summed loss of the targets, and sums.

    Returns:
      The sum of weight * loss, and the sums: `weight`; `nll`, the sum of
      weight * -log p(target), if the loss has further terms; with a z-loss,
      `z_loss` before it is weighted; with experts, the figures of
      `models.moe.layer.routing_sums`.
    """
    del others
    hidden = model.hidden(
      params, batch['tokens'], batch['positions'], batch['segment_ids']
    )
    found = model.weighted_nll(
      params,
      hidden.states_BTD,
      batch['targets'],
      batch['weights'],
      self.z_loss_weight,
    )
    sums = {'weight': jnp.sum(batch['weights'])}
    if self.z_loss_weight:
      sums |= {'nll': found.nll, 'z_loss': found.z}
    routing = hidden.routing
    if routing is None:
      return found.loss, sums
    # The loss adds up the layers; the report averages them, so that even
    # experts make a balance_loss of 1.
    sums |= {
      'nll': found.nll,
      'balance_loss': jnp.mean(routing['balance_loss'], axis=0),
      'router_z_loss': jnp.mean(routing['router_z_loss'], axis=0),
      'expert_load': routing['expert_load'],
    }
    return found.loss + jnp.sum(routing['loss']), sums
