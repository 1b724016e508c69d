"""Context parallelism: attention with the tokens of a row split over devices.

A query needs keys of other devices. `parallel/attention/gather.py` collects all
keys on every device; `parallel/attention/ring.py` passes them around. Both are
built from `parallel/attention/partial.py`. Neither stores scores or other
devices' keys for the backward pass: it collects or passes the keys again.
"""

from collections.abc import Callable
import functools
import math
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from checks import expect
from parallel import parallel_config
from parallel.attention import gather, partial, ring, sharded

# The attention port of `models.execution`:
# (q_BTHC, k_BKTC, v_BKTC, *, segment_ids_BT, dropout, form) -> [B, T, H, C].
Attend = Callable[..., jax.Array]

_AXIS = 'context'  # the same mesh axis as in ring.py and gather.py


def balanced_order(time: int, num_shards: int) -> np.ndarray | None:
  """Returns the order of a row's tokens on the devices, [T]; None on one.

  With contiguous shards, causal attention would give the last device most of
  the work. Here device i of n holds parts i and 2n - 1 - i of the row's 2n,
  which is the same work for every device.

  Raises:
    ValueError: the row does not divide into 2n parts.
  """
  if num_shards == 1:
    return None
  check_row_length(time, num_shards)
  parts = np.arange(time).reshape(2 * num_shards, -1)
  # Part p sees p + 1 parts: i + 1 and 2n - i add up to 2n + 1 for every i.
  order = [[i, 2 * num_shards - 1 - i] for i in range(num_shards)]
  return parts[np.array(order).reshape(-1)].reshape(-1)


def check_row_length(row_length: int, num_shards: int) -> None:
  """Raises ValueError for a row that does not divide into 2n parts."""
  if num_shards > 1:
    expect.multiple_of(
      'data.row_length',
      row_length,
      '2 x parallel.context',
      2 * num_shards,
      'change one of them',
    )


def kv_repeats(num_heads: int, num_kv_heads: int, num_parts: int) -> int:
  """Returns the number of copies of each key/value head over `num_parts`.

  With fewer key/value heads than devices along `tensor`, each device has a copy
  of the head that it needs.

  Raises:
    ValueError: the heads do not divide.
  """
  # The smallest number of key/value heads that `num_parts` divides.
  whole = math.lcm(num_kv_heads, num_parts)
  if num_heads % whole:
    raise ValueError(
      f'parallel.tensor: got {num_parts} with parallel.context > 1 and'
      f' model.num_heads, num_kv_heads = {num_heads}, {num_kv_heads}, expected'
      f' num_heads to be a multiple of the two others, hence of {whole}; change'
      ' one of them'
    )
  return whole // num_kv_heads


