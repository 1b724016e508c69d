"""Causal attention on NVIDIA GPUs by cuDNN's fused kernels, through JAX.

`attend` is a port of `models.execution.Execution`. Causality is the kernel's
own; which documents of a packed row see each other is handed to it as a mask
[B, 1, T, T] that it adds to the scores, a very negative number where a key is
hidden: its weight is then exactly zero. The mask costs 2 B T^2 bytes while a
layer is computed, a part in H of what the scores would.

cuDNN multiplies in bfloat16 only and takes the softmax in float32. What its
backward kernel needs has no name that a remat policy could keep: under any but
`none`, the forward kernel runs twice.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

# What every GPU since Ampere takes.
MAX_HEAD_WIDTH = 128
HEAD_WIDTH_MULTIPLE = 8


def attend(
  q_BTHC: jax.Array,
  k_BKTC: jax.Array,
  v_BKTC: jax.Array,
  *,
  segment_ids_BT: jax.Array | None = None,
  dropout: Callable[[jax.Array], jax.Array] | None = None,
  implementation: Literal['cudnn', 'xla'] = 'cudnn',
) -> jax.Array:
  """Returns causal attention, [B, T, H, C], in the dtype of the queries.

  Args:
    q_BTHC: queries; head h uses key/value head h // (H / K).
    k_BKTC: keys.
    v_BKTC: values.
    segment_ids_BT: queries and keys of different segments, padding among them,
      do not see each other.
    dropout: must be None: weights never exist as an array.
    implementation: xla computes the same anywhere, unfused; for tests.

  Raises:
    ValueError: dropout, or shapes and dtypes that cuDNN has no kernel for.
  """
  if dropout is not None:
    raise ValueError(
      'cudnn attention: got dropout of attention weights, expected none: the'
      ' kernel never stores them; set model.dropout_rate = 0 or'
      ' execution.attention = reference'
    )
  _, time, _, channels = q_BTHC.shape
  if implementation == 'cudnn':
    problem = shape_problem(time, channels, q_BTHC.dtype.name)
    if problem:
      raise ValueError(f'cudnn attention: {problem}')
  mask_B1TT = None
  if segment_ids_BT is not None:
    mask_B1TT = (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :])[
      :, None
    ]
  return jax.nn.dot_product_attention(
    q_BTHC,
    k_BKTC.swapaxes(1, 2),
    v_BKTC.swapaxes(1, 2),
    mask=mask_B1TT,
    is_causal=True,
    implementation=implementation,
  )


def shape_problem(time: int, channels: int, dtype: str) -> str:
  """Returns why cuDNN has no kernel for these shapes and dtype, or ''."""
  if jnp.dtype(dtype) != jnp.bfloat16:
    return (
      f'got config.compute_dtype = {dtype}, expected bfloat16; change it or set'
      ' execution.attention = reference'
    )
  if channels % HEAD_WIDTH_MULTIPLE or channels > MAX_HEAD_WIDTH:
    return (
      f'got model.head_width = {channels}, expected a multiple of'
      f' {HEAD_WIDTH_MULTIPLE} up to {MAX_HEAD_WIDTH}; change it or set'
      ' execution.attention = reference'
    )
  if time % 2:
    return (
      f'got rows of {time} tokens, expected an even number; change'
      ' data.row_length or set execution.attention = reference'
    )
  return ''
