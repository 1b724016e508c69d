"""Measurements of claims about serving."""

import dataclasses

import numpy as np

from evals import claims as claims_lib
from experiments import presets
from models import flops, kv_cache, model_config
from studies.papers import port

_NUM_TOKENS, _ROUNDS = 16, 200_000


def published_sizes(
  claim: claims_lib.Claim, setting: port.Setting
) -> port.Measured:
  """Returns parameters of models, from the shapes of their weights."""
  del claim, setting
  gpt2 = presets.gpt2(
    vocab_size=50_257, num_layers=12, num_heads=12, width=768, length=1024
  )
  mixtral, qwen = _mixtral(), presets.qwen3_30b_a3b(length=1024)
  return {
    'GPT-2 small, 1e6': flops.num_params(gpt2) / 1e6,
    'SmolLM2-135M, 1e6': flops.num_params(presets.smollm2_135m()) / 1e6,
    'Mixtral 8x7B, 1e9': flops.num_params(mixtral) / 1e9,
    'Mixtral 8x7B, active, 1e9': flops.num_active_params(mixtral) / 1e9,
    'Qwen3-30B-A3B, 1e9': flops.num_params(qwen) / 1e9,
    'Qwen3-30B-A3B, active, 1e9': flops.num_active_params(qwen) / 1e9,
  }


def _mixtral() -> model_config.ModelConfig:
  """Returns Mixtral 8x7B (arXiv:2401.04088, table 1)."""
  dense = presets.llama(
    vocab_size=32_000,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    width=4096,
    mlp_width=0,
    length=32_768,
  )
  return dataclasses.replace(
    dense, num_experts=8, num_active_experts=2, expert_width=14_336
  )


def cache_sizes(
  claim: claims_lib.Claim, setting: port.Setting
) -> port.Measured:
  """Returns sizes of caches, from their shapes."""
  del claim, setting
  opt = presets.gpt2(
    vocab_size=50_272, num_layers=40, num_heads=40, width=5120, length=2048
  )
  shape = {'vocab_size': 102_400, 'mlp_width': 1, 'length': 4096}
  deepseek_67b = presets.llama(
    num_layers=95, num_heads=64, num_kv_heads=8, width=8192, **shape
  )
  # Heads of 128 + 64 channels, of which all share the 64 that are rotated.
  deepseek_v2 = dataclasses.replace(
    presets.llama(
      num_layers=60, num_heads=128, num_kv_heads=128, width=5120, **shape
    ),
    head_width=192,
    rotary_width=64,
    value_width=128,
    latent_width=512,
  )
  latents, groups = map(_numbers_per_token, (deepseek_v2, deepseek_67b))
  return {
    'OPT-13B, KiB/token': 2 * _numbers_per_token(opt) / 1024,
    # A group of grouped-query attention has a key and a value of 128 channels.
    'latent attention, groups of equal size': latents / 60 / (2 * 128),
    'saved against DeepSeek 67B, %': 100 * (1 - latents * 6 / (groups * 16)),
  }


def _numbers_per_token(config: model_config.ModelConfig) -> int:
  rows, width = kv_cache.rows_and_width(config)
  return config.num_layers * rows * width


def speculative_tokens(
  claim: claims_lib.Claim, setting: port.Setting
) -> port.Measured:
  """Returns tokens per round, and the distance of their law to the target."""
  del claim
  found: dict[str, list[float]] = {}
  for rate, drafted in ((0.6, 2), (0.7, 3), (0.8, 5), (0.9, 10)):
    name = f'overlap {rate:g}, {drafted} drafted'
    found[name] = [
      _tokens_per_round(np.random.default_rng([seed, drafted]), rate, drafted)
      for seed in setting.seeds
    ]
  found['total variation from the target'] = [
    _distance(np.random.default_rng([seed, 0])) for seed in setting.seeds
  ]
  return found


def _pair(
  rng: np.random.Generator, overlap: float
) -> tuple[np.ndarray, np.ndarray]:
  """Returns target and draft, [V], with sum min(p, q) = overlap."""
  both, rest = rng.dirichlet(np.ones(_NUM_TOKENS), size=2)
  # Parts on different tokens have no overlap but that of `both`.
  half = np.arange(_NUM_TOKENS) < _NUM_TOKENS // 2
  parts = [np.where(side, rest, 0) for side in (half, ~half)]
  target, draft = (
    overlap * both + (1 - overlap) * part / part.sum() for part in parts
  )
  return target, draft


def _round(
  rng: np.random.Generator, target: np.ndarray, draft: np.ndarray, shape
) -> tuple[np.ndarray, np.ndarray]:
  """Returns drafted tokens and whether each is accepted, of algorithm 1."""
  drafted = rng.choice(_NUM_TOKENS, size=shape, p=draft)
  odds = target[drafted] / draft[drafted]
  return drafted, rng.random(shape) < odds


def _tokens_per_round(rng, overlap: float, num_drafted: int) -> float:
  target, draft = _pair(rng, overlap)
  _, is_accepted = _round(rng, target, draft, (_ROUNDS, num_drafted))
  # The tokens before the first rejection, and the token that the target adds.
  return float(np.cumprod(is_accepted, axis=-1).sum(axis=-1).mean() + 1)


def _distance(rng) -> float:
  target, draft = _pair(rng, 0.7)
  drafted, is_accepted = _round(rng, target, draft, _ROUNDS)
  left = np.maximum(target - draft, 0)
  instead = rng.choice(_NUM_TOKENS, size=_ROUNDS, p=left / left.sum())
  tokens = np.where(is_accepted, drafted, instead)
  shares = np.bincount(tokens, minlength=_NUM_TOKENS) / _ROUNDS
  return float(np.abs(shares - target).sum() / 2)
