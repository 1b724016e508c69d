"""Prefill and decode: the full forward's logits, one token at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inference import decode, sampling
from models import transformer
from tests import fixtures

_CONFIGS = {
  'llama': fixtures.llama_like,
  'gpt2': fixtures.gpt2_like,
}


def _model(kind='llama', **overrides):
  model = transformer.Transformer(config=_CONFIGS[kind](**overrides))
  # Wide random weights: logits that differ, attention that looks somewhere.
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype),
    jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32)),
  )
  return model, params


def _prompts(lengths, bucket, vocab_size=61):
  """Prompts padded with garbage, which must not be seen."""
  rng = np.random.default_rng(0)
  tokens_BT = rng.integers(0, vocab_size, (len(lengths), bucket))
  return jnp.asarray(tokens_BT, jnp.int32), jnp.asarray(lengths, jnp.int32)


def _greedy(num_rows):
  return sampling.init(
    temperature=[0.0] * num_rows,
    top_k=[0] * num_rows,
    top_p=[1.0] * num_rows,
    min_p=[0.0] * num_rows,
    seed=list(range(num_rows)),
  )


@pytest.mark.parametrize('scan_layers', [False, True])
@pytest.mark.parametrize('kind', ['llama', 'gpt2'])
def test_prefill_and_decode_give_the_full_forwards_logits(kind, scan_layers):
  model, params = _model(kind, scan_layers=scan_layers)
  lengths, num_steps, cache_length = [3, 16, 9], 12, 32
  tokens_BT, lengths_B = _prompts(lengths, 16)
  static = {'model': model, 'vocab_size': 61}
  state, tokens_B = decode.prefill(
    params,
    tokens_BT,
    lengths_B,
    _greedy(3),
    cache_length=cache_length,
    **static,
  )
  step = jax.jit(
    lambda state: model.apply(
      params, state.tokens_B[:, None], state.positions_B[:, None], state.cache
    )[0][:, 0]
  )
  drawn_BT, logits = [tokens_B], []
  for _ in range(num_steps):
    logits.append(step(state))
    state, tokens_B = decode.decode_step(params, state, **static)
    drawn_BT.append(tokens_B)
  drawn_BT = np.stack(drawn_BT, axis=1)
  logits_BTV = np.stack(logits, axis=1)

  whole_BT = np.zeros((len(lengths), cache_length), np.int32)
  for i, length in enumerate(lengths):
    whole_BT[i, :length] = tokens_BT[i, :length]
    whole_BT[i, length : length + num_steps + 1] = drawn_BT[i]
  full_BTV, _ = jax.jit(model.apply)(params, whole_BT)
  for i, length in enumerate(lengths):
    full_TV = np.asarray(full_BTV[i, length - 1 : length + num_steps])
    # Each token, the first included, is the choice of the full forward.
    np.testing.assert_array_equal(drawn_BT[i], full_TV.argmax(-1))
    # The bound; float32 sums in another order differ by some 1e-6.
    np.testing.assert_allclose(logits_BTV[i], full_TV[1:], atol=1e-4)


def test_the_state_is_donated_and_written_in_place():
  model, params = _model(num_layers=1)
  tokens_BT, lengths_B = _prompts([5], 16)
  static = {'model': model, 'vocab_size': 61}
  state, _ = decode.prefill(
    params, tokens_BT, lengths_B, _greedy(1), cache_length=32, **static
  )
  cache_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state.cache))
  compiled = decode.decode_step.lower(params, state, **static).compile()
  memory = compiled.memory_analysis()
  assert memory is not None
  assert memory.alias_size_in_bytes >= cache_bytes
  before = jax.tree.leaves(state)
  state, tokens_B = decode.decode_step(params, state, **static)
  assert all(leaf.is_deleted() for leaf in before)
  # The host reads tokens_B while the next step already has the state.
  first = int(state.tokens_B[0])
  state, _ = decode.decode_step(params, state, **static)
  assert int(tokens_B[0]) == first
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))


def test_a_finished_row_past_its_cache_harms_nobody():
  model, params = _model(num_layers=1, max_length=64)
  tokens_BT, lengths_B = _prompts([16, 2], 16)
  static = {'model': model, 'vocab_size': 61}
  drawn = {}
  for cache_length in (20, 64):
    state, tokens_B = decode.prefill(
      params,
      tokens_BT,
      lengths_B,
      _greedy(2),
      cache_length=cache_length,
      **static,
    )
    drawn[cache_length] = [int(tokens_B[1])]
    for _ in range(14):  # the first row leaves a cache of 20 after 4
      state, tokens_B = decode.decode_step(params, state, **static)
      drawn[cache_length].append(int(tokens_B[1]))
  assert drawn[20] == drawn[64]


def test_only_ids_of_the_tokenizer_are_sampled():
  model, params = _model(num_layers=1)
  tokens_BT, lengths_B = _prompts([4, 7, 11, 2], 16, vocab_size=9)
  sampler = _greedy(4)._replace(temperature_B=jnp.full(4, 1e6))
  static = {'model': model, 'vocab_size': 9}
  state, tokens_B = decode.prefill(
    params, tokens_BT, lengths_B, sampler, cache_length=32, **static
  )
  seen = [tokens_B]
  for _ in range(10):
    state, tokens_B = decode.decode_step(params, state, **static)
    seen.append(tokens_B)
  assert np.max(seen) < 9


@pytest.mark.parametrize(
  ('num_tokens', 'expected'),
  [(1, 16), (15, 16), (16, 16), (17, 32), (33, 64), (64, 64), (65, 100)],
)
def test_buckets_are_powers_of_two_up_to_the_limit(num_tokens, expected):
  assert decode.bucket(num_tokens, limit=100) == expected


def test_a_bucket_cannot_exceed_the_limit():
  with pytest.raises(ValueError, match='got 101 tokens, expected at most 100'):
    decode.bucket(101, limit=100)
