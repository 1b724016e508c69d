"""The feed-forward block, and the linear layer that every block is made of.

`ModelConfig.mlp` names its activation. Two matrices lead into a gated block, of
which one is activated and multiplies the other (Shazeer, arXiv:2002.05202):

    gated     swiglu (SiLU)  geglu (GELU, tanh form)  geglu_exact (erf)  reglu
    not       gelu (tanh form)  gelu_exact (erf)  relu
"""

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from models import execution as execution_lib, model_config, mup
from models.linear import plain


class Linear(nn.Module):
  """y = x @ kernel (+ bias); float32 parameters, multiplied in `dtype`."""

  width_out: int
  dtype: Any
  use_bias: bool
  init_std: float
  linear: execution_lib.Linear = plain.linear

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    kernel_IO = self.param(
      'kernel',
      nn.initializers.normal(self.init_std),
      (x.shape[-1], self.width_out),
    )
    bias_O = None
    if self.use_bias:
      bias_O = self.param('bias', nn.initializers.zeros, (self.width_out,))
    return self.linear(x, kernel_IO, bias_O, self.dtype)


def residual_std(config: model_config.ModelConfig) -> float:
  """Initial scale of a layer that writes to the residual stream.

  Divided by the root of the number of such layers, so that the variance of
  the stream does not grow with depth (GPT-2, section 2.3).
  """
  return mup.hidden_std(config) / (2 * config.num_layers) ** 0.5


def is_gated(mlp: str) -> bool:
  """Returns whether a block of that name has a gate."""
  return mlp in ('swiglu', 'geglu', 'geglu_exact', 'reglu')


def _activate(mlp: str, x: jax.Array) -> jax.Array:
  if mlp == 'swiglu':
    return nn.silu(x)
  if mlp in ('reglu', 'relu'):
    return nn.relu(x)
  return nn.gelu(x, approximate=not mlp.endswith('exact'))


class Mlp(nn.Module):
  """What is activated, times what is not if it is gated, and back."""

  config: model_config.ModelConfig
  dtype: Any
  execution: execution_lib.Execution

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    config = self.config

    def linear(width: int, std: float, name: str) -> Linear:
      return Linear(
        width,
        self.dtype,
        config.use_bias or config.mlp_bias,
        std,
        self.execution.linear,
        name=name,
      )

    into = config.mlp_width, mup.hidden_std(config)
    up_BTF = linear(*into, 'up')(x_BTD)
    if is_gated(config.mlp):
      gate_BTF = linear(*into, 'gate')(x_BTD)
      hidden_BTF = _activate(config.mlp, gate_BTF) * up_BTF
    else:
      hidden_BTF = _activate(config.mlp, up_BTF)
    return linear(x_BTD.shape[-1], residual_std(config), 'down')(
      hidden_BTF.astype(jnp.dtype(self.dtype))
    )


def dropout_of(module: nn.Module, rate: float) -> nn.Dropout:
  """Dropout in calls that were given a key for it; evaluation gives none."""
  return nn.Dropout(rate, deterministic=not module.has_rng('dropout'))
