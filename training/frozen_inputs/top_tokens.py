"""The likeliest next tokens of a frozen model, for every place of a batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from models import transformer
from training.objectives import divergences, port


def make_step(
  model: transformer.Transformer,
  top: port.TopTokens,
  *,
  num_places: int,
  all_sum: Callable[[Any], Any] = lambda tree: tree,
) -> Callable[..., dict[str, jax.Array]]:
  """Builds `step(params, batch)`: the likeliest tokens and their probabilities.

  Args:
    model: the frozen model.
    top: how many tokens, and the temperature.
    num_places: B x T of the whole batch.
    all_sum: adds a tree of sums across devices, under pmap.

  Returns:
    A function of the model's variables and of a batch with `places`, as that of
    `training.evaluation.model_port.make_score_step`. It returns by place `ids`,
    int32 [B x T, k], the likeliest first, and `logprobs`, float32
    [B x T, k + 1], of which the last is that of all other tokens together.

  Raises:
    ValueError: k is larger than the vocabulary.
  """
  vocab_size = model.config.vocab_size
  if top.count > vocab_size:
    raise ValueError(
      f'objective.top_k: got {top.count}, expected at most the {vocab_size}'
      ' tokens of the vocabulary'
    )
  own = port.Model(model)

  def step(params, batch):
    def of_chunk(states_BtD, _):
      logits_BtV = own.logits(params, states_BtD) / top.temperature
      _, ids_Btk = jax.lax.top_k(logits_BtV, top.count)
      ids_Btk = ids_Btk.astype(jnp.int32)
      return ids_Btk, divergences.coarse(logits_BtV, ids_Btk)

    hidden = own.hidden(
      params, batch['tokens'], batch['positions'], batch['segment_ids']
    )
    found = own.map_chunks(of_chunk, hidden.states_BTD, batch['targets'])
    places_M = batch['places'].reshape(-1)
    # Each device has its own rows, and time may be laid out in any order:
    # summed by place, they are the whole.
    return all_sum(
      {
        name: jnp.zeros((num_places, values.shape[-1]), values.dtype)
        .at[places_M]
        .set(values.reshape(-1, values.shape[-1]))
        for name, values in zip(('ids', 'logprobs'), found, strict=True)
      }
    )

  return step
