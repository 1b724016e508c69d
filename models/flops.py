"""Analytic sizes and FLOPs of a model, for MFU and cost.

The compiler's cost analysis cannot be used, because it counts the body of a
scan once. A multiply-add is 2 FLOPs. Only matrix products count (PaLM,
arXiv:2204.02311, appendix B). Causal attention counts as the half that is
needed, so that no implementation is credited for wasted work.
"""

import jax
import jax.numpy as jnp

from models import model_config, transformer
from models.layers import mlp


def num_params(config: model_config.ModelConfig) -> int:
  """Returns the number of trained parameters, embeddings included."""
  shapes = jax.eval_shape(
    transformer.Transformer(config).init,
    jax.random.key(0),
    jax.ShapeDtypeStruct((1, 1), jnp.int32),
  )
  return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def num_active_params(config: model_config.ModelConfig) -> int:
  """Returns the number of parameters that compute one token.

  The routed experts that the token does not choose are left out: the '3B' of
  30B-A3B.
  """
  num_idle = config.num_experts - config.num_active_experts
  idle = _num_moe_layers(config) * num_idle * _expert_params(config)
  return num_params(config) - idle


def _num_moe_layers(config: model_config.ModelConfig) -> int:
  """Returns the number of layers with experts."""
  return sum(config.layer(n).has_experts for n in range(config.num_layers))


def _expert_params(config: model_config.ModelConfig) -> int:
  return _num_matrices(config) * config.model_width * config.expert_width


def _num_matrices(config: model_config.ModelConfig) -> int:
  return 3 if mlp.is_gated(config.mlp) else 2


def num_matmul_params(config: model_config.ModelConfig) -> int:
  """Returns the number of weights that multiply one token: layers and head.

  The embedding is a lookup; it counts only if it is also the head. In a layer
  with experts, the router and the experts of one token count.
  """
  dense = _num_matrices(config) * config.model_width * config.mlp_width
  num_chosen = config.num_active_experts + config.num_shared_experts
  router = config.num_experts * config.model_width
  moe = num_chosen * _expert_params(config) + router
  num_moe = _num_moe_layers(config)
  num_dense = config.num_layers - num_moe
  head = config.vocab_size * config.model_width
  return (
    config.num_layers * _attention_params(config)
    + num_dense * dense
    + num_moe * moe
    + head
  )


def _attention_params(config: model_config.ModelConfig) -> int:
  """Returns the number of weights in the matrices of a layer's attention."""
  width, heads = config.model_width, config.num_heads
  if not config.latent_width:
    return width * config.head_width * (2 * heads + 2 * config.num_kv_heads)
  queries = heads * config.head_width
  if config.query_latent_width:
    into = config.query_latent_width * (width + queries)
  else:
    into = width * queries
  channels = config.head_width - config.rotary_width + config.value_head_width
  return (
    into
    + width * (config.latent_width + config.rotary_width)
    + config.latent_width * heads * channels
    + heads * config.value_head_width * width
  )


def forward_flops_per_token(
  config: model_config.ModelConfig, context: float
) -> float:
  """Returns the FLOPs of one token with `context` tokens up to itself.

  A mean context gives a wrong result: a window limits each token, not the mean.
  """
  channels = config.num_heads * (config.head_width + config.value_head_width)
  # A window limits the keys that a token sees, in rows of any length.
  keys = sum(
    min(context, config.window) if config.layer(n).is_local else context
    for n in range(config.num_layers)
  )
  # Scores and weighted values each take a multiply-add per channel and key.
  return 2.0 * num_matmul_params(config) + 2.0 * channels * keys


class SpanFlops:
  """The forward FLOPs of successive tokens of one sequence of a model.

  The engine asks for every token, so terms that depend only on the model are
  computed once.
  """

  def __init__(self, config: model_config.ModelConfig):
    self._head = 2.0 * config.vocab_size * config.model_width
    self._layers = 2.0 * num_matmul_params(config) - self._head
    channels = config.num_heads * (config.head_width + config.value_head_width)
    layers = map(config.layer, range(config.num_layers))
    windows = [config.window if layer.is_local else 0 for layer in layers]
    # FLOPs per key that a token sees, by window.
    self._per_key = {
      window: 2.0 * channels * windows.count(window) for window in set(windows)
    }

  def __call__(self, start: int, length: int, num_logits: int) -> float:
    """Returns the FLOPs.

    Args:
      start: position of the first token, which attends to `start` earlier
        tokens and to itself.
      length: number of tokens.
      num_logits: number of these tokens whose logits are computed.
    """
    flops = self._layers * length + self._head * num_logits
    for window, per_key in self._per_key.items():
      flops += per_key * _keys_seen(start, length, window)
    return flops


def span_flops(
  config: model_config.ModelConfig, start: int, length: int, num_logits: int
) -> float:
  """Returns the FLOPs of `SpanFlops`, for a single use."""
  return SpanFlops(config)(start, length, num_logits)


def _keys_seen(start: int, length: int, window: int) -> float:
  """Returns the sum of the keys that the tokens see, their own included."""
  if not window:
    return length * (start + (length + 1) / 2)
  # The first tokens are within a window of the start and see all before them.
  num_growing = min(max(window - start, 0), length)
  growing = num_growing * (start + (num_growing + 1) / 2)
  return growing + (length - num_growing) * window


def train_flops_per_token(
  config: model_config.ModelConfig,
  row_length: int,
  *,
  is_frozen: bool = False,
  is_read_only: bool = False,
) -> float:
  """Returns the training FLOPs of one token: forward, and twice for backward.

  The mean over a row that is one document. Documents that are packed into a row
  see fewer keys.

  Args:
    is_frozen: whether the weights have no gradients, as below adapters. The
      products of the adapters themselves are not counted.
    is_read_only: whether no gradient goes through the model at all, as below
      heads that read its states. The heads are not counted.
  """
  weights = 2.0 * num_matmul_params(config) if is_frozen else 0.0
  once = span_flops(config, 0, row_length, row_length) / row_length
  if is_read_only:
    return once
  return 3.0 * once - weights
