"""Parameters and FLOPs against leaves, the compiler and published sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import flops, transformer
from tests.helpers import tiny_models


def _params(config):
  model = transformer.Transformer(config)
  return jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))


@pytest.mark.slow
def test_matmul_params_are_the_kernels_and_the_head():
  for config in (
    tiny_models.llama_like(),
    tiny_models.gpt2_like(),
    tiny_models.llama_like(qk_norm=True),
    tiny_models.llama_like(mlp='none', mlp_width=0),
  ):
    leaves = jax.tree_util.tree_leaves_with_path(_params(config))
    kernels = sum(
      leaf.size for path, leaf in leaves if 'kernel' in str(path[-1])
    )
    head = config.vocab_size * config.model_width
    assert flops.num_matmul_params(config) == kernels + head
    assert flops.num_params(config) == sum(leaf.size for _, leaf in leaves)


def test_flops_agree_with_the_compiler():
  """On an unrolled forward pass, where the compiler counts every layer."""
  config = tiny_models.llama_like(model_width=64, mlp_width=256, vocab_size=512)
  batch, time = 2, 32
  model = transformer.Transformer(config)
  compiled = (
    jax.jit(model.apply)
    .lower(_params(config), jnp.zeros((batch, time), jnp.int32))
    .compile()
  )
  counted = compiled.cost_analysis()['flops'] / (batch * time)
  # One tile of queries: attention computes all scores, not half of them.
  analytic = flops.forward_flops_per_token(config, context=time)
  # The compiler counts norms, softmax and rotations too.
  assert analytic < counted < 1.15 * analytic


_WINDOWS = {
  'no window': {},
  'one window': {'window': 4},
  'window of one': {'window': 1},
  'mistral': {'window': 16, 'layer_pattern': 'l'},
  'gemma': {'window': 8, 'layer_pattern': 'lllllg', 'num_layers': 8},
  'without rotation': {'window': 8, 'layer_pattern': 'lmng', 'num_layers': 4},
  'latent': {
    'latent_width': 16, 'rotary_width': 4, 'head_width': 12, 'value_width': 8,
    'num_kv_heads': 4, 'num_heads': 4,
  },
}  # fmt: skip


@pytest.mark.parametrize('row_length', [1, 7, 16, 33])
@pytest.mark.parametrize('name', _WINDOWS)
def test_training_counts_the_keys_that_each_token_sees(name, row_length):
  """Token by token, and as one span; the mean context would count too many."""
  fields = {'scan_layers': False} | _WINDOWS[name]
  for make in (tiny_models.llama_like, tiny_models.mixture):
    config = make(**fields)
    config.validate()
    per_token = [
      flops.forward_flops_per_token(config, seen + 1)
      for seen in range(row_length)
    ]
    found = flops.train_flops_per_token(config, row_length) * row_length
    assert found == pytest.approx(3 * sum(per_token), rel=1e-12)
    whole = flops.span_flops(config, 0, row_length, row_length)
    assert found == pytest.approx(3 * whole, rel=1e-12)
    channels = config.num_heads * (config.head_width + config.value_head_width)
    keys = (per_token[0] * row_length - sum(per_token)) / (-2.0 * channels)
    expected = sum(
      int(_visible(row_length, config.window * layer.is_local).sum())
      for layer in map(config.layer, range(config.num_layers))
    )
    # The first token sees one key in every layer.
    assert keys == pytest.approx(expected - config.num_layers * row_length)


def _visible(time, window):
  query, key = np.ogrid[:time, :time]
  return (key <= query) & ((query - key < window) | (not window))


def test_a_window_of_half_the_row_is_counted_as_published():
  """The mean of min(t, W) at T = 2 W is 3/4 W, not W."""
  config = tiny_models.llama_like(window=512, scan_layers=False)
  products = 6.0 * flops.num_matmul_params(config)
  attention = flops.train_flops_per_token(config, 1024) - products
  full = flops.train_flops_per_token(
    tiny_models.llama_like(scan_layers=False), 1024
  )
  assert attention / (full - products) == pytest.approx(0.75, abs=1e-3)


def test_gpt2_small_has_the_published_size():
  config = tiny_models.gpt2_like(
    vocab_size=50_257,
    num_layers=12,
    model_width=768,
    num_heads=12,
    num_kv_heads=12,
    head_width=64,
    mlp_width=3072,
    max_length=1024,
    scan_layers=True,
  )
  assert flops.num_params(config) == 124_439_808
