"""XLA's calls of cuDNN's fused attention, forward and backward.

    attend(q_BTHC, k_BTKC, v_BTKC, operands, form) -> out_BTHC

XLA:GPU makes a cuDNN graph of a custom call named `__cudnn$fmha...` and of its
configuration, a JSON object. `jax.nn.dot_product_attention` writes the same
calls, but it has no documents of a packed row, it computes a gradient of the
mask (before jax 0.12), and it names nothing that a remat policy could keep.
Scores never exist as an array. The backward call adds up the gradients of
queries in no fixed order, unless XLA is told otherwise by
--xla_gpu_exclude_nondeterministic_ops.

`interpreted` computes the same from the same operands on any device.
"""

import dataclasses
import functools
import json
from typing import Any, NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from models import packed_rows, remat

# Added to the score of a hidden key; its weight is exactly zero. cuDNN
# subtracts two such numbers, so that it must not be the least bfloat16.
HIDDEN = -(2.0**41)

# The products of attention and of its gradients, of queries BTHC, keys and
# values BSHC and scores BHTS: two operands and the letter that is summed. cuDNN
# repeats key/value heads until they are H.
_FORWARD = {
  'bmm1': ('BTHC', 'BSHC', 'C'),
  'bmm2': ('BHTS', 'BSHC', 'S'),
}
_BACKWARD = {
  'bmm1_grad_gemm1': ('BHTS', 'BTHC', 'T'),
  'bmm1_grad_gemm2': ('BHTS', 'BSHC', 'S'),
  'bmm2_grad_gemm1': ('BHTS', 'BTHC', 'T'),
  'bmm2_grad_gemm2': ('BTHC', 'BSHC', 'C'),
}
# As jax writes it; cuDNN chooses its own plan.
_ALGORITHM = {
  'algo_id': '0',
  'math_type': 'TENSOR_OP_MATH',
  'tuning_knobs': {'17': '1', '24': '0'},
  'is_cudnn_frontend': True,
  'workspace_size': '0',
}
_OUT_LAYOUT = 0, 2, 1, 3  # of [B, H, T, C]: in memory it is [B, T, H, C]
_WORKSPACE = jax.ShapeDtypeStruct((0,), jnp.uint8)  # XLA gives it its size


class Operands(NamedTuple):
  """The operands besides queries, keys and values; None if not used.

  Documents of a packed row are given by their lengths, and by the numbers that
  lie before each of them in the memory of queries and of keys. There are at
  most B x M of them. Unused entries have length 0 and lie at the end.
  """

  bias_B1TT: jax.Array | None = None  # added to scores: 0, or HIDDEN
  lengths_BM: jax.Array | None = None  # int32, tokens of each document
  q_offsets_BL: jax.Array | None = None  # int32, L = M + 1
  kv_offsets_BL: jax.Array | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
  """The static settings of a call, which is always causal."""

  scale: float  # multiplies the scores
  window: int = 0  # keys that a query sees, its own included; 0: all before it
  max_documents: int = 1  # M; 1: no lengths


