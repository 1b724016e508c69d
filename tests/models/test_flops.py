"""Parameters and FLOPs against leaves, the compiler and published sizes."""

import jax
import jax.numpy as jnp

from models import flops, transformer
from tests.helpers import tiny_models


def _params(config):
  model = transformer.Transformer(config)
  return jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))


def test_matmul_params_are_the_kernels_and_the_head():
  for config in (
    tiny_models.llama_like(),
    tiny_models.gpt2_like(),
    tiny_models.llama_like(qk_norm=True),
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
