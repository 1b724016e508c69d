"""Causal attention on TPU by JAX's Pallas kernel "splash attention".

`attend` is a port of `models.execution.Execution`. It is exact for packed rows
and has its own backward pass. Scores exist one tile at a time in on-chip
memory, and tiles above the diagonal are never computed. The compiler cannot
partition a Pallas call: over a mesh, `parallel.attention.sharded` makes each
device call this on its own rows and heads.

References: FlashAttention, Dao et al., arXiv:2205.14135; grouped-query
attention, Ainslie et al., arXiv:2305.13245.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel as kernel_lib,
  splash_attention_mask as mask_lib,
)

from models import remat
from models.attention import finite, form as form_lib, supports

# Queries, and keys, of a tile. The scores of a tile are a float32 square, 1 MiB
# at 512. The backward kernels hold several such squares in the 16 MiB that a
# kernel may use.
MAX_TILE_ROWS = 512


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

  Products accumulate in float32, and the softmax is in float32. Any head width
  works: the compiler pads the channels to its 128 lanes.

  Args:
    q_BTHC: queries; head h uses key/value head h // (H / K).
    segment_ids_BT: queries and keys of different segments, padding among them,
      do not see each other.
    dropout: must be None: the weights never exist as an array.
    form: window, soft-cap and scale; tiles outside a window are not computed.
    interpret: run on any device, slowly; for tests.

  Raises:
    ValueError: a call that `supports.SPLASH` refuses.
  """
  _, time, heads, channels = q_BTHC.shape
  supports.check(
    supports.SPLASH,
    supports.Request(
      form=form, has_dropout=dropout is not None, row_length=time
    ),
  )
  kernel = _kernel(time, heads, form, interpret)
  segments = None
  if segment_ids_BT is not None:
    segments = kernel_lib.SegmentIds(q=segment_ids_BT, kv=segment_ids_BT)

  def attend_finite(q_BTHC, k_BKTC, v_BKTC):
    q_BHTC = (q_BTHC * form.scale_of(channels)).swapaxes(1, 2)
    out_BHTC: Any = jax.vmap(kernel)(q_BHTC, k_BKTC, v_BKTC, segments)
    return out_BHTC.swapaxes(1, 2)

  return finite.around(
    attend_finite, q_BTHC, k_BKTC, v_BKTC, segment_ids_BT, form
  )


def tile_rows(time: int) -> int:
  """Returns the largest tile that divides rows of `time` tokens."""
  return max(
    rows
    for rows in range(supports.LANES, MAX_TILE_ROWS + 1, supports.LANES)
    if time % rows == 0
  )


def _kernel(time: int, heads: int, form: form_lib.Form, interpret: bool):
  """Returns the kernel of a row: (q_HTC, k_KTC, v_KTC, segments) -> out_HTC."""
  rows = tile_rows(time)
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
      # The gradients of queries have their own kernel. Fused with the gradients
      # of keys, they would be written once per tile of keys and then added up.
      block_q_dq=rows,
      block_kv_dq=rows,
    ),
    head_shards=1,
    q_seq_shards=1,
    # A remat policy can keep the output and the log-sum-exp by this name;
    # without it the backward pass would run the forward kernel again.
    residual_checkpoint_name=remat.ATTENTION,
    interpret=interpret,
  )