def documents(
  segment_ids_BT: jax.Array, num_heads: int, num_kv_heads: int, channels: int,
  max_documents: int,
) -> Operands:  # fmt: skip
  """Returns the operands of packed rows.

  Every run of equal ids is a document, padding too: no token is left out.
  """
  batch, time = segment_ids_BT.shape
  starts_BT = packed_rows.is_start(segment_ids_BT)
  # One more than there are documents: the end of the last one.
  (first_L,) = jnp.nonzero(
    starts_BT.reshape(-1),
    size=batch * (max_documents + 1),
    fill_value=batch * time,
  )
  first_L = first_L.astype(jnp.int32)
  lengths = jnp.diff(first_L[: batch * max_documents + 1])
  offsets_BL = first_L.reshape(batch, max_documents + 1)
  return Operands(
    lengths_BM=lengths.reshape(batch, max_documents),
    q_offsets_BL=offsets_BL * (num_heads * channels),
    kv_offsets_BL=offsets_BL * (num_kv_heads * channels),
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend(
  q_BTHC: jax.Array,
  k_BTKC: jax.Array,
  v_BTKC: jax.Array,
  operands: Operands,
  form: Form,
) -> jax.Array:
  """Returns causal attention in the dtype of the queries, bfloat16.

  Tokens beyond the last of B x M documents are not written.
  """
  return _forward(q_BTHC, k_BTKC, v_BTKC, operands, form)[0]


def _forward(q_BTHC, k_BTKC, v_BTKC, operands: Operands, form: Form):
  batch, time, heads, _ = q_BTHC.shape
  out_BHTC, log_sum_NHT, _ = _call(
    f'__cudnn$fmha{_kind(operands)}Softmax',
    [
      _heads_first(q_BTHC),
      # N is B x M: the documents of packed rows, each as long as a row.
      jax.ShapeDtypeStruct(
        (batch * form.max_documents, heads, time), jnp.float32
      ),
      _WORKSPACE,
    ],
    [_OUT_LAYOUT, None, None],
    _config(q_BTHC, form, _FORWARD),
  )(
    q_BTHC, k_BTKC, v_BTKC, *_given(operands.bias_B1TT), *_lengths(operands)
  )  # fmt: skip
  # A remat policy can keep both by this name; without it the backward pass
  # would run the forward kernel again.
  name = functools.partial(checkpoint_name, name=remat.ATTENTION)
  out_BTHC, log_sum_NHT = name(out_BHTC.swapaxes(1, 2)), name(log_sum_NHT)
  kept = q_BTHC, k_BTKC, v_BTKC, operands, log_sum_NHT, out_BTHC
  return out_BTHC, kept


def _backward(form: Form, kept, dout_BTHC):
  q_BTHC, k_BTKC, v_BTKC, operands, log_sum_NHT, out_BTHC = kept
  *grads, _ = _call(
    f'__cudnn$fmha{_kind(operands)}SoftmaxBackward',
    [
      *(_heads_first(x) for x in (q_BTHC, k_BTKC, v_BTKC)),
      _WORKSPACE,
    ],
    [_OUT_LAYOUT] * 3 + [None],
    _config(q_BTHC, form, _BACKWARD),
  )(
    q_BTHC, k_BTKC, v_BTKC, log_sum_NHT, dout_BTHC,
    *_given(operands.bias_B1TT), out_BTHC, *_lengths(operands),
  )  # fmt: skip
  return *(x.swapaxes(1, 2) for x in grads), None


attend.defvjp(_forward, _backward)


def _heads_first(x_BTHC: jax.Array) -> jax.ShapeDtypeStruct:
  batch, time, heads, channels = x_BTHC.shape
  return jax.ShapeDtypeStruct((batch, heads, time, channels), x_BTHC.dtype)


def _kind(operands: Operands) -> str:
  return '' if operands.bias_B1TT is None else 'ScaleBias'


def _given(*arrays) -> list[jax.Array]:
  return [x for x in arrays if x is not None]


def _lengths(operands: Operands) -> list[jax.Array]:
  lengths = operands.lengths_BM
  return _given(lengths, lengths, operands.q_offsets_BL, operands.kv_offsets_BL)


def _call(name: str, results, layouts, config: dict[str, Any]):
  return jax.ffi.ffi_call(
    name,
    results,
    output_layouts=layouts,
    # A pipeline maps over stages; a device has only one of them.
    vmap_method='sequential',
    custom_call_api_version=2,  # with a status, without typed attributes
    legacy_backend_config=json.dumps(config),
  )


def _config(q_BTHC, form: Form, products) -> dict[str, Any]:
  """Returns XLA's GpuBackendConfig; numbers of 64 bits are strings in JSON."""
  batch, time, heads, _ = q_BTHC.shape
  is_packed = form.max_documents > 1
  scores = {
    'element_type': {'bfloat16': 'BF16', 'float16': 'F16'}[q_BTHC.dtype.name],
    'dimensions': [str(size) for size in (batch, heads, time, time)],
    'is_dynamic_dimension': [False] * 4,
    'layout': {'minor_to_major': ['3', '2', '1', '0']},
  }
  fmha = {
    'algorithm': _ALGORITHM,
    'fmha_scale': form.scale,
    'intermediate_tensor_shape': scores,
    'is_flash_attention': True,
    'mask_type': 'PADDING_CAUSAL' if is_packed else 'CAUSAL',
    'dropout_rate': 0.0,
    'sliding_window_length': form.window,
    'max_seg_per_batch': form.max_documents,
    'is_paged_attention': False,
  }
  for name, letters in products.items():
    fmha[f'{name}_dot_dimension_numbers'] = _dimension_numbers(*letters)
  return {'operation_queue_id': '0', 'cudnn_fmha_backend_config': fmha}


def _dimension_numbers(left: str, right: str, summed: str) -> dict[str, Any]:
  def places(operand: str, letters: str) -> list[str]:
    return [str(operand.index(letter)) for letter in letters]

  return {
    'lhs_contracting_dimensions': places(left, summed),
    'rhs_contracting_dimensions': places(right, summed),
    'lhs_batch_dimensions': places(left, 'BH'),
    'rhs_batch_dimensions': places(right, 'BH'),
  }


def interpreted(
  q_BTHC: jax.Array,
  k_BTKC: jax.Array,
  v_BTKC: jax.Array,
  operands: Operands,
  form: Form,
) -> jax.Array:
  """Returns the result of `attend`, in plain array code; for tests."""
  batch, time, heads, channels = q_BTHC.shape
  groups = heads // k_BTKC.shape[2]
  k_BTHC, v_BTHC = (jnp.repeat(x, groups, axis=2) for x in (k_BTKC, v_BTKC))
  place_T = jnp.arange(time)
  is_seen = (place_T[None, :] <= place_T[:, None])[None, None]
  if form.window:
    is_seen &= (place_T[None, :] > place_T[:, None] - form.window)[None, None]
  if operands.lengths_BM is not None:
    assert operands.q_offsets_BL is not None
    first_L = operands.q_offsets_BL.reshape(-1) // (heads * channels)
    place_BT = jnp.arange(batch * time)
    document = jnp.searchsorted(first_L, place_BT, side='right') - 1
    end = first_L[document] + operands.lengths_BM.reshape(-1)[document]
    # A token outside of all documents sees nothing, and is seen by none.
    document = jnp.where(place_BT < end, document, -1).reshape(batch, time)
    is_same = document[:, None, :, None] == document[:, None, None, :]
    is_seen &= is_same & (document >= 0)[:, None, :, None]
  scores_BHTS = form.scale * jnp.einsum(
    'BTHC,BSHC->BHTS', q_BTHC, k_BTHC, preferred_element_type=jnp.float32
  )
  if operands.bias_B1TT is not None:
    scores_BHTS += operands.bias_B1TT.astype(jnp.float32)
  scores_BHTS = jnp.where(is_seen, scores_BHTS, HIDDEN)
  probs_BHTS = jax.nn.softmax(scores_BHTS, axis=-1).astype(v_BTHC.dtype)
  return jnp.einsum('BHTS,BSHC->BTHC', probs_BHTS, v_BTHC)
