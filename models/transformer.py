"""The decoder: one definition for training, prefill and decode.

    logits_BTV, cache = model.apply(params, tokens_BT, positions_BT, cache)

`cache=None` is training: every token of the call is seen, nothing is kept.
With a cache the call's keys and values are written into it and attention reads
it, whether the call is a prompt or a single token. Nothing is stored in Flax
collections; what a call needs it is given, what it changes it returns.

Pre-norm residual blocks as in GPT-2 and Llama (arXiv:2302.13971), told apart by
`ModelConfig` fields only.
"""

from typing import Any, cast

from flax import linen as nn
import jax
import jax.numpy as jnp

from models import (
  attention,
  axes,
  config as config_lib,
  kv_cache,
  mlp,
  norms,
  rope,
)


class Attention(nn.Module):
  """Projects to queries, keys and values, attends, and projects back."""

  config: config_lib.ModelConfig
  dtype: Any

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    angles_BTc: jax.Array | None,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array | None,
    cache: kv_cache.LayerCache | None,
  ) -> tuple[jax.Array, kv_cache.LayerCache | None]:
    config = self.config

    def project(name: str, heads: int) -> jax.Array:
      y = mlp.Linear(
        heads * config.head_width,
        self.dtype,
        config.use_bias,
        config.init_std,
        name=name,
      )(x_BTD)
      return y.reshape((*y.shape[:2], heads, config.head_width))

    q_BTHC = project('query', config.num_heads)
    k_BTKC = project('key', config.num_kv_heads)
    v_BTKC = project('value', config.num_kv_heads)
    if angles_BTc is not None:
      q_BTHC = rope.rotate(q_BTHC, angles_BTc)
      k_BTKC = rope.rotate(k_BTKC, angles_BTc)
    slots_BT = None
    if cache is None:
      k_BKSC, v_BKSC = k_BTKC.swapaxes(1, 2), v_BTKC.swapaxes(1, 2)
    else:
      cache = kv_cache.write(cache, k_BTKC, v_BTKC, positions_BT)
      k_BKSC, v_BKSC = cache
      slots_BT = positions_BT
    out_BTHC = attention.attend(
      q_BTHC,
      k_BKSC,
      v_BKSC,
      slots_BT=slots_BT,
      segment_ids_BT=segment_ids_BT,
      dropout=_dropout(self, config.dropout_rate),
    )
    out_BTD = mlp.Linear(
      config.model_width,
      self.dtype,
      config.use_bias,
      mlp.residual_std(config),
      name='out',
    )(out_BTHC.reshape((*out_BTHC.shape[:2], -1)))
    return out_BTD, cache


