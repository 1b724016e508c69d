"""One layer: attention and a feed-forward block, each added to the stream.

Residual blocks as in GPT-2 and Llama (arXiv:2302.13971), normalised before each
of the two; after it, as in OLMo 2 (arXiv:2501.00656, section 2.1); or on both
sides, as in Gemma 2. Two fields of `ModelConfig` keep long and large training
stable: `qk_norm` bounds the scores of attention (ViT-22B, arXiv:2302.05442,
section 2; here the RMSNorm per head of Qwen3, arXiv:2505.09388) and the
soft-caps bound scores and logits (Gemma 2, arXiv:2408.00118, section 2).
"""

import dataclasses
import functools
from typing import Any, NamedTuple

from flax import linen as nn
import jax

from models import (
  attention,
  axes,
  config as config_lib,
  execution as execution_lib,
  kv_cache,
  latent_attention,
  mlp,
  moe,
  mup,
  norms,
  remat,
  rope,
)


class Angles(NamedTuple):
  """Of the rotations, from `rope.angles`; None without rotary positions."""

  global_BTc: jax.Array | None
  local_BTc: jax.Array | None = None  # None: as the global ones

  def of(self, layer: config_lib.Layer) -> jax.Array | None:
    """Returns those of a layer, None if it rotates nothing."""
    if not layer.has_rope:
      return None
    if layer.is_local and self.local_BTc is not None:
      return self.local_BTc
    return self.global_BTc


class Attention(nn.Module):
  """Projects to queries, keys and values, attends, and projects back."""

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
    cache: kv_cache.Layer | None,
  ) -> tuple[jax.Array, kv_cache.Layer | None]:
    config = self.config
    q_BTHC, k_BTKC, v_BTKC = self._project(x_BTD)
    if (multiplier := mup.query_multiplier(config)) != 1:
      q_BTHC = q_BTHC * multiplier  # here, for every way of attending
    if angles_BTc is not None:
      amplitude = config.rope_scaling.amplitude
      if self.layer.is_local and config.rope_local_base:
        amplitude = 1.0
      q_BTHC = rope.rotate(q_BTHC, angles_BTc, amplitude)
      k_BTKC = rope.rotate(k_BTKC, angles_BTc, amplitude)
    form = attention.Form(
      window=config.window if self.layer.is_local else 0,
      softcap=config.attention_softcap,
      scale=config.query_scale or None,
    )
    if cache is None:
      dropout = None
      if config.dropout_rate and self.has_rng('dropout'):
        dropout = mlp.dropout_of(self, config.dropout_rate)
      out_BTHC = self.execution.attend(
        q_BTHC,
        k_BTKC.swapaxes(1, 2),
        v_BTKC.swapaxes(1, 2),
        segment_ids_BT=segment_ids_BT,
        dropout=dropout,
        form=form,
      )
    else:
      cache = kv_cache.write(cache, k_BTKC, v_BTKC, positions_BT)
      out_BTHC = self.execution.attend_cached(q_BTHC, cache, positions_BT, form)
    out_BTD = mlp.Linear(
      config.model_width,
      self.dtype,
      config.use_bias or config.out_bias,
      mlp.residual_std(config),
      self.execution.linear,
      name='out',
    )(out_BTHC.reshape((*out_BTHC.shape[:2], -1)))
    return out_BTD, cache

  def _project(self, x_BTD):
    """Returns queries, keys and values, the first two normalised."""
    config = self.config
    norm = functools.partial(
      norms.Norm,
      dataclasses.replace(config, norm='rmsnorm'),  # whatever the others
      by_row=self.execution.by_row,
    )

    def project(name: str, heads: int, norm_name: str = '') -> jax.Array:
      y = mlp.Linear(
        heads * config.head_width,
        self.dtype,
        config.use_bias or config.qkv_bias,
        mup.hidden_std(config),
        self.execution.linear,
        name=name,
      )(x_BTD)
      has_norm = config.qk_norm and norm_name
      if has_norm and config.qk_norm_whole:
        y = norm(name=norm_name)(y)
      y = y.reshape((*y.shape[:2], heads, config.head_width))
      if has_norm and not config.qk_norm_whole:
        y = norm(name=norm_name)(y)
      return y

    return (
      project('query', config.num_heads, 'query_norm'),
      project('key', config.num_kv_heads, 'key_norm'),
      project('value', config.num_kv_heads),
    )


class Block(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x)), or as the config has it.

  Takes and returns in the order that `nn.scan` wants: the carry first, then
  what each layer has of its own, then what all layers share. The second result
  is (cache, routing), both of which may be None.
  """

  config: config_lib.ModelConfig
  dtype: Any
  execution: execution_lib.Execution
  layer: config_lib.Layer

  @nn.compact
  def __call__(self, x_BTD, cache, angles, positions_BT, segment_ids_BT):
    config = self.config
    x_BTD = remat.named_input(nn.with_logical_constraint(x_BTD, axes.STREAM))
    kind = Attention
    if config.latent_width:
      kind = latent_attention.LatentAttention
    attend = kind(
      config, self.dtype, self.execution, self.layer, name='attention'
    )
    y_BTD, cache = attend(
      self._before('attention_norm', x_BTD),
      angles.of(self.layer),
      positions_BT,
      segment_ids_BT,
      cache,
    )
    y_BTD = self._after('attention_norm', y_BTD)
    attended_BTD = x_BTD + mlp.dropout_of(self, config.dropout_rate)(y_BTD)
    seen_BTD = x_BTD if config.parallel_residual else attended_BTD
    y_BTD, routing = self._feed_forward(
      self._before('mlp_norm', seen_BTD), segment_ids_BT
    )
    y_BTD = self._after('mlp_norm', y_BTD)
    y_BTD = mlp.dropout_of(self, config.dropout_rate)(y_BTD)
    return attended_BTD + y_BTD, (cache, routing)

  def _before(self, name, x_BTD):
    """Normalises what goes into one of the two."""
    if self.config.norm_place == 'after':
      return x_BTD
    return self._norm(name)(x_BTD)

  def _after(self, name, y_BTD):
    """Normalises what comes out of it, before it is added to the stream."""
    if self.config.norm_place == 'before':
      return y_BTD
    return self._norm(f'{name}_after')(y_BTD)

  def _norm(self, name):
    return norms.Norm(self.config, by_row=self.execution.by_row, name=name)

  def _feed_forward(self, x_BTD, segment_ids_BT):
    """Returns what a dense block makes of it, or experts, and the routing."""
    parts = self.config, self.dtype, self.execution
    if not self.layer.has_experts:
      return mlp.Mlp(*parts, name='mlp')(x_BTD), None
    is_real_BT = None if segment_ids_BT is None else segment_ids_BT > 0
    return moe.Moe(*parts, name='moe')(x_BTD, is_real_BT)
