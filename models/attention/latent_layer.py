"""Multi-head latent attention: keys and values from one small vector per token.

The cache stores a latent vector of U numbers per token, from which each head
computes its keys and values. It also stores the r rotated channels of a key,
which all heads share:

    latent = norm(x W_latent)        [U]
    rope   = rotate(x W_key_rope)    [r]
    key    = [rope, latent W_key_up]       of each head
    value  = latent W_value_up             of each head

A pass without a cache computes keys and values and attends like any other. A
pass with a cache does not compute them. Because a score is q W_key_up^T latent,
the queries are projected to the space of latents and attend there; W_value_up
then projects the result to values (appendix C of the paper). For the cache, and
for the attention over it, this is a single head whose keys [rope, latent] are
also its values; the rope channels of the result are dropped. A layer stores
r + U numbers per token instead of 2 H C.

The rotated channels are the first r of a head; in the paper they are the last.
Scores do not depend on the order of channels.

Reference: DeepSeek-V2, arXiv:2405.04434, section 2.1.
"""

import dataclasses
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from models import execution as execution_lib, kv_cache, model_config, mup
from models.attention import form as form_lib, rope
from models.layers import adapters, mlp, norms

# The epsilon of the norms of latents. It does not follow norm_epsilon, as in
# every implementation of DeepSeek's models.
LATENT_EPSILON = 1e-6
# Projections whose results every head reads.
_SHARED = 'query_down', 'latent', 'key_rope'


