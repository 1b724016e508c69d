"""The transformer block: attention and an MLP, each added to the stream.

`ModelConfig.norm_place` has the place of the norms: before attention and before
the MLP, as in GPT-2 and Llama (arXiv:2302.13971); after each of them, as in
OLMo 2 (arXiv:2501.00656, section 2.1); or on both sides, as in Gemma 2. With
`mlp = none` a layer is attention alone, the model of arXiv:2209.11895.
"""

from typing import Any, NamedTuple

from flax import linen as nn
import jax

from models import axes, execution as execution_lib, model_config, remat
from models.attention import latent_layer, layer as attention_layer
from models.layers import mlp, norms
from models.moe import layer as moe_layer


class Angles(NamedTuple):
  """The rotation angles of `rope.angles`; None without rotary positions."""

  global_BTc: jax.Array | None
  local_BTc: jax.Array | None = None  # None: local layers use global_BTc

  def of(self, layer: model_config.Layer) -> jax.Array | None:
    """Returns the angles of a layer, or None if it rotates nothing."""
    if not layer.has_rope:
      return None
    if layer.is_local and self.local_BTc is not None:
      return self.local_BTc
    return self.global_BTc


class Block(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x)), or as the config has it.

  Arguments are in the order of `nn.scan`: the carry x_BTD, then the value of
  this layer, its cache, then the values that all layers share. The results are
  x_BTD and (cache, routing), both of which may be None.
  """

  config: model_config.ModelConfig
  dtype: Any
  execution: execution_lib.Execution
  layer: model_config.Layer

  @nn.compact
  def __call__(self, x_BTD, cache, angles, positions_BT, segment_ids_BT):
    config = self.config
    # The name lets the policy `offload` find the input of the block.
    x_BTD = remat.named_input(nn.with_logical_constraint(x_BTD, axes.STREAM))
    kind = attention_layer.Attention
    if config.latent_width:
      kind = latent_layer.LatentAttention
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
    if config.mlp == model_config.NO_MLP:
      return attended_BTD, (cache, None)
    seen_BTD = x_BTD if config.parallel_residual else attended_BTD
    y_BTD, routing = self._feed_forward(
      self._before('mlp_norm', seen_BTD), segment_ids_BT
    )
    y_BTD = self._after('mlp_norm', y_BTD)
    y_BTD = mlp.dropout_of(self, config.dropout_rate)(y_BTD)
    return attended_BTD + y_BTD, (cache, routing)

  def _before(self, name, x_BTD):
    """Returns the input of attention or MLP, normalised if the config says."""
    if self.config.norm_place == 'after':
      return x_BTD
    return self._norm(name)(x_BTD)

  def _after(self, name, y_BTD):
    """Returns the output of attention or MLP, normalised if the config says."""
    if self.config.norm_place == 'before':
      return y_BTD
    return self._norm(f'{name}_after')(y_BTD)

  def _norm(self, name):
    return norms.Norm(self.config, by_row=self.execution.by_row, name=name)

  def _feed_forward(self, x_BTD, segment_ids_BT):
    """Returns the output of the MLP or of the experts, and their routing."""
    parts = self.config, self.dtype, self.execution
    if not self.layer.has_experts:
      return mlp.Mlp(*parts, name='mlp')(x_BTD), None
    # Segment 0 is padding: it must not count in the statistics of routing.
    is_real_BT = None if segment_ids_BT is None else segment_ids_BT > 0
    return moe_layer.Moe(*parts, name='moe')(x_BTD, is_real_BT)
