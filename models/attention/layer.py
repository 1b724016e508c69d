"""The attention of a block: projections, rotation, attention, projection.

Fields of `ModelConfig` keep long and large training runs stable: `qk_norm`
bounds the scores of attention (ViT-22B, arXiv:2302.05442, section 2; here the
RMSNorm per head of Qwen3, arXiv:2505.09388), and the soft-caps bound scores and
logits (Gemma 2, arXiv:2408.00118, section 2).
"""

import dataclasses
import functools
from typing import Any

from flax import linen as nn
import jax

from models import execution as execution_lib, kv_cache, model_config, mup
from models.attention import form as form_lib, rope
from models.layers import mlp, norms


class Attention(nn.Module):
  """Projects to queries, keys and values, attends, and projects back."""

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
    q_BTHC, k_BTKC, v_BTKC = self._project(x_BTD)
    if (multiplier := mup.query_multiplier(config)) != 1:
      q_BTHC = q_BTHC * multiplier  # once, for every port of attention
    if angles_BTc is not None:
      amplitude = config.rope_scaling.amplitude
      if self.layer.is_local and config.rope_local_base:
        amplitude = 1.0  # the local base is not scaled
      q_BTHC = rope.rotate(q_BTHC, angles_BTc, amplitude)
      k_BTKC = rope.rotate(k_BTKC, angles_BTc, amplitude)
    form = form_lib.of_layer(config, is_local=self.layer.is_local)
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
      # Written first: a token sees itself.
      cache = kv_cache.write(cache, k_BTKC, v_BTKC, positions_BT)
      out_BTHC = self.execution.attend_cached(q_BTHC, cache, positions_BT, form)
    out_BTD = mlp.Linear(
      config.model_width,
      self.dtype,
      config.use_bias or config.out_bias,
      mlp.residual_std(config),
      self.execution.joined or self.execution.linear,
      self.execution.stored,
      name='out',
    )(out_BTHC.reshape((*out_BTHC.shape[:2], -1)))
    return out_BTD, cache

  def _project(self, x_BTD):
    """Returns queries, keys and values; qk_norm normalises the first two."""
    config = self.config
    norm = functools.partial(
      norms.Norm,
      dataclasses.replace(config, norm='rmsnorm'),  # also in LayerNorm models
      by_row=self.execution.by_row,
    )

    def project(name: str, heads: int, norm_name: str = '') -> jax.Array:
      y = mlp.Linear(
        heads * config.head_width,
        self.dtype,
        config.use_bias or config.qkv_bias,
        mup.hidden_std(config),
        self.execution.linear,
        self.execution.stored,
        name=name,
      )(x_BTD)
      has_norm = config.qk_norm and norm_name
      if has_norm and config.qk_norm_whole:
        mean_square = self.execution.heads_mean_square
        y = norm(name=norm_name, mean_square=mean_square)(y)
      y = y.reshape((*y.shape[:2], heads, config.head_width))
      if has_norm and not config.qk_norm_whole:
        y = norm(name=norm_name)(y)
      return y

    return (
      project('query', config.num_heads, 'query_norm'),
      project('key', config.num_kv_heads, 'key_norm'),
      project('value', config.num_kv_heads),
    )