def make_attend(mesh: Mesh, kind: str, saved_name: str = '') -> Attend:
  """Returns causal attention over a mesh whose `context` axis splits the rows.

  The port takes q [B, T, H, C], k and v [B, K, T, C] and segment ids [B, T]
  (or None), and returns [B, T, H, C], all with tokens in `balanced_order`. Rows
  are split over the batch axes, heads over `tensor`.

  Half of a row's T x T scores are causal. `ring` computes the share
  (2n + 1) / 4n of all scores: two of the four pairs of parts of two devices,
  and three of the four pairs of a device with itself. `gather` computes 3/4:
  all keys for the later part of a device, half of them for the earlier part.

  Args:
    mesh: from `parallel.mesh`; its `context` axis is more than 1.
    kind: ring or gather, as `ParallelConfig.context_attention`.
    saved_name: the name of output and log-sum-exp in a rematerialisation
      policy. With these kept, keys do not travel a second time to compute them.
  """
  num_shards = mesh.shape[_AXIS]
  expect.one_of(
    'parallel.context_attention', kind, parallel_config.CONTEXT_ATTENTION
  )
  if num_shards == 1:
    raise ValueError(
      'context parallelism: got parallel.context = 1, expected at least 2: a'
      ' single device has all keys; use attention of whole rows'
    )

  def local(form, q_BTHC, k_BKTC, v_BKTC, segment_ids_BT):
    batch, time, heads, channels = q_BTHC.shape
    num_kv = k_BKTC.shape[1]
    scale, shape = 1 / math.sqrt(channels), partial.PLAIN
    if form is not None:
      scale = form.scale_of(channels)
      shape = partial.Shape(form.window, form.softcap)
    q_BTKGC = q_BTHC.reshape(batch, time, num_kv, heads // num_kv, channels)
    q_BKGTC = q_BTKGC.transpose(0, 2, 3, 1, 4) * scale
    out_BKGTC: Any = _attend(
      q_BKGTC,
      k_BKTC,
      v_BKTC,
      segment_ids_BT,
      (num_shards, kind, saved_name, shape),
    )
    out_BTKGC = out_BKGTC.transpose(0, 3, 1, 2, 4)
    return out_BTKGC.reshape(batch, time, heads, -1)

  def attend(
    q_BTHC: jax.Array,
    k_BKTC: jax.Array,
    v_BKTC: jax.Array,
    *,
    segment_ids_BT: jax.Array | None = None,
    dropout: Any = None,
    form: Any = None,  # models.attention.form.Form
  ) -> jax.Array:
    if dropout is not None:
      raise ValueError(
        'context parallelism: got dropout of attention weights, expected none:'
        ' no device has all weights of a query; set model.dropout_rate = 0'
      )
    check_row_length(q_BTHC.shape[1], num_shards)
    num_parts = mesh.shape[sharded.HEADS]
    repeats = kv_repeats(q_BTHC.shape[2], k_BKTC.shape[1], num_parts)
    if repeats > 1:
      k_BKTC, v_BKTC = (jnp.repeat(x, repeats, 1) for x in (k_BKTC, v_BKTC))
    return sharded.over_mesh(
      functools.partial(local, form),
      mesh,
      q_BTHC,
      k_BKTC,
      v_BKTC,
      segment_ids_BT,
    )

  return attend


# A derivative of its own: JAX's would store the scores, and the keys of other
# devices, of every step of a ring.
@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q_BKGTC, k_BKTC, v_BKTC, segment_ids_BT, settings):
  """Attention of one device's queries over all devices' keys."""
  arguments = q_BKGTC, k_BKTC, v_BKTC, segment_ids_BT
  return _attend_forward(*arguments, settings)[0]


def _attend_forward(q_BKGTC, k_BKTC, v_BKTC, segment_ids_BT, settings):
  num_shards, kind, saved_name, shape = settings
  queries = partial.Queries(q_BKGTC, segment_ids_BT)
  keys = partial.Keys(k_BKTC, v_BKTC, segment_ids_BT)
  run = ring.attend if kind == 'ring' else gather.attend
  out_BKGTC, log_sum_BKGT = run(queries, keys, num_shards, shape)
  out_BKGTC = out_BKGTC.astype(q_BKGTC.dtype)
  if saved_name:
    out_BKGTC = checkpoint_name(out_BKGTC, saved_name)
    log_sum_BKGT = checkpoint_name(log_sum_BKGT, saved_name)
  arguments = q_BKGTC, k_BKTC, v_BKTC, segment_ids_BT
  return out_BKGTC, (*arguments, out_BKGTC, log_sum_BKGT)


def _attend_backward(settings, residuals, dout_BKGTC):
  num_shards, kind, _, shape = settings
  q_BKGTC, k_BKTC, v_BKTC, segment_ids_BT, out_BKGTC, log_sum_BKGT = residuals
  # The mean of dP under P, without P (FlashAttention-2, algorithm 2).
  delta_BKGT = jnp.sum(
    dout_BKGTC.astype(jnp.float32) * out_BKGTC.astype(jnp.float32), axis=-1
  )
  saved = partial.Saved(log_sum_BKGT, delta_BKGT, dout_BKGTC)
  queries = partial.Queries(q_BKGTC, segment_ids_BT)
  keys = partial.Keys(k_BKTC, v_BKTC, segment_ids_BT)
  run = ring.gradients if kind == 'ring' else gather.gradients
  dq, (dk, dv) = run(queries, keys, saved, num_shards, shape)
  return (
    dq.astype(q_BKGTC.dtype),
    dk.astype(k_BKTC.dtype),
    dv.astype(v_BKTC.dtype),
    None,  # segment ids have no gradient
  )


_attend.defvjp(_attend_forward, _attend_backward)
