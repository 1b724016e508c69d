"""Attention that each device computes alone, on its own rows and heads.

A custom kernel is opaque to the compiler, which can only gather its operands
and run it whole on every device. Rows and heads do not mix in attention, so a
device needs nobody else's: `shard_map` hands each of them its part. Rows split
along time (context parallelism) do mix, and are refused.
"""

from collections.abc import Callable

import jax
from jax.sharding import Mesh, PartitionSpec

from parallel import rules

# As a model's port:
# (q_BTHC, k_BKTC, v_BKTC, *, segment_ids_BT, dropout, form).
Attend = Callable[..., jax.Array]

HEADS = 'tensor'  # mesh axis
_TIME = 'context'


def attend(local_attend: Attend, mesh: Mesh) -> Attend:
  """Returns `local_attend` spread over the rows and heads of a mesh.

  The specs name no stage: run side by side, stages are a further axis that
  `jax.vmap(..., spmd_axis_name='stage')` adds to them.

  Args:
    local_attend: computes attention of whole arrays on one device.
    mesh: from `parallel.mesh`.

  Raises:
    ValueError: the mesh splits the tokens of a row.
  """
  if mesh.shape['context'] > 1:
    raise ValueError(
      'attention per device: got parallel.context ='
      f' {mesh.shape["context"]}, expected 1: no device has all the keys of'
      ' a row; set parallel.context = 1 or execution.attention = auto'
    )
  if mesh.size == 1:
    return local_attend

  def spread(
    q_BTHC, k_BKTC, v_BKTC, *, segment_ids_BT=None, dropout=None, **form
  ) -> jax.Array:
    if dropout is not None:
      raise ValueError(
        'attention per device: got dropout, expected none: every device would'
        ' draw the same mask; set model.dropout_rate = 0'
      )

    def local(q_BTHC, k_BKTC, v_BKTC, segment_ids_BT):
      return local_attend(
        q_BTHC,
        k_BKTC,
        v_BKTC,
        segment_ids_BT=segment_ids_BT,
        dropout=None,
        **form,
      )

    return over_mesh(local, mesh, q_BTHC, k_BKTC, v_BKTC, segment_ids_BT)

  return spread


def over_mesh(
  local: Callable[..., jax.Array],
  mesh: Mesh,
  q_BTHC: jax.Array,
  k_BKTC: jax.Array,
  v_BKTC: jax.Array,
  segment_ids_BT: jax.Array | None,
) -> jax.Array:
  """Returns local(q, k, v, segment_ids), called with each device's part.

  Rows are split over the batch axes, tokens over `context`, heads over
  `tensor`; the result is split as the queries are.
  """
  q_spec = PartitionSpec(rules.BATCH_AXES, _TIME, HEADS, None)
  kv_spec = PartitionSpec(rules.BATCH_AXES, HEADS, _TIME, None)
  segment_spec = PartitionSpec(rules.BATCH_AXES, _TIME)
  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(
      q_spec,
      kv_spec,
      kv_spec,
      None if segment_ids_BT is None else segment_spec,
    ),
    out_specs=q_spec,
    # Everything is split over every axis in use. Pallas calls do not say so,
    # and a ring would have to of each zero that a sum starts from.
    check_vma=False,
  )(q_BTHC, k_BKTC, v_BKTC, segment_ids_BT)
