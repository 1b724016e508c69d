"""A model of random weights and a tokenizer for it: enough to measure speed."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from inference.engine import adapter_table
from models import model_config, transformer
from models.layers import adapters
from text import tokenizer as tokenizer_lib


class Tokenizer(tokenizer_lib.ByteTokenizer):
  """A tokenizer with a vocabulary of any size; every id decodes to a letter."""

  bos_id, eos_id, pad_id = 0, 1, 2

  def __init__(self, vocab_size: int):
    self.vocab_size = vocab_size

  def token_bytes(self, token_id: int) -> bytes:
    """Returns one letter, as UTF-8."""
    return b'%c' % (ord('a') + token_id % 26)


def params(config: model_config.ModelConfig) -> Any:
  """Returns the initial weights of a model, as before training."""
  model = transformer.Transformer(config)
  return jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))


def adapter(params: Any, *, seed: int, rank: int) -> Any:
  """Returns an adapter of every linear layer of a model."""
  rng = np.random.default_rng(seed)

  def matrix(*shape):
    return rng.normal(0, 0.01, shape).astype(np.float32)

  shapes = adapter_table.layer_shapes(params)
  return adapters.nested(
    {
      path: {'a': matrix(width, rank), 'b': matrix(rank, out)}
      for path, (width, out) in shapes.items()
    }
  )
