"""Draft heads of tiny models, trained by their objective in a few seconds."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from inference.engine.drafting import draft_head as serving
from models import model_config, transformer
from models.layers import draft_head
from training import state as state_lib, step as step_lib
from training.objectives import draft_head as objective_lib

_ROWS, _LENGTH, _STEPS = 16, 64, 120


def weights(
  config: model_config.ModelConfig,
  params: Any,
  *,
  num_ids: int = 200,
  num_steps: int = _STEPS,
) -> serving.Weights:
  """Returns a head for weights, trained on random text.

  Args:
    config: of the model.
    params: its weights.
    num_ids: that it may guess.
    num_steps: of training.
  """
  num_ids = min(num_ids, config.vocab_size)
  objective = objective_lib.DraftHead(
    num_steps=2, num_ids=num_ids, inner_width=64
  )
  model = transformer.Transformer(config)
  optimizer = optax.adam(optax.linear_schedule(1e-2, 0.0, num_steps))
  train_step = step_lib.make_train_step(
    model,
    objective,
    optimizer,
    joined=lambda trained, frozen: {**trained, **frozen['init_from']},
  )
  key = jax.random.key(0)
  state = state_lib.init_with(
    optimizer, key, {'heads': objective.init_heads(config, key)}
  ).replace(frozen_params={'init_from': params})

  def step(state, seed):
    ids = jax.random.randint(
      jax.random.key(seed), (_ROWS, _LENGTH + 1), 0, num_ids
    )
    ones = jnp.ones((_ROWS, _LENGTH), jnp.int32)
    return train_step(
      state,
      {
        'tokens': ids[:, :-1],
        'targets': ids[:, 1:],
        'positions': jnp.arange(_LENGTH)[None] * ones,
        'segment_ids': ones,
        'weights': ones.astype(jnp.float32),
      },
    )[0]

  @jax.jit
  def train(state):
    return jax.lax.fori_loop(
      0, num_steps, lambda n, state: step(state, n), state
    )

  head = train(state).params['heads'][draft_head.NAME]
  return serving.Weights(
    head=jax.tree.map(np.asarray, head), num_ids=num_ids, dtype=jnp.float32
  )