class Block(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x)).

  Takes and returns (x, cache) in the order that `nn.scan` wants: the carry
  first, then what each layer has of its own, then what all layers share.
  """

  config: config_lib.ModelConfig
  dtype: Any

  @nn.compact
  def __call__(self, x_BTD, cache, angles_BTc, positions_BT, segment_ids_BT):
    config = self.config
    dropout = _dropout(self, config.dropout_rate)
    x_BTD = nn.with_logical_constraint(x_BTD, axes.STREAM)
    y_BTD, cache = Attention(config, self.dtype, name='attention')(
      norms.Norm(config, name='attention_norm')(x_BTD),
      angles_BTc,
      positions_BT,
      segment_ids_BT,
      cache,
    )
    x_BTD = x_BTD + dropout(y_BTD)
    y_BTD = mlp.Mlp(config, self.dtype, name='mlp')(
      norms.Norm(config, name='mlp_norm')(x_BTD)
    )
    return x_BTD + dropout(y_BTD), cache


class Transformer(nn.Module):
  """A decoder-only language model.

  Attributes:
    config: what is computed.
    dtype: the dtype it is computed in; parameters are float32 in training and
      whatever was frozen in serving. Softmax and norms are float32 always.
  """

  config: config_lib.ModelConfig
  dtype: Any = jnp.float32

  def setup(self):
    config = self.config
    normal = nn.initializers.normal(config.init_std)
    self.embed = nn.Embed(
      config.vocab_size, config.model_width, embedding_init=normal
    )
    if config.positions == 'learned':
      self.position_embed = nn.Embed(
        config.max_length, config.model_width, embedding_init=normal
      )
    if config.scan_layers:
      self.layers = nn.scan(
        Block,
        variable_axes={'params': 0},
        split_rngs={'params': True, 'dropout': True},
        in_axes=cast(Any, (0, *[nn.broadcast] * 3)),  # cache; what is shared
        length=config.num_layers,
      )(config, self.dtype)
    else:
      self.layer = [Block(config, self.dtype) for _ in range(config.num_layers)]
    self.dropout = nn.Dropout(config.dropout_rate)
    self.final_norm = norms.Norm(config)
    if not config.tie_embeddings:
      self.head = nn.Embed(
        config.vocab_size, config.model_width, embedding_init=normal
      )

  def __call__(
    self,
    tokens_BT: jax.Array,
    positions_BT: jax.Array | None = None,
    cache: kv_cache.Cache | None = None,
    segment_ids_BT: jax.Array | None = None,
  ) -> tuple[jax.Array, kv_cache.Cache | None]:
    """Returns float32 logits [B, T, V] and the cache, written to.

    Args:
      tokens_BT: token ids.
      positions_BT: position of each token in its document; 0..T-1 if None.
      cache: None, or a cache from `kv_cache.init`.
      segment_ids_BT: which document of the row a token belongs to. A packed
        row is training only: it excludes a cache.
    """
    hidden_BTD, cache = self.hidden(
      tokens_BT, positions_BT, cache, segment_ids_BT
    )
    return self.unembed(hidden_BTD), cache

  def hidden(
    self,
    tokens_BT: jax.Array,
    positions_BT: jax.Array | None = None,
    cache: kv_cache.Cache | None = None,
    segment_ids_BT: jax.Array | None = None,
  ) -> tuple[jax.Array, kv_cache.Cache | None]:
    """Returns what the head is applied to, [B, T, D], and the cache."""
    if cache is not None and segment_ids_BT is not None:
      raise ValueError(
        'got a cache and segment ids, expected one of them: a cache holds one'
        ' document per sequence; give each document a row of its own'
      )
    config = self.config
    self._check_length(tokens_BT, cache)
    if positions_BT is None:
      positions_BT = jnp.broadcast_to(
        jnp.arange(tokens_BT.shape[1])[None, :], tokens_BT.shape
      )
    # The table is gathered whole before rows are taken from it, as every other
    # matrix is before it multiplies; looking up a split width would not do.
    table_VD = nn.with_logical_constraint(
      self.embed.embedding, (axes.VOCAB, axes.WIDTH)
    )
    x_BTD = jnp.take(table_VD, tokens_BT, axis=0)
    x_BTD = nn.with_logical_constraint(x_BTD, axes.STREAM)
    angles_BTc = None
    if config.positions == 'learned':
      x_BTD = x_BTD + self.position_embed(positions_BT)
    else:
      angles_BTc = rope.angles(
        positions_BT, config.head_width, config.rope_base
      )
    x_BTD = x_BTD.astype(self.dtype)
    x_BTD = self.dropout(x_BTD, deterministic=not self.has_rng('dropout'))
    shared = angles_BTc, positions_BT, segment_ids_BT
    if config.scan_layers:
      x_BTD, cache = self.layers(x_BTD, cache, *shared)
    else:
      entries = cache or (None,) * config.num_layers
      written = []
      for layer, entry in zip(self.layer, entries, strict=True):
        x_BTD, entry = layer(x_BTD, entry, *shared)
        written.append(entry)
      cache = tuple(written) if cache is not None else None
    return self.final_norm(x_BTD), cache

  def unembed(self, hidden: jax.Array) -> jax.Array:
    """Returns float32 logits [..., V] of hidden states [..., D]."""
    head_VD = self.head_matrix()
    return jax.lax.dot_general(
      hidden.astype(self.dtype),
      head_VD.astype(self.dtype),
      (((hidden.ndim - 1,), (1,)), ((), ())),
      preferred_element_type=jnp.float32,
    )

  def _check_length(self, tokens_BT, cache) -> None:
    # Beyond the table a lookup would be clamped: wrong, and silent.
    length = tokens_BT.shape[1]
    if cache is not None:
      length = max(length, kv_cache.length(cache))
    if self.config.positions == 'learned' and length > self.config.max_length:
      raise ValueError(
        f'learned positions: got a row or cache of {length} tokens, expected'
        f' at most max_length = {self.config.max_length}; shorten it or train'
        ' with a longer model.max_length'
      )

  def head_matrix(self) -> jax.Array:
    """Returns the unembedding, [V, D]: the embedding itself when tied."""
    return (self.embed if self.config.tie_embeddings else self.head).embedding


def _dropout(module: nn.Module, rate: float) -> nn.Dropout:
  """Dropout in calls that were given a key for it; evaluation gives none."""
  return nn.Dropout(rate, deterministic=not module.has_rng('dropout'))
