"""Kernels that are stored in 8 or 4 bits and never change: bases of QLoRA.

A kernel W [in, out] is cut into tiles of rows. Each tile of each column has a
scale of its own, its largest magnitude. A product dequantises the kernel to the
compute dtype, so that only the stored form lies in memory; the backward pass
dequantises it again. There is a gradient of the input, and none of the kernel.

    int8  values int8 [in, out]
    int4  values uint8 [in / 2, out]: row 2i in the low bits, row 2i + 1 above

The package qwix quantises. `jnp.int4` is not used for storage: arrays of it
take a byte per number on some devices (qwix issue 328).

Reference: QLoRA, arXiv:2305.14314, with evenly spaced values in place of NF4.
"""

import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from models import axes
from models.linear import plain, quantized

FORMATS = ('int8', 'int4')
_WHOLE = ('router', 'key_up', 'value_up')
_TILE = 64  # rows of a scale, as in QLoRA; fewer where they do not divide


@jax.tree_util.register_pytree_with_keys_class
class Kernel:
  """A quantised kernel; its arrays may have leading axes, as of layers."""

  def __init__(self, values: Any, scales: Any):
    """Takes values, see above, and float32 scales [in / tile, out]."""
    self.values = values
    self.scales = scales

  def tree_flatten_with_keys(self):
    """Returns the arrays by name, for JAX."""
    key = jax.tree_util.DictKey
    return ((key('values'), self.values), (key('scales'), self.scales)), None

  @classmethod
  def tree_unflatten(cls, _, children):
    """Returns the kernel of the arrays, for JAX."""
    return cls(*children)

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of the kernel that is stored."""
    *leading, rows, columns = self.values.shape
    return (*leading, rows * self._rows_per_value, columns)

  @property
  def _rows_per_value(self) -> int:
    return 2 if self.values.dtype == jnp.uint8 else 1

  def whole(self, dtype: Any) -> jax.Array:
    """Returns the kernel, [..., in, out], dequantised in float32."""
    values, (*leading, rows, columns) = self.values, self.shape
    if self._rows_per_value == 2:
      # Shifted up and down again: the sign of four bits.
      signed = jax.lax.bitcast_convert_type(values, jnp.int8)
      low, high = jnp.left_shift(signed, 4) >> 4, signed >> 4
      values = jnp.stack([low, high], axis=-2)
    tiles = self.scales.shape[-2]
    values = values.reshape((*leading, tiles, rows // tiles, columns))
    whole = values.astype(jnp.float32) * self.scales[..., :, None, :]
    return whole.reshape(self.shape).astype(dtype)


def quantise(w_IO: Any, form: str) -> Kernel:
  """Returns a kernel [..., in, out] stored in int8 or int4."""
  qwix = quantized.qwix_module()
  rows = w_IO.shape[-2]
  tile = next(
    size for size in range(min(_TILE, rows), 0, -1) if not rows % size
  )

  def one(w_IO):
    return qwix.quantize(
      w_IO.astype(jnp.float32),
      form,
      channelwise_axes=(1,),
      tiled_axes={0: tile},
    )

  for _ in range(w_IO.ndim - 2):
    one = jax.vmap(one)
  found = one(jnp.asarray(w_IO))
  values = found.qvalue.astype(jnp.int8)
  if form == 'int4':
    low, high = (values[..., part::2, :].astype(jnp.uint8) for part in (0, 1))
    values = (low & 0xF) | (high << 4)
  return Kernel(values, found.scale.astype(jnp.float32))


def quantise_kernels(params: Any, form: str) -> Any:
  """Returns the collection `params` with the kernels of `Linear` quantised.

  Routers, and kernels that are used otherwise than in a product, stay as they
  are, like tables, norms and biases.
  """

  def quantised(path, leaf):
    *_, owner, kind = axes.names(path)
    is_linear = kind == 'kernel' and owner not in _WHOLE
    return quantise(leaf, form) if is_linear else leaf

  return jax.tree_util.tree_map_with_path(quantised, params)


def whole_kernels(params: Any) -> Any:
  """Returns the collection with its kernels dequantised, float32."""
  return jax.tree.map(
    lambda x: x.whole(jnp.float32) if isinstance(x, Kernel) else x,
    params,
    is_leaf=lambda x: isinstance(x, Kernel),
  )


def param(
  module: nn.Module, init: Any, shape: tuple[int, int]
) -> jax.Array | Kernel:
  """Returns the kernel of a module, as a parameter or as it is stored."""
  if module.has_variable('params', 'kernel'):
    kernel = module.get_variable('params', 'kernel')
    if isinstance(kernel, Kernel):
      return kernel
  return module.param('kernel', init, shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def linear(
  x: jax.Array, w_IO: Kernel, bias_O: jax.Array | None, dtype: Any
) -> jax.Array:
  """Returns x[..., I] @ w[I, O] + bias[O], computed and returned in `dtype`."""
  return plain.linear(x, w_IO.whole(dtype), bias_O, dtype)


def _forward(x, w_IO, bias_O, dtype):
  return linear(x, w_IO, bias_O, dtype), (w_IO, jnp.zeros((0,), x.dtype))


def _backward(dtype, residuals, dy):
  w_IO, x_like = residuals
  w_OI = w_IO.whole(dtype).T
  dx: Any = plain.linear(dy, w_OI, None, dtype)
  return dx.astype(x_like.dtype), None, None


linear.defvjp(_forward, _backward)
