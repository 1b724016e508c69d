"""RMSNorm (arXiv:1910.07467) and LayerNorm (arXiv:1607.06450), in float32."""

from flax import linen as nn
import jax
import jax.numpy as jnp

from models import execution as execution_lib, model_config


class Norm(nn.Module):
  """Normalises the last axis; statistics and scale are computed in float32."""

  config: model_config.ModelConfig
  gain: float = 1.0  # multiplies the result before it is rounded
  by_row: execution_lib.ByRow = execution_lib.at_once
  # Of an RMSNorm whose axis is longer than that of its input: devices each have
  # a part. None: all of the axis is here.
  mean_square: execution_lib.HeadsMeanSquare | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    config, width = self.config, x.shape[-1]
    # In bfloat16, a scale near 1 has few digits left for its distance from 1.
    from_one = config.norm_from_one
    initial = nn.initializers.zeros if from_one else nn.initializers.ones
    scale_D = self.param('scale', initial, (width,))
    if from_one:
      scale_D = 1 + scale_D.astype(jnp.float32)
    y = x.astype(jnp.float32)
    if self.mean_square is None:
      y = self.by_row(self._normalised, y)
    else:
      y = y * jax.lax.rsqrt(
        self.mean_square(y, str(self.name)) + config.norm_epsilon
      )
    y = y * _along_last(scale_D, x.ndim)
    has_bias = config.use_bias or config.norm_bias
    if config.norm == 'layernorm' and has_bias:
      bias_D = self.param('bias', nn.initializers.zeros, (width,))
      y = y + _along_last(bias_D, x.ndim)
    if self.gain != 1:
      y = y * self.gain
    return y.astype(x.dtype)

  def _normalised(self, y: jax.Array) -> jax.Array:
    if self.config.norm == 'layernorm':
      y = y - jnp.mean(y, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(y), axis=-1, keepdims=True)
    return y * jax.lax.rsqrt(variance + self.config.norm_epsilon)


def _along_last(vector: jax.Array, ndim: int) -> jax.Array:
  return vector.reshape((1,) * (ndim - 1) + (-1,))
