"""Multi-head latent attention: keys and values from one small vector per token.

DeepSeek-V2, arXiv:2405.04434, section 2.1. Of every token a vector of L numbers
is kept, from which each head makes its keys and values, and besides them the
few channels of a key that are rotated, which all heads share:

    latent = norm(x W_latent)            [L]   kept in the cache as the value
    rope   = rotate(x W_key_rope)        [r]   kept in the cache as the key
    key    = [rope, latent W_key_up]           of each head
    value  = latent W_value_up                 of each head

A pass without a cache computes keys and values and attends as any other. One
with a cache never does: a score is q W_key_up^T latent, so queries are taken
into the space of latents, attend there, and what they find is taken out of it
by W_value_up (the paper's appendix C, "absorbed"). The cache is read once, with
(L + r) numbers per token and layer instead of 2 H C.

Rotated channels are the first r of a head, where the paper has the last: an
order of channels that scores do not depend on.
"""

import dataclasses
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from models import (
  attention,
  config as config_lib,
  execution as execution_lib,
  kv_cache,
  mlp,
  mup,
  norms,
  rope,
)

# Of the norms of latents, whatever the epsilon of the others is: so in every
# implementation of DeepSeek's models.
LATENT_EPSILON = 1e-6


class LatentAttention(nn.Module):
  """Takes and returns what `models.block.Attention` does."""

  config: config_lib.ModelConfig
  dtype: Any
  execution: execution_lib.Execution
  layer: config_lib.Layer

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
    q_BTHC = self._queries(x_BTD)
    latent_BTL = self._linear('latent', config.latent_width, config.qkv_bias)(
      x_BTD
    )
    latent_BTL = self._norm('latent_norm')(latent_BTL)
    rope_BT1r = self._linear('key_rope', config.rotary_width, config.qkv_bias)(
      x_BTD
    )[:, :, None, :]
    if angles_BTc is not None:
      amplitude = config.rope_scaling.amplitude
      q_BTHC = rope.rotate(q_BTHC, angles_BTc, amplitude)
      rope_BT1r = rope.rotate(rope_BT1r, angles_BTc, amplitude)
    up = Up(config, name='key_up')(), Up(config, name='value_up')()
    form = attention.Form(scale=config.query_scale or None)
    if cache is None:
      out_BTHC = self._attend_whole(
        q_BTHC, latent_BTL, rope_BT1r, up, segment_ids_BT, form
      )
    else:
      cache = kv_cache.write(
        cache, rope_BT1r, latent_BTL[:, :, None, :], positions_BT
      )
      key_LHC, value_LHC = (w.astype(self.dtype) for w in up)
      out_BTHC = attend_latent(
        q_BTHC, cache, positions_BT, key_LHC, value_LHC, form
      )
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
    self, q_BTHC, latent_BTL, rope_BT1r, up, segment_ids_BT, form
  ):
    """Attends with the keys and values of every head, as training does."""
    config = self.config
    key_LHC, value_LHC = (w.astype(self.dtype) for w in up)
    k_BHTC = jnp.einsum('BTL,LHC->BHTC', latent_BTL, key_LHC)
    rope_BHTr = jnp.broadcast_to(
      rope_BT1r.swapaxes(1, 2), (*k_BHTC.shape[:3], rope_BT1r.shape[3])
    )
    has_dropout = config.dropout_rate and self.has_rng('dropout')
    return self.execution.attend(
      q_BTHC,
      jnp.concatenate([rope_BHTr, k_BHTC], axis=3),
      jnp.einsum('BTL,LHC->BHTC', latent_BTL, value_LHC),
      segment_ids_BT=segment_ids_BT,
      dropout=nn.Dropout(config.dropout_rate, deterministic=False)
      if has_dropout
      else None,
      form=form,
    )

  def _linear(self, name, width, use_bias=False, std=None):
    config = self.config
    std = mup.hidden_std(config) if std is None else std
    return mlp.Linear(
      width, self.dtype, use_bias, std, self.execution.linear, name=name
    )

  def _norm(self, name):
    config = dataclasses.replace(
      self.config, norm='rmsnorm', norm_epsilon=LATENT_EPSILON
    )
    return norms.Norm(config, name=name)


class Up(nn.Module):
  """What makes the keys or values of all heads from a latent, [L, H, C]."""

  config: config_lib.ModelConfig

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
    return kernel.reshape((shape[0], config.num_heads, channels))


def attend_latent(
  q_BTHC: jax.Array,
  cache: kv_cache.LayerCache,
  positions_BT: jax.Array,
  key_LHC: jax.Array,
  value_LHC: jax.Array,
  form: attention.Form,
) -> jax.Array:
  """Returns the attention of queries over cached latents, [B, T, H, C].

  Args:
    q_BTHC: queries, rotated channels first.
    cache: of one layer: rotated channels [B, 1, S, r], latents [B, 1, S, L].
    positions_BT: of the queries.
    key_LHC: makes a head's other channels of a key.
    value_LHC: makes a head's value.
    form: of which only the scale may be set.
  """
  rope_BSr, latent_BSL = cache.k_BKSC[:, 0], cache.v_BKSC[:, 0]
  q_BTHC = q_BTHC * form.scale_of(q_BTHC.shape[3])
  width = rope_BSr.shape[2]
  q_BTHL = jnp.einsum('BTHC,LHC->BTHL', q_BTHC[..., width:], key_LHC)

  def over_channels(x_BTHI, y_BSI):
    # Heads and tokens are rows of one matrix product per sequence.
    return jnp.einsum(
      'BTHI,BSI->BTHS', x_BTHI, y_BSI, preferred_element_type=jnp.float32
    )

  scores_BTHS = over_channels(q_BTHC[..., :width], rope_BSr)
  scores_BTHS = scores_BTHS + over_channels(q_BTHL, latent_BSL)
  mask_BTS = attention.slots_seen(positions_BT, rope_BSr.shape[1])
  scores_BTHS = jnp.where(mask_BTS[:, :, None], scores_BTHS, attention.MASKED)
  probs_BTHS = jax.nn.softmax(scores_BTHS, axis=-1)
  out_BTHL = jnp.einsum(
    'BTHS,BSL->BTHL',
    probs_BTHS.astype(latent_BSL.dtype),
    latent_BSL,
    preferred_element_type=jnp.float32,
  )
  return jnp.einsum('BTHL,LHC->BTHC', out_BTHL.astype(q_BTHC.dtype), value_LHC)
