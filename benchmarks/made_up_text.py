"""Weights and words that mean nothing, for benchmarks of how fast they flow."""

from typing import Any

import jax
import jax.numpy as jnp

from models import model_config, transformer
from text import tokenizer as tokenizer_lib


class Tokenizer(tokenizer_lib.ByteTokenizer):
  """A vocabulary of any size in which every id is spelt as some letter."""

  bos_id, eos_id, pad_id = 0, 1, 2

  def __init__(self, vocab_size: int):
    self.vocab_size = vocab_size

  def token_bytes(self, token_id: int) -> bytes:
    """Returns a letter."""
    return b'%c' % (ord('a') + token_id % 26)


def random_params(config: model_config.ModelConfig) -> Any:
  """Returns weights as they are before training."""
  model = transformer.Transformer(config)
  return jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
