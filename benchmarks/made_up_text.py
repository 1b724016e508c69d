"""Weights and words that mean nothing, for benchmarks of how fast they flow."""

from collections.abc import Iterable, Sequence
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models import config as model_config, transformer


class Tokenizer:
  """A vocabulary of any size; an id is spelt by its number and a space."""

  kind = 'made_up'
  bos_id, eos_id, pad_id = 0, 1, 2

  def __init__(self, vocab_size: int):
    self.vocab_size = vocab_size

  def token_bytes(self, token_id: int) -> bytes:
    """Returns what `token_id` is spelt."""
    return b'%d ' % token_id

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the ids as text."""
    return b''.join(map(self.token_bytes, ids)).decode()

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text that `decode` made."""
    return [int(word) for word in text.split()]

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """Returns what `encode` gives for each text."""
    return [np.asarray(self.encode(text)) for text in texts]

  def num_bytes_V(self) -> np.ndarray:
    """Returns int32 [V], bytes per id."""
    ids = range(self.vocab_size)
    return np.asarray([len(self.token_bytes(i)) for i in ids], np.int32)

  def save(self, directory: str | os.PathLike) -> None:
    """Refuses: nothing that it spells is worth keeping."""
    raise NotImplementedError(
      f'{directory}: got a tokenizer of benchmarks to save, expected a real one'
    )


def random_params(config: model_config.ModelConfig) -> Any:
  """Returns weights as they are before training."""
  model = transformer.Transformer(config)
  return jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
