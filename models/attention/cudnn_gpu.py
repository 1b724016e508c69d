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

from models.attention import form as form_lib

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
  form: form_lib.Form = form_lib.Form(),
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
    form: window, which goes into the mask, and scale; no soft-cap.
    implementation: xla computes the same anywhere, unfused; for tests.

  Raises:
    ValueError: dropout, a soft-cap, or shapes and dtypes that cuDNN has no
      kernel for.
  """
  if dropout is not None:
    raise ValueError(
      'cudnn attention: got dropout of attention weights, expected none: the'
      ' kernel never stores them; set model.dropout_rate = 0 or'
      ' execution.attention = reference'
    )
  if problem := form_problem(form.softcap):
    raise ValueError(f'cudnn attention: {problem}')
  _, time, _, channels = q_BTHC.shape
  if v_BKTC.shape[3] != channels:
    raise ValueError(
      f'cudnn attention: got values of {v_BKTC.shape[3]} channels for keys of'
      f' {channels}, expected equal widths; set execution.attention ='
      ' reference'
    )
  if implementation == 'cudnn':
    problem = shape_problem(time, channels, q_BTHC.dtype.name)
    if problem:
      raise ValueError(f'cudnn attention: {problem}')
  mask_BTT = None
  if segment_ids_BT is not None:
    mask_BTT = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
  if form.window:
    place_T = jnp.arange(time)
    near_1TT = (place_T[None, :] > place_T[:, None] - form.window)[None]
    mask_BTT = near_1TT if mask_BTT is None else mask_BTT & near_1TT
  return jax.nn.dot_product_attention(
    q_BTHC,
    k_BKTC.swapaxes(1, 2),
    v_BKTC.swapaxes(1, 2),
    mask=None if mask_BTT is None else mask_BTT[:, None],
    scale=form.scale_of(channels),
    is_causal=True,
    implementation=implementation,
  )


def form_problem(softcap: float) -> str:
  """Returns why cuDNN has no kernel for scores that are bounded so, or ''."""
  if softcap:
    return (
      f'got model.attention_softcap = {softcap}, expected 0: the kernel has no'
      ' soft-cap of scores; set execution.attention = reference'
    )
  return ''


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
