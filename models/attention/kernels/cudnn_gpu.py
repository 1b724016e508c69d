"""Causal attention on NVIDIA GPUs by cuDNN's fused kernels.

`attend` is a port of `models.execution.Execution`. The kernel is causal. The
largest number of documents in a row decides how the kernel keeps them apart:

    max_documents
    1    not at all: a document that is alone in its row needs no mask
    M    by the lengths of at most M documents of a row, and their places
    0    (unknown) by a mask [B, 1, T, T] of 2 B T^2 bytes, which the kernel
         adds to the scores; also for a window in packed rows

With M, the statistics of a row take 4 M H T bytes, and the kernel starts M
times as many programs, most of which end at once.

Without a bound on documents, rows are scored document by document, and a key or
value that is not finite changes no query that does not see it (`finite`). With
a bound, the rows belong to a training batch, whose loss is one sum: it is not
finite in either case, so the extra passes over queries, keys and values are
left out.

cuDNN multiplies in bfloat16 only and computes the softmax in float32. It could
drop weights, but XLA counts its random numbers from the start of the process:
a resumed run would drop other weights, so dropout is refused.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp

from models.attention import finite, form as form_lib, supports
from models.attention.kernels import cudnn_call

# With more documents, their statistics are larger than a mask of most rows.
MOST_DOCUMENTS = 64


def attend(
  q_BTHC: jax.Array,
  k_BKTC: jax.Array,
  v_BKTC: jax.Array,
  *,
  segment_ids_BT: jax.Array | None = None,
  dropout: Callable[[jax.Array], jax.Array] | None = None,
  form: form_lib.Form = form_lib.Form(),
  max_documents: int = 0,
  implementation: Literal['cudnn', 'xla'] = 'cudnn',
) -> jax.Array:
  """Returns causal attention, [B, T, H, C], in the dtype of the queries.

  Args:
    q_BTHC: queries; head h uses key/value head h // (H / K).
    segment_ids_BT: queries and keys of different segments, padding among them,
      do not see each other. Unless `max_documents` is 0, the tokens of a
      segment are neighbours.
    dropout: must be None: the weights never exist as an array.
    form: window and scale; no soft-cap.
    max_documents: most segments of a row, its padding included; 0: unknown. 1:
      a row is one document and padding after it, which may see the document.
      A model marks the tokens of more documents (`models.packed_rows`).
    implementation: xla computes the same on any device, unfused; for tests.

  Raises:
    ValueError: a call that `supports.CUDNN` refuses.
  """
  _, time, heads, channels = q_BTHC.shape
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
  operands, how = cudnn_call.Operands(), way(max_documents, form.window)
  if segment_ids_BT is None:
    how = 'causal'
  elif how == 'packed':
    operands = cudnn_call.documents(
      segment_ids_BT, heads, k_BKTC.shape[1], channels, max_documents
    )
  elif how == 'mask':
    operands = cudnn_call.Operands(_bias(segment_ids_BT, form, q_BTHC.dtype))
  call_form = cudnn_call.Form(
    scale=form.scale_of(channels),
    window=form.window if how == 'causal' else 0,
    max_documents=max_documents if how == 'packed' else 1,
  )
  kernel = {'cudnn': cudnn_call.attend, 'xla': cudnn_call.interpreted}

  def attend_rows(q_BTHC, k_BKTC, v_BKTC):
    return kernel[implementation](
      q_BTHC, k_BKTC.swapaxes(1, 2), v_BKTC.swapaxes(1, 2), operands, call_form
    )

  if max_documents:
    return attend_rows(q_BTHC, k_BKTC, v_BKTC)
  return finite.around(
    attend_rows, q_BTHC, k_BKTC, v_BKTC, segment_ids_BT, form
  )


def way(max_documents: int, window: int) -> str:
  """Returns how documents are kept apart: causal, packed or mask.

  Args:
    max_documents, window: as for `attend`.
  """
  if max_documents == 1:
    return 'causal'
  # cuDNN has no windows within documents.
  is_packed = 1 < max_documents <= MOST_DOCUMENTS and not window
  return 'packed' if is_packed else 'mask'


def refusal(
  shape: tuple[int, int, int], num_kv_heads: int, max_documents: int
) -> str:
  """Returns why cuDNN of this machine refuses packed rows, or ''.

  Compiles a call and its gradient: only the library itself knows all limits of
  its version.

  Args:
    shape: T, H and C.
  """
  time, heads, channels = shape
  of = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
  q_BTHC = of((2, time, heads, channels))
  kv_BKTC = of((2, num_kv_heads, time, channels))
  segment_ids_BT = jax.ShapeDtypeStruct((2, time), jnp.int32)

  def both(g, q, k, v, segment_ids_BT):
    out, pull = jax.vjp(
      functools.partial(
        attend, segment_ids_BT=segment_ids_BT, max_documents=max_documents
      ),
      q,
      k,
      v,
    )
    return out, pull(g)

  try:
    arrays = q_BTHC, q_BTHC, kv_BKTC, kv_BKTC, segment_ids_BT
    jax.jit(both).lower(*arrays).compile()
  except jax.errors.JaxRuntimeError as error:
    return str(error).split('\n')[0]
  return ''


def _bias(segment_ids_BT, form: form_lib.Form, dtype) -> jax.Array:
  """Returns the mask that the kernel adds to scores, [B, 1, T, T]."""
  mask_BTT = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
  if form.window:
    place_T = jnp.arange(segment_ids_BT.shape[1])
    # Only the lower bound: the kernel is causal.
    mask_BTT &= (place_T[None, :] > place_T[:, None] - form.window)[None]
  bias_BTT = jnp.where(mask_BTT, 0.0, cudnn_call.HIDDEN).astype(dtype)
  return bias_BTT[:, None]
