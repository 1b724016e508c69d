"""Causal attention on NVIDIA GPUs by cuDNN's fused kernels, through JAX.

`attend` is a port of `models.execution.Execution`. The kernel itself is causal.
The documents of a packed row are kept apart by a mask [B, 1, T, T] that the
kernel adds to the scores: a very negative number where a key is hidden, whose
weight is then exactly zero. The mask takes 2 B T^2 bytes while a layer is
computed, 1/H of the memory of the scores.

cuDNN multiplies in bfloat16 only and computes the softmax in float32. The
residuals of its backward kernel have no name that a remat policy could keep:
under any policy but `none`, the forward kernel runs twice.
"""

from collections.abc import Callable
import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from models.attention import finite, form as form_lib, supports


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
    segment_ids_BT: queries and keys of different segments, padding among them,
      do not see each other.
    dropout: must be None: the weights never exist as an array.
    form: window, as part of the mask, and scale; no soft-cap.
    implementation: xla computes the same on any device, unfused; for tests.

  Raises:
    ValueError: a call that `supports.CUDNN` refuses.
  """
  _, time, _, channels = q_BTHC.shape
  request = supports.Request(form=form, has_dropout=dropout is not None)
  if implementation == 'cudnn':  # XLA takes any shape and dtype
    request = dataclasses.replace(
      request,
      head_width=channels,
      value_width=v_BKTC.shape[3],
      dtype=q_BTHC.dtype.name,
      row_length=time,
    )
  supports.check(supports.CUDNN, request)
  mask_BTT = None
  if segment_ids_BT is not None:
    mask_BTT = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
  if form.window:
    place_T = jnp.arange(time)
    # Only the lower bound: the kernel is causal.
    near_1TT = (place_T[None, :] > place_T[:, None] - form.window)[None]
    mask_BTT = near_1TT if mask_BTT is None else mask_BTT & near_1TT

  def attend_finite(q_BTHC, k_BKTC, v_BKTC):
    return jax.nn.dot_product_attention(
      q_BTHC,
      k_BKTC.swapaxes(1, 2),
      v_BKTC.swapaxes(1, 2),
      mask=None if mask_BTT is None else mask_BTT[:, None],
      scale=form.scale_of(channels),
      is_causal=True,
      implementation=implementation,
    )

  return finite.around(
    attend_finite, q_BTHC, k_BKTC, v_BKTC, segment_ids_BT, form
  )
