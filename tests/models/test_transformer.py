"""The decoder: one function for training, prefill and decode."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import kv_cache, layout, transformer
from tests.helpers import tiny_models

CONFIGS = {
  'llama': tiny_models.llama_like(),
  'llama_scanned': tiny_models.llama_like(scan_layers=True),
  'llama_tied': tiny_models.llama_like(tie_embeddings=True),
  'gpt2': tiny_models.gpt2_like(),
  'gpt2_scanned': tiny_models.gpt2_like(scan_layers=True),
  'stable': tiny_models.stable(),
  'stable_scanned': tiny_models.stable(scan_layers=True, tie_embeddings=True),
  'attention_only': tiny_models.llama_like(mlp='none', mlp_width=0),
  'mixture': tiny_models.mixture(),
  'mixture_scanned': tiny_models.mixture(scan_layers=True),
}
every_config = pytest.mark.parametrize('config', CONFIGS.values(), ids=CONFIGS)

BATCH, TIME = 2, 20


@functools.cache
def _model(config, dtype=jnp.float32):
  model = transformer.Transformer(config, dtype)
  params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
  return model, params


@functools.cache
def _jitted(config):
  apply = transformer.Transformer(config).apply
  return jax.jit(apply, static_argnames='method')


def _tokens(config, batch=BATCH, time=TIME):
  return jax.random.randint(
    jax.random.key(1), (batch, time), 0, config.vocab_size
  )


@pytest.mark.parametrize(
  ('name', 'expected'),
  [('llama', 289.3767466), ('llama_scanned', 289.4632278)],
)
def test_a_seed_gives_the_weights_that_it_always_gave(name, expected):
  _, params = _model(CONFIGS[name])
  total = sum(
    float(np.abs(np.float64(leaf)).sum()) for leaf in jax.tree.leaves(params)
  )
  assert total == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize('config', [CONFIGS['llama'], CONFIGS['gpt2_scanned']])
def test_logits_have_shape_and_dtype_and_jit_changes_nothing(config):
  model, params = _model(config)
  tokens_BT = _tokens(config)
  logits_BTV, cache = model.apply(params, tokens_BT)
  assert cache is None
  assert logits_BTV.shape == (BATCH, TIME, config.vocab_size)
  assert logits_BTV.dtype == jnp.float32
  assert np.isfinite(logits_BTV).all()
  jitted_BTV, _ = jax.jit(model.apply)(params, tokens_BT)
  # Fusion reorders float32 sums; the logits are of order 0.1.
  np.testing.assert_allclose(jitted_BTV, logits_BTV, atol=1e-6)


@pytest.mark.fast_cases(1)
@every_config
def test_decode_parity(config):
  """Prefill and n decode steps give the logits of one full forward."""
  model, params = _model(config)
  tokens_BT = _tokens(config)
  apply = _jitted(config)
  full_BTV, _ = apply(params, tokens_BT)
  cache = kv_cache.init(config, batch_size=BATCH, length=TIME + 3)
  prompt = 11
  logits, cache = apply(params, tokens_BT[:, :prompt], None, cache)
  steps = [logits]
  for t in range(prompt, TIME):
    logits, cache = apply(
      params, tokens_BT[:, t : t + 1], jnp.full((BATCH, 1), t), cache
    )
    steps.append(logits)
  # The bound; observed 2e-7.
  np.testing.assert_allclose(np.concatenate(steps, axis=1), full_BTV, atol=1e-5)


@pytest.mark.parametrize('owner', ['query', 'key'])
def test_normed_queries_and_keys_do_not_depend_on_their_size(owner):
  config = CONFIGS['stable']
  _, params = _model(config)
  layer = params['params']['layer_0']
  attention = layer['attention']

  def logits(factor):
    scaled = {owner: {'kernel': factor * attention[owner]['kernel']}}
    layer_0 = {**layer, 'attention': {**attention, **scaled}}
    tree = {'params': {**params['params'], 'layer_0': layer_0}}
    return _jitted(config)(tree, _tokens(config))[0]

  # All but the epsilon that is added to the variance: 1e-5 of 1, here.
  np.testing.assert_allclose(logits(100.0), logits(1.0), atol=1e-3)
  assert np.abs(logits(0.0) - logits(1.0)).max() > 0.1
  # One scale per channel, for all heads.
  assert attention[f'{owner}_norm']['scale'].shape == (config.head_width,)


def test_capped_logits_are_those_of_the_uncapped_model_capped():
  config = CONFIGS['stable']
  uncapped = dataclasses.replace(config, logit_softcap=0.0)
  _, params = _model(config)
  tokens_BT = _tokens(config)
  logits_BTV, _ = _jitted(uncapped)(params, tokens_BT)
  expected_BTV = 3 * np.tanh(np.asarray(logits_BTV) / 3)
  got_BTV, _ = _jitted(config)(params, tokens_BT)
  np.testing.assert_allclose(got_BTV, expected_BTV, atol=1e-5)
  assert np.abs(logits_BTV).max() > 2 > np.abs(expected_BTV).max() - 1


def test_rows_decode_at_positions_of_their_own():
  config = CONFIGS['llama']
  model, params = _model(config)
  tokens_BT = _tokens(config)
  full_BTV, _ = _jitted(config)(params, tokens_BT)
  lengths = np.array([5, 9])
  # The prompts are padded on the right with a token that means something else.
  padded_BT = np.where(
    np.arange(10)[None] < lengths[:, None], tokens_BT[:, :10], 3
  )
  cache = kv_cache.init(config, batch_size=BATCH, length=TIME)
  _, cache = _jitted(config)(params, jnp.asarray(padded_BT), None, cache)
  for n in range(4):
    position_B1 = jnp.asarray(lengths + n)[:, None]
    token_B1 = jnp.take_along_axis(tokens_BT, position_B1, axis=1)
    logits, cache = _jitted(config)(params, token_B1, position_B1, cache)
    wanted = np.asarray(full_BTV)[np.arange(BATCH), lengths + n]
    np.testing.assert_allclose(logits[:, 0], wanted, atol=1e-5)


def _dependence(model, params, tokens_BT, outputs, **apply_args):
  """Returns how much hidden states depend on each input token, [T].

  The gradient of the summed hidden states at positions `outputs`, weighted at
  random, with respect to a factor on each token's embedding.
  """
  time = tokens_BT.shape[1]
  table_VD = params['params']['embed']['embedding']
  width = table_VD.shape[1]

  def weighted_sum(scale_T):
    # Give each position a row of the table, so that it can be scaled alone.
    x_TD = table_VD[tokens_BT[0]] * scale_T[:, None]
    rows_VD = jnp.zeros_like(table_VD).at[:time].set(x_TD)
    tree = {**params['params'], 'embed': {'embedding': rows_VD}}
    hidden_BTD, _ = model.apply(
      {'params': tree}, jnp.arange(time)[None], method='hidden', **apply_args
    )
    weights_D = jax.random.normal(jax.random.key(2), (width,))
    return jnp.sum(hidden_BTD[0, outputs] @ weights_D)

  return jax.jit(jax.grad(weighted_sum))(jnp.ones(time))


@pytest.mark.fast_cases(2)
@every_config
def test_causality_by_gradient(config):
  """A position depends on no later token, and on every earlier one."""
  model, params = _model(config)
  at = 7
  dependence_T = _dependence(model, params, _tokens(config, batch=1), at)
  assert (np.abs(dependence_T[: at + 1]) > 0).all()
  np.testing.assert_array_equal(dependence_T[at + 1 :], 0.0)


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize('name', ['llama', 'gpt2_scanned'])
def test_packed_rows_see_only_their_own_document(name):
  config = CONFIGS[name]
  model, params = _model(config)
  tokens_BT = _tokens(config, batch=1)
  first = 8
  packing = {
    'segment_ids_BT': jnp.where(jnp.arange(TIME) < first, 1, 2)[None],
    'positions_BT': jnp.where(
      jnp.arange(TIME) < first, jnp.arange(TIME), jnp.arange(TIME) - first
    )[None],
  }
  packed_BTV, _ = _jitted(config)(params, tokens_BT, **packing)
  alone_BTV, _ = _jitted(config)(params, tokens_BT[:, first:])
  np.testing.assert_allclose(packed_BTV[:, first:], alone_BTV, atol=1e-6)

  dependence_T = _dependence(
    model, params, tokens_BT, slice(first, None), **packing
  )
  np.testing.assert_array_equal(dependence_T[:first], 0.0)
  assert (np.abs(dependence_T[first:]) > 0).all()


def test_rows_longer_than_a_tile_of_queries_equal_decoding_them():
  """Rows of several tiles of queries, the last one not full."""
  config = tiny_models.llama_like(num_layers=1, max_length=200)
  model, params = _model(config)
  tokens_BT = _tokens(config, time=150)
  full_BTV, _ = _jitted(config)(params, tokens_BT)
  cache = kv_cache.init(config, batch_size=BATCH, length=150)
  cached_BTV, _ = _jitted(config)(params, tokens_BT, None, cache)
  np.testing.assert_allclose(cached_BTV, full_BTV, atol=1e-5)


@pytest.mark.parametrize('name', ['llama', 'gpt2', 'stable'])
def test_scanned_and_unrolled_layers_are_the_same_function(name):
  config = CONFIGS[name + '_scanned']
  model, params = _model(config)
  tokens_BT = _tokens(config)
  unrolled_params, unrolled_config = layout.unstack(params, config)
  np.testing.assert_allclose(
    _jitted(unrolled_config)(unrolled_params, tokens_BT)[0],
    _jitted(config)(params, tokens_BT)[0],
    atol=1e-6,
  )


def test_dropout_is_of_the_calls_that_bring_a_key():
  config = tiny_models.gpt2_like(dropout_rate=0.5)
  model, params = _model(config)
  tokens_BT = _tokens(config)
  plain, _ = _jitted(config)(params, tokens_BT)
  again, _ = _jitted(config)(params, tokens_BT)
  np.testing.assert_array_equal(plain, again)

  def dropped(seed):
    rngs = {'dropout': jax.random.key(seed)}
    return _jitted(config)(params, tokens_BT, rngs=rngs)[0]

  np.testing.assert_array_equal(dropped(0), dropped(0))
  assert np.abs(dropped(0) - dropped(1)).max() > 1e-3
  assert np.abs(dropped(0) - plain).max() > 1e-3


@pytest.mark.fast_cases(2)
@pytest.mark.parametrize('name', ['llama', 'gpt2', 'stable'])
def test_bfloat16_stays_near_float32(name):
  config = CONFIGS[name]
  model, params = _model(config)
  half, _ = _model(config, jnp.bfloat16)
  tokens_BT = _tokens(config)
  exact_BTV, _ = _jitted(config)(params, tokens_BT)
  rounded_BTV, _ = jax.jit(half.apply)(params, tokens_BT)
  assert rounded_BTV.dtype == jnp.float32
  # 8 bits of mantissa, a dozen roundings, relative to the largest logit.
  error = np.abs(rounded_BTV - exact_BTV).max() / np.abs(exact_BTV).max()
  assert 0 < error < 0.05


def test_learned_positions_refuse_what_they_do_not_have():
  config = tiny_models.gpt2_like(max_length=16)
  model, params = _model(config)
  with pytest.raises(ValueError, match='got a row or cache of 17 tokens'):
    _jitted(config)(params, _tokens(config, time=17))
  cache = kv_cache.init(config, batch_size=1, length=32)
  with pytest.raises(ValueError, match='got a row or cache of 32 tokens'):
    _jitted(config)(params, _tokens(config, batch=1, time=4), None, cache)


def test_a_packed_row_with_a_cache_is_refused():
  config = CONFIGS['llama']
  model, params = _model(config)
  cache = kv_cache.init(config, batch_size=1, length=8)
  tokens_BT = _tokens(config, batch=1, time=4)
  with pytest.raises(ValueError, match='got a cache and segment ids'):
    _jitted(config)(params, tokens_BT, None, cache, jnp.ones((1, 4), jnp.int32))
