"""The steps of the engine by hand: prefill, decode, sample, one sequence."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hardware import hlo
from inference.engine import (
  device_state,
  engine_config,
  execution,
  inputs as inputs_lib,
  steps,
)
from inference.sampling import sampler as sampler_lib, settings
from models import kv_cache as kv_cache_lib, transformer
from tests.helpers.serving import reference_engine

_PROMPT = (40, 41, 42, 43, 44)
_VOCAB = 259  # of the tokenizer; the model has spare rows
_PAGES = (3, 1)  # of the only sequence, of 16 tokens each


def _inputs(shape, tokens, positions, *, slot, last):
  """Returns the inputs of one decode or one chunk."""
  _, inputs = inputs_lib.empty(
    inputs_lib.Layout(*shape, chunk_tokens=8, table_width=4, num_sampled=1),
    padding_slot=2,
  )
  inputs.tokens_T[: len(tokens)] = tokens
  inputs.positions_T[: len(positions)] = positions
  table = inputs.decode_table_DL if shape[0] else inputs.chunk_table_XL
  table[0, : len(_PAGES)] = _PAGES
  inputs.rows_R[0], inputs.slots_R[0] = last, slot
  return inputs


def test_prefill_and_decode_steps_are_the_full_forward():
  config, params = reference_engine.model_config(), reference_engine.params()
  model = transformer.Transformer(config)
  state = device_state.init_state(
    model,
    num_slots=2,
    num_pages=5,
    page_size=16,
    kv_dtype=jnp.float32,
    channels=kv_cache_lib.rows_and_width(config)[1],
    vocab_size=_VOCAB,
  )
  greedy = settings.Settings(temperature=0.0)
  row = sampler_lib.row(
    greedy, num_prompt_tokens=len(_PROMPT), seed=0, eos_id=None
  )
  slots = device_state.seat(
    state.slots, device_state.seats([(1, row)], 4, padding_slot=2)
  )
  kv_cache, ids, found = state.kv_cache, list(_PROMPT), []
  static = {'model': model, 'vocab_size': _VOCAB}
  for _ in range(4):
    num = len(ids)
    if num == len(_PROMPT):
      inputs = _inputs((0, 1), ids, range(num), slot=1, last=num - 1)
      before = kv_cache
      kv_cache, logits_RV, _, hidden_MD = steps.prefill(
        params, kv_cache, slots.last_B, inputs, **static
      )
    else:
      # -1: the token that `sample` has left in the slot.
      inputs = _inputs((1, 0), [-1], [num - 1], slot=1, last=0)
      before = kv_cache
      kv_cache, logits_RV = steps.decode_step(
        params, kv_cache, slots.last_B, inputs, **static
      )
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    slots, tokens_R, _ = steps.sample(
      slots, logits_RV, inputs.slots_R, np.array([num]), inputs.forced_R
    )
    found.append(np.asarray(logits_RV[0]))
    ids.append(int(tokens_R[0]))
  logits_1TV, _ = model.apply(params, np.array([ids[:-1]]))
  expected_TV = np.asarray(logits_1TV[0, len(_PROMPT) - 1 :, :_VOCAB])
  # float32 sums in another order; logits are around 10.
  np.testing.assert_allclose(np.stack(found), expected_TV, atol=1e-4)
  assert ids[len(_PROMPT) :] == expected_TV.argmax(-1).tolist()


@pytest.mark.fast_cases(2)
@pytest.mark.parametrize('numerics', engine_config.NUMERICS)
@pytest.mark.parametrize('kind', ['llama', 'mixture'])
def test_a_step_in_bfloat16_widens_no_weights_and_no_pages(kind, numerics):
  """XLA:CPU would convert them to float32 in every step."""
  config = dataclasses.replace(
    reference_engine.model_config(kind), vocab_size=300
  )
  backend = execution.choose(
    engine_config.EngineConfig(numerics=numerics), config, jnp.bfloat16, 'cpu'
  )
  model = transformer.Transformer(config, jnp.bfloat16, backend.execution)
  params, state = jax.eval_shape(
    lambda: (
      jax.tree.map(
        lambda leaf: leaf.astype(jnp.bfloat16),
        model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)),
      ),
      device_state.init_state(
        model,
        num_slots=2,
        num_pages=77,
        page_size=16,
        kv_dtype=backend.kv_dtype,
        channels=backend.channels,
        vocab_size=_VOCAB,
      ),
    )
  )
  program = hlo.parse(
    steps.decode_step.lower(
      params,
      state.kv_cache,
      state.slots.last_B,
      _inputs((1, 0), [-1], [3], slot=1, last=0),
      model=model,
      vocab_size=_VOCAB,
    )
    .compile()
    .as_text()
  )
  held = jax.tree.leaves((params, state.kv_cache))
  # Routers are computed in float32, for every dtype of the weights.
  router = (config.model_width, config.num_experts)
  large = {x.shape for x in held if x.ndim > 1 and x.shape != router}
  assert _arrays(program, 'f32') & large == set()
  assert _arrays(program, 'bf16') & large  # the parameters


def _arrays(program, dtype):
  """Returns the shapes of the arrays in memory, outside of fusions."""
  fused = {
    instruction.called('calls')
    for computation in program.computations.values()
    for instruction in computation.values()
  }
  return {
    tuple(map(int, found[1].split(',')))
    for name, computation in program.computations.items()
    if name not in fused
    for instruction in computation.values()
    if (found := re.match(rf'{dtype}\[([\d,]+)\]', instruction.shape))
  }
