"""A step as calls of one program per kind of layer is the step as a whole."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inference.engine import (
  device_state,
  engine as engine_lib,
  engine_config,
  execution,
  inputs as inputs_lib,
  steps,
)
from inference.engine.compiled import layered
from inference.requests import requests
from inference.sampling import settings
from models import transformer
from tests.helpers import tiny_models
from tests.helpers.serving import reference_engine


def _config(kind: str):
  fields = {'num_layers': 4, 'max_length': 64}
  if kind == 'alternating':
    return tiny_models.llama_like(**fields, layer_pattern='lg', window=20)
  if kind == 'mixture':  # the first layer is dense
    return tiny_models.mixture(**fields, num_dense_layers=1)
  return getattr(tiny_models, kind)(**fields)


def _case(kind: str, dtype, shape: steps.Shape):
  """Returns model, params and a function that makes a state; and inputs."""
  config, engine = _config(kind), engine_config.EngineConfig()
  backend = execution.choose(engine, config, dtype, 'cpu')
  model = transformer.Transformer(config, dtype, backend.execution)
  variables = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
  params = jax.tree.map(lambda x: (3 * x).astype(dtype), variables)
  rng = np.random.default_rng(0)

  def state():
    return device_state.init_state(
      model,
      num_slots=3,
      num_pages=9,
      page_size=16,
      kv_dtype=backend.kv_dtype,
      channels=backend.channels,
      vocab_size=config.vocab_size,
    )

  _, inputs = inputs_lib.empty(
    inputs_lib.Layout(*shape, chunk_tokens=8, table_width=4, num_sampled=4),
    padding_slot=3,
  )
  inputs.tokens_T[:] = rng.integers(0, config.vocab_size, len(inputs.tokens_T))
  inputs.positions_T[:] = np.arange(len(inputs.positions_T)) % 8
  tables = np.concatenate([inputs.decode_table_DL, inputs.chunk_table_XL])
  pages = 1 + np.arange(len(tables))
  inputs.decode_table_DL[:, 0] = pages[: shape.num_decodes]
  inputs.chunk_table_XL[:, 0] = pages[shape.num_decodes :]
  inputs.rows_R[:] = len(inputs.tokens_T) - 1
  if shape.num_chunks:
    inputs.prompt_logprobs_X[:] = 2
    inputs.targets_M[:] = inputs.tokens_T[shape.num_decodes :]
  return model, backend.laid_out(params, config), state, inputs


@pytest.mark.slow
@pytest.mark.parametrize('shape', [(1, 0), (0, 1), (2, 2)])
@pytest.mark.parametrize(
  ('kind', 'dtype', 'num_kinds'),
  [
    ('llama_like', jnp.float32, 1),
    ('llama_like', jnp.bfloat16, 1),
    ('gpt2_like', jnp.float32, 1),
    ('alternating', jnp.float32, 2),
    ('mixture', jnp.float32, 2),
  ],
)
def test_layers_called_one_by_one_are_the_whole_step(
  kind, dtype, num_kinds, shape
):
  shape = steps.Shape(*shape)
  model, params, state, inputs = _case(kind, dtype, shape)
  static = {'model': model, 'vocab_size': model.config.vocab_size}
  first, second = state(), state()
  whole = steps.prefill if shape.num_chunks else steps.decode_step
  expected = whole(params, first.kv_cache, first.slots.last_B, inputs, **static)
  arguments = params, second.kv_cache, second.slots.last_B, inputs
  lowered = layered.lower(*arguments, **static)
  assert len(lowered.layers) == num_kinds
  got = lowered.compile()(*arguments)
  # As one call does, the calls of the layers donate the cache.
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(second.kv_cache))
  assert jax.tree.structure(got) == jax.tree.structure(expected)
  # Logits are about 10. XLA may fuse the ends of two layers, and then rounds
  # fewer times; bfloat16 has 8 bits.
  tolerance = 1e-4 if dtype == jnp.float32 else 0.1
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      np.asarray(a, np.float32), np.asarray(b, np.float32), atol=tolerance
    ),
    got[1],
    expected[1],
  )
  if dtype == jnp.float32:
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), got, expected
    )


def test_large_layers_of_a_cpu_are_called_one_by_one():
  def params(width):
    leaf = jax.ShapeDtypeStruct((1024, width), np.float32)
    layers = {f'layer_{n}': {'up': {'kernel': leaf}} for n in range(3)}
    return {'params': {**layers, 'embed': {'embedding': leaf}}}

  assert layered.suits(params(3072), 'cpu')  # 12 MiB each
  assert not layered.suits(params(3072), 'gpu')
  assert not layered.suits(params(2048), 'cpu')
  mixed = params(3072)
  mixed['params']['layer_1'] = params(8)['params']['layer_1']
  assert not layered.suits(mixed, 'cpu')


@pytest.mark.slow
def test_an_engine_of_large_layers_answers_as_one_of_small_layers(monkeypatch):
  def answers():
    config = dataclasses.replace(reference_engine.model_config(), num_layers=3)
    model = transformer.Transformer(config)
    variables = jax.jit(model.init)(
      jax.random.key(0), jnp.zeros((1, 1), jnp.int32)
    )
    engine = engine_lib.Engine(
      config,
      jax.tree.map(lambda x: 3 * x, variables),
      tokenizer=tiny_models.byte_tokenizer(),
      weights_digest='first',
      config=engine_config.EngineConfig(
        max_sequences=2, decode_shapes=(2,), max_chunks=1, max_mixed_chunks=1
      ),
    )
    asked = [
      requests.Request(
        prompt_ids=tuple(range(60, 60 + length)),
        settings=settings.Settings(
          max_tokens=6, seed=1, ignore_eos=True, prompt_logprobs=1
        ),
      )
      for length in (5, 40)
    ]
    done = [u.completion for _, u in engine.answer(asked) if u.completion]
    texts = sorted((c.num_prompt_tokens, tuple(c.token_ids)) for c in done)
    return engine._programs._is_layered, texts

  is_layered, whole = answers()
  assert not is_layered
  monkeypatch.setattr(layered, 'MIN_LAYER_BYTES', 0)
  is_layered, apart = answers()
  assert is_layered
  assert apart == whole
