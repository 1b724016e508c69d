"""The MLP (feed-forward layer), and the linear layer of the whole model.

`ModelConfig.mlp` names the activation. A gated MLP has two input matrices: the
activated product of one multiplies the product of the other (Shazeer,
arXiv:2002.05202).

    gated      swiglu (SiLU)  geglu (GELU, tanh form)  geglu_exact (erf)  reglu
    not gated  gelu (tanh form)  gelu_exact (erf)  relu

With `none` a layer is attention alone (`models/block.py`).
"""

import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from models import execution as execution_lib, model_config, mup
from models.layers import adapters
from models.linear import plain
from models.linear.stored import (
  across,
  product as stored_product,
  tree as stored_tree,
)


class Linear(nn.Module):
  """y = x @ kernel (+ bias), with float32 parameters, computed in `dtype`."""

  width_out: int
  dtype: Any
  use_bias: bool
  init_std: float
  linear: execution_lib.Linear = plain.linear
  stored: stored_product.Computed = stored_product.in_blocks

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    kernel_IO = stored_tree.param(
      self, nn.initializers.normal(self.init_std), (x.shape[-1], self.width_out)
    )
    bias_O = None
    if self.use_bias:
      bias_O = self.param('bias', nn.initializers.zeros, (self.width_out,))

    if (adapter := adapters.of(self)) is not None:
      is_in_parts = isinstance(self.linear, stored_product.Parts)
      return adapters.linear(
        adapter,
        functools.partial(self._product, self.linear),
        x,
        kernel_IO,
        bias_O,
        self._over_parts if is_in_parts else None,
      )
    return self._product(self.linear, x, kernel_IO, bias_O)

  def _product(self, port, x, w_IO, bias_O) -> jax.Array:
    """Returns the product through a port, of floats or of a stored kernel."""
    if stored_tree.is_stored(w_IO):
      return stored_product.linear(
        x, w_IO, bias_O, self.dtype, port, self.stored
      )
    y: Any = port(x, w_IO, bias_O, self.dtype)
    return y

  def _over_parts(self, change, x, w_IO, pair) -> jax.Array:
    """Returns the product and the change of an adapter, part by part."""
    port: Any = self.linear

    def of_part(port, x, w_IO, pair):
      y = change(functools.partial(self._product, port), x, pair)
      return y if w_IO is None else self._product(port, x, w_IO, None) + y

    if isinstance(w_IO, across.Across):  # an adapter is cut as floats are
      y = self._product(port, x, w_IO, None)
      return y + port.over_parts(of_part, x, None, self.dtype, pair)
    return port.over_parts(of_part, x, w_IO, self.dtype, pair)


def residual_std(config: model_config.ModelConfig) -> float:
  """Returns the initial std of a layer that writes to the residual stream.

  It is divided by the square root of the number of such layers, 2N, or N of
  attention alone, so that the variance of the stream does not grow with depth
  (GPT-2, section 2.3).
  """
  per_layer = 1 if config.mlp == model_config.NO_MLP else 2
  return mup.hidden_std(config) / (per_layer * config.num_layers) ** 0.5


def is_gated(mlp: str) -> bool:
  """Returns whether the MLP of that name has a gate."""
  return mlp in ('swiglu', 'geglu', 'geglu_exact', 'reglu')


def _hidden(
  mlp: str, up_BTF: jax.Array, gate_BTF: jax.Array | None = None
) -> jax.Array:
  """Returns the hidden state of the MLP, the input of `down`, [..., F]."""
  if gate_BTF is None:
    return _activate(mlp, up_BTF)
  return _activate(mlp, gate_BTF) * up_BTF


def _activate(mlp: str, x: jax.Array) -> jax.Array:
  if mlp == 'swiglu':
    return nn.silu(x)
  if mlp in ('reglu', 'relu'):
    return nn.relu(x)
  return nn.gelu(x, approximate=not mlp.endswith('exact'))


class Mlp(nn.Module):
  """down(activation(up(x))), or down(activation(gate(x)) * up(x)) if gated."""

  config: model_config.ModelConfig
  dtype: Any
  execution: execution_lib.Execution

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    config = self.config

    def linear(width: int, std: float, name: str, product=None) -> Linear:
      return Linear(
        width,
        self.dtype,
        config.use_bias or config.mlp_bias,
        std,
        product or self.execution.linear,
        self.execution.stored,
        name=name,
      )

    into = config.mlp_width, mup.hidden_std(config)
    inputs = [linear(*into, 'up')(x_BTD)]
    if is_gated(config.mlp):
      inputs.append(linear(*into, 'gate')(x_BTD))
    hidden = functools.partial(_hidden, config.mlp)
    if self.execution.recomputes_activation:
      hidden = jax.checkpoint(hidden)
    hidden_BTF = hidden(*inputs)
    down = linear(
      x_BTD.shape[-1], residual_std(config), 'down', self.execution.joined
    )
    return down(hidden_BTF.astype(jnp.dtype(self.dtype)))


def dropout_of(module: nn.Module, rate: float) -> nn.Dropout:
  """Returns dropout, which does nothing in a call without a dropout key.

  Training passes the key; evaluation and inference do not.
  """
  return nn.Dropout(rate, deterministic=not module.has_rng('dropout'))
