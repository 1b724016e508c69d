"""Tiny models, tokenizers and batches that the tests share.

No two sizes are equal, so that a transposed axis is always noticed.
"""

import os

import numpy as np

from models import model_config
from text import tokenizer


def llama_like(**overrides) -> model_config.ModelConfig:
  """RMSNorm, rotary positions, grouped queries, SwiGLU, untied head."""
  fields = {
    'vocab_size': 61,
    'num_layers': 2,
    'model_width': 24,
    'num_heads': 4,
    'num_kv_heads': 2,
    'head_width': 6,
    'mlp_width': 40,
    'max_length': 32,
    'norm': 'rmsnorm',
    'norm_epsilon': 1e-5,
    'positions': 'rope',
    'rope_base': 10_000.0,
    'mlp': 'swiglu',
    'use_bias': False,
    'tie_embeddings': False,
    'dropout_rate': 0.0,
    'scan_layers': False,
  }
  return model_config.ModelConfig(**(fields | overrides))


def stable(**overrides) -> model_config.ModelConfig:
  """Returns `llama_like` with every option for stability, twice its base width.

  The initial weights are so large that each option changes the output.
  """
  fields = {
    'qk_norm': True,
    'logit_softcap': 3.0,
    'init_std': 0.3,
    'mup_base_width': 12,
    'mup_base_head_width': 3,
  }
  return llama_like(**(fields | overrides))


def gpt2_like(**overrides) -> model_config.ModelConfig:
  """LayerNorm, learned positions, one kv head per head, GELU, biases, tied."""
  fields = {
    'vocab_size': 61,
    'num_layers': 2,
    'model_width': 24,
    'num_heads': 4,
    'num_kv_heads': 4,
    'head_width': 6,
    'mlp_width': 40,
    'max_length': 32,
    'norm': 'layernorm',
    'norm_epsilon': 1e-5,
    'positions': 'learned',
    'rope_base': 10_000.0,
    'mlp': 'gelu',
    'use_bias': True,
    'tie_embeddings': True,
    'dropout_rate': 0.0,
    'scan_layers': False,
  }
  return model_config.ModelConfig(**(fields | overrides))


def mixture(**overrides) -> model_config.ModelConfig:
  """`llama_like` with three of eight experts, and two shared, per token."""
  fields = {
    'mlp_width': 0,
    'num_experts': 8,
    'num_active_experts': 3,
    'num_shared_experts': 2,
    'expert_width': 20,
    'norm_topk': True,
    'balance_loss_weight': 0.05,
    'router_z_weight': 0.01,
  }
  return llama_like(**(fields | overrides))


def odd_heads(**overrides) -> model_config.ModelConfig:
  """`llama_like` with sizes that no power of two divides, as SmolLM2's."""
  fields = {'num_heads': 9, 'num_kv_heads': 3, 'mlp_width': 42}
  return llama_like(**(fields | overrides))


def byte_tokenizer() -> tokenizer.ByteTokenizer:
  """The smallest real tokenizer: 256 bytes and three special ids."""
  return tokenizer.ByteTokenizer()


def batch(
  *,
  batch_size: int = 8,
  row_length: int = 16,
  vocab_size: int = 61,
  num_segments: int = 1,
  num_padding: int = 0,
  seed: int = 0,
) -> dict[str, np.ndarray]:
  """A random batch with the keys, dtypes and rules of `data.batches`.

  Each row holds `num_segments` documents of nearly equal length, then
  `num_padding` slots of segment 0 and weight 0.
  """
  rng = np.random.default_rng(seed)
  shape = (batch_size, row_length)
  num_real = row_length - num_padding
  segment_ids_T = np.zeros(row_length, np.int32)
  positions_T = np.zeros(row_length, np.int32)
  for i, slots in enumerate(np.array_split(np.arange(num_real), num_segments)):
    segment_ids_T[slots] = i + 1
    positions_T[slots] = np.arange(len(slots))
  is_real_BT = np.broadcast_to(segment_ids_T > 0, shape)
  ids_BT = rng.integers(0, vocab_size, (2, *shape), dtype=np.int32)
  tokens_BT, targets_BT = np.where(is_real_BT, ids_BT, 0)
  return {
    'tokens': tokens_BT,
    'targets': targets_BT,
    'positions': np.tile(positions_T, (batch_size, 1)),
    'segment_ids': np.tile(segment_ids_T, (batch_size, 1)),
    'weights': is_real_BT.astype(np.float32),
  }


def subprocess_env(*, num_devices: int = 1, **extra: str) -> dict[str, str]:
  """The environment of a child process that runs one of our entry points.

  Args:
    num_devices: fake CPU devices the child sees; the tests themselves see 8.
    **extra: variables to add.
  """
  env = dict(os.environ)
  env['XLA_FLAGS'] = (
    f'{env.get("XLA_FLAGS", "")}'
    f' --xla_force_host_platform_device_count={num_devices}'
  )
  # Child processes run as a user would run them.
  env.pop('JAX_NUMPY_RANK_PROMOTION', None)
  return env | extra
