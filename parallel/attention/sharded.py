"""Sharded attention: each device computes its own rows and heads alone.

The compiler cannot look into a custom kernel: it would gather the operands and
run the whole kernel on every device. Attention does not mix rows or heads, so
no device needs rows or heads of another device: `shard_map` gives each device
its own. `attend` refuses rows whose tokens are split (context parallelism),
because attention does mix the tokens of a row.
"""

from collections.abc import Callable

import jax
from jax.sharding import Mesh, PartitionSpec

from parallel import rules

# The attention port of `models.execution`:
# (q_BTHC, k_BKTC, v_BKTC, *, segment_ids_BT, dropout, form) -> [B, T, H, C].
Attend = Callable[..., jax.Array]

HEADS = 'tensor'  # mesh axis
_TIME = 'context'


def attend(local_attend: Attend, mesh: Mesh) -> Attend:
  """Returns `local_attend` spread over the rows and heads of a mesh.

  The specs do not name the mesh axis `stage`: a pipeline adds it by
  `jax.vmap(..., spmd_axis_name='stage')`.

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
  """Returns local(q, k, v, segment_ids), run on each device's shards.

  Rows are split over the batch axes, tokens over `context`, heads over
  `tensor`. The result is split like the queries.
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
    # All arrays are split over every mesh axis in use. With the check on, a
    # Pallas call and each zero at the start of a ring's sums would have to
    # declare their axes.
    check_vma=False,
  )(q_BTHC, k_BKTC, v_BKTC, segment_ids_BT)