class LatentAttention(nn.Module):
  """Latent attention, with the arguments of `attention.layer.Attention`."""

  config: model_config.ModelConfig
  dtype: Any
  execution: execution_lib.Execution
  layer: model_config.Layer

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    angles_BTc: jax.Array | None,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array | None,
    cache: kv_cache.Layer | None,
  ) -> tuple[jax.Array, kv_cache.Layer | None]:
    config = self.config
    q_BTHC = self._queries(x_BTD)
    latent_BTU = self._linear('latent', config.latent_width, config.qkv_bias)(
      x_BTD
    )
    latent_BTU = self._norm('latent_norm')(latent_BTU)
    rope_BT1r = self._linear('key_rope', config.rotary_width, config.qkv_bias)(
      x_BTD
    )[:, :, None, :]
    if angles_BTc is not None:
      amplitude = config.rope_scaling.amplitude
      q_BTHC = rope.rotate(q_BTHC, angles_BTc, amplitude)
      rope_BT1r = rope.rotate(rope_BT1r, angles_BTc, amplitude)
    up = Up(config, name='key_up')(), Up(config, name='value_up')()
    form = form_lib.of_layer(config, is_local=self.layer.is_local)
    if cache is None:
      out_BTHC = self._attend_whole(
        q_BTHC, latent_BTU, rope_BT1r, up, segment_ids_BT, form
      )
    else:
      # One head with C = r + U, whose keys are also its values.
      kv_BT1C = jnp.concatenate([rope_BT1r, latent_BTU[:, :, None]], axis=3)
      cache = kv_cache.write(cache, kv_BT1C, kv_BT1C, positions_BT)
      out_BTHC = self._attend_cached(q_BTHC, cache, positions_BT, up, form)
    out_BTD = self._linear(
      'out', config.model_width, config.out_bias, mlp.residual_std(config)
    )(out_BTHC.reshape((*out_BTHC.shape[:2], -1)))
    return out_BTD, cache

  def _queries(self, x_BTD):
    config = self.config
    width = config.num_heads * config.head_width
    if config.query_latent_width:
      latent = self._linear(
        'query_down', config.query_latent_width, config.qkv_bias
      )(x_BTD)
      q = self._linear('query_up', width)(
        self._norm('query_latent_norm')(latent)
      )
    else:
      q = self._linear('query', width)(x_BTD)
    q_BTHC = q.reshape((*q.shape[:2], config.num_heads, config.head_width))
    if (multiplier := mup.query_multiplier(config)) != 1:
      q_BTHC = q_BTHC * multiplier
    return q_BTHC

  def _attend_whole(
    self, q_BTHC, latent_BTU, rope_BT1r, up, segment_ids_BT, form
  ):
    """Returns attention over the keys and values of every head."""
    config = self.config
    key_UHC, value_UHC = (w.astype(self.dtype) for w in up)
    k_BHTC = jnp.einsum('BTU,UHC->BHTC', latent_BTU, key_UHC)
    # All heads share the rotated channels of a key.
    rope_BHTr = jnp.broadcast_to(
      rope_BT1r.swapaxes(1, 2), (*k_BHTC.shape[:3], rope_BT1r.shape[3])
    )
    has_dropout = config.dropout_rate and self.has_rng('dropout')
    return self.execution.attend(
      q_BTHC,
      jnp.concatenate([rope_BHTr, k_BHTC], axis=3),
      jnp.einsum('BTU,UHC->BHTC', latent_BTU, value_UHC),
      segment_ids_BT=segment_ids_BT,
      dropout=nn.Dropout(config.dropout_rate, deterministic=False)
      if has_dropout
      else None,
      form=form,
    )

  def _attend_cached(self, q_BTHC, cache, positions_BT, up, form):
    """Returns attention of queries that are projected to the latents."""
    key_UHC, value_UHC = (w.astype(self.dtype) for w in up)
    width = self.config.rotary_width

    def by_token(equation, x_BTHI, w_UHC):
      """Multiplies each head of each token through `by_head` and `by_row`."""

      def of_heads(x_BTHI, w_UHC):
        def multiply(x):
          x = x.reshape((*x.shape[:-1], w_UHC.shape[1], -1))
          return jnp.einsum(equation, x, w_UHC)

        rows = x_BTHI.reshape((*x_BTHI.shape[:2], -1))
        return self.execution.by_row(multiply, rows)

      return self.execution.by_head(of_heads, x_BTHI, w_UHC)

    # q (W_key_up^T latent) = (q W_key_up^T) latent: queries go to the latents,
    # so that no key is computed. The rotated channels of a query stay as they
    # are.
    q_BTHU = by_token('...HC,UHC->...HU', q_BTHC[..., width:], key_UHC)
    q_BTHC = jnp.concatenate([q_BTHC[..., :width], q_BTHU], axis=3)
    out_BTHC = self.execution.attend_cached(q_BTHC, cache, positions_BT, form)
    # The rope channels of the result are weighted keys, not values.
    return by_token('...HU,UHC->...HC', out_BTHC[..., width:], value_UHC)

  def _linear(self, name, width, use_bias=False, std=None):
    config = self.config
    std = mup.hidden_std(config) if std is None else std
    port = None
    if name == 'out':
      port = self.execution.joined
    elif name in _SHARED:
      port = self.execution.shared
    return mlp.Linear(
      width,
      self.dtype,
      use_bias,
      std,
      port or self.execution.linear,
      self.execution.stored,
      name=name,
    )

  def _norm(self, name):
    config = dataclasses.replace(
      self.config, norm='rmsnorm', norm_epsilon=LATENT_EPSILON
    )
    return norms.Norm(config, by_row=self.execution.by_row, name=name)


class Up(nn.Module):
  """The projection of a latent to the keys or values of all heads."""

  config: model_config.ModelConfig

  @nn.compact
  def __call__(self) -> jax.Array:
    config = self.config
    channels = config.value_head_width
    if self.name == 'key_up':
      channels = config.head_width - config.rotary_width
    shape = config.latent_width, config.num_heads * channels
    kernel = self.param(
      'kernel', nn.initializers.normal(mup.hidden_std(config)), shape
    )
    if (adapter := adapters.of(self)) is not None:
      kernel = adapters.kernel(adapter, kernel, str(self.name))
    return kernel.reshape((shape[0], config.num_heads, channels))
