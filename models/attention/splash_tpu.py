"""Causal attention on TPU by JAX's Pallas kernels, "splash attention".

`attend` is a port of `models.execution.Execution`, exact for packed rows, with
a backward pass of its own. Scores exist one block at a time in on-chip memory,
and blocks above the diagonal are never computed. A Pallas call is opaque to the
compiler's partitioning: over a mesh, `parallel.attention.sharded` has each
device call this on its own rows and heads.

FlashAttention: Dao et al., arXiv:2205.14135; grouped-query attention: Ainslie
et al., arXiv:2305.13245.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel as kernel_lib,
  splash_attention_mask as mask_lib,
)

from models import remat
from models.attention import form as form_lib

# Rows of queries and of keys per block. A block of scores is a float32 square,
# 1 MiB at 512; the backward kernels hold several of them in the 16 MiB that a
# kernel may use. Blocks must be multiples of the vector unit's 128 lanes.
MAX_BLOCK_ROWS = 512
LANES = 128


def attend(
  q_BTHC: jax.Array,
  k_BKTC: jax.Array,
  v_BKTC: jax.Array,
  *,
  segment_ids_BT: jax.Array | None = None,
  dropout: Callable[[jax.Array], jax.Array] | None = None,
  form: form_lib.Form = form_lib.Form(),
  interpret: bool = False,
) -> jax.Array:
  """Returns causal attention, [B, T, H, C], in the dtype of the queries.

  Products accumulate, and the softmax is taken, in float32. Any head width
  does: the compiler pads channels to its lanes by itself.

  Args:
    q_BTHC: queries; head h uses key/value head h // (H / K).
    k_BKTC: keys.
    v_BKTC: values.
    segment_ids_BT: queries and keys of different segments, padding among them,
      do not see each other.
    dropout: must be None: weights never exist as an array.
    form: window, soft-cap and scale; blocks out of a window's reach are not
      computed.
    interpret: run on any device, slowly; for tests.

  Raises:
    ValueError: dropout, or rows that blocks cannot be cut from.
  """
  if dropout is not None:
    raise ValueError(
      'splash attention: got dropout of attention weights, expected none: the'
      ' kernel never stores them; set model.dropout_rate = 0 or'
      ' execution.attention = reference'
    )
  _, time, heads, channels = q_BTHC.shape
  problem = row_length_problem(time)
  if problem:
    raise ValueError(f'splash attention: {problem}')
  kernel = _kernel(time, heads, form, interpret)
  q_BHTC = (q_BTHC * form.scale_of(channels)).swapaxes(1, 2)
  segments = None
  if segment_ids_BT is not None:
    segments = kernel_lib.SegmentIds(q=segment_ids_BT, kv=segment_ids_BT)
  out_BHTC: Any = jax.vmap(kernel)(q_BHTC, k_BKTC, v_BKTC, segments)
  return out_BHTC.swapaxes(1, 2)


def row_length_problem(time: int) -> str:
  """Returns why rows of `time` tokens cannot be taken, or ''."""
  if time % LANES:
    return (
      f'got rows of {time} tokens, expected a multiple of {LANES}; change'
      ' data.row_length or set execution.attention = reference'
    )
  return ''


def block_rows(time: int) -> int:
  """Returns the largest block that divides rows of `time` tokens."""
  return max(
    rows for rows in range(LANES, MAX_BLOCK_ROWS + 1, LANES) if time % rows == 0
  )


def _kernel(time: int, heads: int, form: form_lib.Form, interpret: bool):
  """The kernel for one row: (q_HTC, k_KTC, v_KTC, segments) -> out_HTC."""
  rows = block_rows(time)
  mask = mask_lib.CausalMask((time, time))
  if form.window:
    mask = mask_lib.LocalMask(
      (time, time), window_size=(form.window - 1, 0), offset=0
    )
  return kernel_lib.make_splash_mha(
    mask_lib.MultiHeadMask([mask] * heads),
    attn_logits_soft_cap=form.softcap or None,
    block_sizes=kernel_lib.BlockSizes(
      block_q=rows,
      block_kv=rows,
      block_q_dkv=rows,
      block_kv_dkv=rows,
      # Gradients of queries by a kernel of their own: fused with those of keys
      # they would be written once per block of keys, then added up.
      block_q_dq=rows,
      block_kv_dq=rows,
    ),
    head_shards=1,
    q_seq_shards=1,
    # Named, the output and the log-sum-exp can be kept for the backward pass
    # by a policy that would otherwise run the forward kernel twice.
    residual_checkpoint_name=remat.ATTENTION,
    interpret=interpret,
  )
