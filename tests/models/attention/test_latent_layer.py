"""Latent attention: a small cache, with the results of a full pass.

tests/frozen/huggingface compares it with another implementation.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import execution, kv_cache, layout, transformer
from models.linear import invariant
from tests.helpers import frozen_dirs, tiny_models

CONFIG = tiny_models.llama_like(
  num_kv_heads=4,
  head_width=10,
  rotary_width=4,
  value_width=6,
  latent_width=8,
  query_latent_width=12,
)
TIME, PROMPT = 20, 13


@pytest.fixture(scope='module')
def case():
  params = frozen_dirs.params(CONFIG)
  tokens_1T = jnp.asarray(np.random.default_rng(0).integers(0, 61, (1, TIME)))
  full_1TV, _ = transformer.Transformer(CONFIG).apply(params, tokens_1T)
  return params, tokens_1T, np.asarray(full_1TV[0])


def test_a_token_leaves_a_latent_and_a_rotated_key():
  cache = kv_cache.init(CONFIG, batch_size=3, length=5)
  assert [x.shape for x in jax.tree.leaves(cache)] == [(3, 1, 5, 12)] * 2
  pools = kv_cache.init_pages(CONFIG, num_pages=7, page_size=4)
  assert [x.shape for x in jax.tree.leaves(pools)] == [(7, 4, 1, 12)] * 2


@pytest.mark.slow
@pytest.mark.parametrize('scan_layers', [False, True])
@pytest.mark.parametrize(
  'how',
  [execution.Execution(), invariant.execution()],
  ids=['default', 'invariant'],
)
def test_dense_caches_give_the_full_forward(case, scan_layers, how):
  params, tokens_1T, full_TV = case
  config = CONFIG
  if scan_layers:
    params, config = layout.stack(params, CONFIG)
  model = transformer.Transformer(config, execution=how)
  cache = kv_cache.init(config, batch_size=1, length=TIME + 3)
  apply = jax.jit(model.apply)
  logits, cache = apply(params, tokens_1T[:, :PROMPT], None, cache)
  got = [np.asarray(logits[0])]
  for t in range(PROMPT, TIME):
    at_11 = jnp.full((1, 1), t)
    logits, cache = apply(params, tokens_1T[:, t : t + 1], at_11, cache)
    got.append(np.asarray(logits[0]))
  # The same products in another order: through latents, not through heads.
  np.testing.assert_allclose(np.concatenate(got), full_TV, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
  'how',
  [execution.Execution(), invariant.execution()],
  ids=['default', 'invariant'],
)
def test_pages_give_the_full_forward(case, how):
  """A prompt in one chunk, then one token at a time."""
  params, tokens_1T, full_TV = case
  model = transformer.Transformer(CONFIG, execution=how)
  pools = kv_cache.init_pages(CONFIG, num_pages=6, page_size=16)
  table = jnp.array([[2, 4, 0, 0]], jnp.int32)
  none = jnp.zeros((0, 4), jnp.int32)

  def run(tokens_1T, positions_1T, pools, tables):
    cache = tuple(kv_cache.PagedLayer(pool, *tables) for pool in pools)
    logits, cache = model.apply(params, tokens_1T, positions_1T, cache)
    return logits[0], tuple(layer.pages for layer in cache)

  positions_1T = jnp.arange(PROMPT)[None]
  logits, pools = run(tokens_1T[:, :PROMPT], positions_1T, pools, (none, table))
  got = [np.asarray(logits)]
  step = jax.jit(lambda token, at, pools: run(token, at, pools, (table, none)))
  for t in range(PROMPT, TIME):
    logits, pools = step(tokens_1T[:, t : t + 1], jnp.full((1, 1), t), pools)
    got.append(np.asarray(logits))
  np.testing.assert_allclose(np.concatenate(got), full_TV, atol=1e-4)
  assert not np.any(np.asarray(pools[0].kv_PQYC[0]))  # page 0 is nobody's
