"""Pipeline parallelism: the stack of layers split over the mesh axis 'stage'.

A batch is cut into M micro-batches, which follow each other through S stages.
A micro-batch passes every stage R times (repeats), and a stage holds L layers
for each repeat: layer n = (r S + s) L + l is the l-th layer of stage s in
repeat r. R = 1 is GPipe's schedule (arXiv:1811.06965); R > 1 is the circular,
or interleaved, schedule (arXiv:2104.04473, section 2.2). A stage is idle in
S - 1 of the M R + S - 1 iterations. This bubble is the share
(S - 1) / (M R + S - 1) of the time. More micro-batches make it smaller, and so
do more repeats, which cost R times the messages.

All devices run one program without explicit messages. The stages are an array
axis and `vmap` runs them side by side. Rolling that axis by one hands every
micro-batch to the next stage; the compiler turns the roll into a
collective-permute.

For the backward pass each layer stores the same arrays as without stages, for
each micro-batch and for each bubble. Storing only the inputs of an iteration
would take an eighth less memory under remat = full (57 MB instead of 65 MB for
8 layers in 2 stages) but one more forward pass, which is not worth it.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from checks import expect
from parallel import rules

_STAGE = 'stage'

# (layer_params, x_BTD, shared, key) -> (x_BTD, sums). `shared` holds arrays of
# the batch that all layers read, as segment ids.
ApplyLayer = Callable[..., tuple[jax.Array, Any]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
  """The work of every stage in every iteration; arrays [iterations, S].

  In iteration t, stage s does the work that stage 0 did at u = t - s. Groups of
  S micro-batches go round together: micro-batch g S + p is in repeat r of stage
  0 at u = (g R + r) S + p, which is S iterations after its repeat r - 1.
  """

  microbatch: np.ndarray  # index of the micro-batch; arbitrary in a bubble
  repeat: np.ndarray  # index of the repeat; arbitrary in a bubble
  is_real: np.ndarray  # bool; False in a bubble, whose results are dropped


def make_schedule(
  num_stages: int, repeats: int, num_microbatches: int
) -> Schedule:
  """Returns the circular schedule; M is a multiple of S."""
  num_steps = num_microbatches * repeats
  iteration_T1 = np.arange(num_steps + num_stages - 1)[:, None]
  age_TS = iteration_T1 - np.arange(num_stages)[None, :]
  # A bubble may compute anything, but its indices must be valid.
  step_TS = np.clip(age_TS, 0, num_steps - 1)
  group_TS, step_in_group_TS = np.divmod(step_TS, num_stages * repeats)
  repeat_TS, place_TS = np.divmod(step_in_group_TS, num_stages)
  return Schedule(
    microbatch=(group_TS * num_stages + place_TS).astype(np.int32),
    repeat=repeat_TS.astype(np.int32),
    is_real=step_TS == age_TS,
  )


def make_run_layers(
  mesh: Mesh, *, repeats: int, num_microbatches: int, policy: Any = None
) -> Callable[..., tuple[jax.Array, Any]]:
  """Returns `run_layers`, which runs a stack of layers in stages over the mesh.

  Args:
    mesh: has an axis 'stage' of size S.
    repeats: R, the number of times that a micro-batch passes every stage.
    num_microbatches: M, a multiple of S.
    policy: the arrays of a layer that `jax.checkpoint` may store, if
      `apply_layer` rematerialises the others; None if it stores all of them.

  Returns:
    run_layers(apply_layer, stacked_params, x_BTD, shared, key) -> (x_BTD,
    sums). Leaves of `stacked_params` are [N, ...], or [R, N / R, ...] if R > 1,
    split over 'stage' along N or N / R. The first axis of x and of each leaf of
    `shared` is the batch. `sums` are the second results of apply_layer, added
    over micro-batches and stacked over layers, [N, ...]. Every layer of every
    micro-batch gets its own key, which does not depend on S and R.

  Raises:
    ValueError: M is no multiple of S, or (from `run_layers`) rows or layers do
      not divide.
  """
  num_stages = mesh.shape[_STAGE]
  expect.multiple_of(
    'parallel.stage_microbatches',
    num_microbatches,
    'parallel.stage',
    num_stages,
    'change one of them',
  )
  schedule = make_schedule(num_stages, repeats, num_microbatches)

  def run_layers(apply_layer, stacked_params, x_BTD, shared, key):
    expect.multiple_of(
      'rows',
      x_BTD.shape[0],
      'parallel.stage_microbatches',
      num_microbatches,
      'change data.batch_size or parallel.stage_microbatches',
    )
    run_stages = _make_run_stages(
      apply_layer,
      jax.tree.map(lambda x: _by_stage(x, repeats, num_stages), stacked_params),
      jax.tree.map(lambda x: _deal(x, num_microbatches), shared),
      key,
      policy or _all_but_weights,
    )
    x_MBTD = _deal(x_BTD, num_microbatches)
    # Every stage has a copy of the inputs, and room for the outputs, although
    # only the first stage's inputs and the last stage's outputs are used. With
    # a single copy, the copy or its gradient would be sent in every iteration.
    inputs_SMBTD = by_stage(
      jnp.broadcast_to(x_MBTD[None], (num_stages, *x_MBTD.shape))
    )
    outputs_SMBTD, sums = _run(run_stages, inputs_SMBTD, schedule, by_stage)
    is_last_S = np.arange(num_stages) == num_stages - 1
    x_MBTD = jnp.sum(
      jnp.where(_expand(is_last_S, outputs_SMBTD), outputs_SMBTD, 0), axis=0
    )
    return x_MBTD.swapaxes(0, 1).reshape(x_BTD.shape), sums

  def by_stage(x_SBTD):
    """Splits axis 0 over the stages, and the rows (axis -3) over the batch."""
    spec = (_STAGE, *(None,) * (x_SBTD.ndim - 4), rules.BATCH_AXES, None, None)
    return jax.lax.with_sharding_constraint(
      x_SBTD, NamedSharding(mesh, PartitionSpec(*spec))
    )

  return run_layers


def _run(run_stages, inputs_SMBTD, schedule, by_stage):
  """Returns (outputs [S, M, ...], sums); the last stage's outputs are final."""
  num_repeats = int(schedule.repeat.max()) + 1
  is_first_S = np.arange(inputs_SMBTD.shape[0]) == 0

  def iterate(carry, xs):
    x_SBTD, outputs_SMBTD, sums_RSL = carry
    now, (first, last, enters) = xs
    entering_SBTD = jax.lax.dynamic_index_in_dim(
      inputs_SMBTD, first, axis=1, keepdims=False
    )
    enters_S = is_first_S & enters
    x_SBTD = jnp.where(_expand(enters_S, x_SBTD), entering_SBTD, x_SBTD)
    x_SBTD, sums_SL = run_stages(by_stage(x_SBTD), now.microbatch, now.repeat)
    x_SBTD = by_stage(x_SBTD)
    # Written in every repeat; the last repeat overwrites the others.
    outputs_SMBTD = jax.lax.dynamic_update_index_in_dim(
      outputs_SMBTD, x_SBTD, last, axis=1
    )
    is_now_RS = now.is_real[None] & (
      now.repeat[None] == np.arange(num_repeats)[:, None]
    )
    sums_RSL = jax.tree.map(
      lambda total_RSL, x_SL: (
        total_RSL + jnp.where(_expand(is_now_RS, total_RSL), x_SL[None], 0)
      ),
      sums_RSL,
      sums_SL,
    )
    return (_hand_on(x_SBTD), outputs_SMBTD, sums_RSL), None

  # A bubble computes on real rows, although its results are dropped: the norm
  # of zeros could be infinite, and infinity times a zero gradient is NaN.
  filler_SBTD = jax.lax.stop_gradient(inputs_SMBTD[:, 0])
  sums_SL = jax.eval_shape(
    run_stages, filler_SBTD, schedule.microbatch[0], schedule.repeat[0]
  )[1]
  zeros_RSL = jax.tree.map(
    lambda x: jnp.zeros((num_repeats, *x.shape), x.dtype), sums_SL
  )
  # All stages need these indices of the first and the last stage. Sliced from
  # arrays that are split over stages, they would be sent in every iteration.
  ends = (
    schedule.microbatch[:, 0],
    schedule.microbatch[:, -1],
    schedule.repeat[:, 0] == 0,
  )
  (_, outputs_SMBTD, sums_RSL), _ = jax.lax.scan(
    iterate,
    (filler_SBTD, jnp.zeros_like(inputs_SMBTD), zeros_RSL),
    (schedule, ends),
  )
  return outputs_SMBTD, jax.tree.map(
    lambda x: x.reshape((-1, *x.shape[3:])), sums_RSL
  )


def _make_run_stages(apply_layer, params_RSL, shared_MB, key, policy):
  """Returns (x_SBTD, microbatch_S, repeat_S) -> (x_SBTD, sums_SL)."""
  repeats, num_stages, num_layers = jax.tree.leaves(params_RSL)[0].shape[:3]

  def run_stage(params_RL, x_BTD, stage, microbatch, repeat):
    """Runs the layers of one stage and repeat, one after the other."""
    shared_B = jax.tree.map(
      lambda x: jax.lax.dynamic_index_in_dim(x, microbatch, keepdims=False),
      shared_MB,
    )

    def apply(params, x_BTD, index):
      layer_key = None
      if key is not None:
        # The key depends on micro-batch and layer, not on stage or iteration.
        n = (repeat * num_stages + stage) * num_layers + index
        layer_key = jax.random.fold_in(jax.random.fold_in(key, microbatch), n)
      return apply_layer(params, x_BTD, shared_B, layer_key)

    def chosen(params_RL, x_BTD, index):
      params = jax.tree.map(
        lambda w_RL: jax.lax.dynamic_slice(
          w_RL,
          (repeat, index, *(0,) * (w_RL.ndim - 2)),
          (1, 1, *w_RL.shape[2:]),
        )[0, 0],
        params_RL,
      )
      return apply(params, x_BTD, index)

    indices = jnp.arange(num_layers)
    if repeats == 1:
      params_L = jax.tree.map(lambda w_RL: w_RL[0], params_RL)
      return jax.lax.scan(
        lambda x_BTD, layer: apply(layer[0], x_BTD, layer[1]),
        x_BTD,
        (params_L, indices),
      )
    # The weights of this repeat are a new slice in every iteration. Without a
    # checkpoint JAX would store each slice for the backward pass: M models.
    chosen = jax.checkpoint(chosen, prevent_cse=False, policy=policy)
    return jax.lax.scan(
      lambda x_BTD, index: chosen(params_RL, x_BTD, index), x_BTD, indices
    )

  run = jax.vmap(run_stage, in_axes=(1, 0, 0, 0, 0), spmd_axis_name=_STAGE)
  stage_S = np.arange(num_stages)
  return lambda x_SBTD, microbatch_S, repeat_S: run(
    params_RSL, x_SBTD, stage_S, microbatch_S, repeat_S
  )


def _all_but_weights(primitive: Any, *_, **__) -> bool:
  """A checkpoint policy: stores computed values, not fetched or cast ones."""
  return primitive.name not in (
    'broadcast_in_dim',
    'convert_element_type',
    'dynamic_slice',
    'gather',
    'reshape',
    'squeeze',
    'transpose',
  )


@jax.custom_vjp
def _hand_on(x_SBTD):
  """Hands each stage's output to the next stage, and the last to the first."""
  return jnp.roll(x_SBTD, 1, axis=0)


# JAX's derivative of a roll is two slices, which would be two messages.
_hand_on.defvjp(
  lambda x_SBTD: (_hand_on(x_SBTD), None),
  lambda _, dx_SBTD: (jnp.roll(dx_SBTD, -1, axis=0),),
)


def _by_stage(x, repeats: int, num_stages: int):
  """Reshapes [N, ...] or [R, N / R, ...] to [R, S, L, ...]."""
  per_layer = x.shape[1:] if repeats == 1 else x.shape[2:]
  return x.reshape((repeats, num_stages, -1, *per_layer))


def _deal(x, num_parts: int):
  """Reshapes [B, ...] to [M, B / M, ...]: row b goes to micro-batch b mod M.

  Each device keeps its own rows, so that no row is moved.
  """
  return x.reshape((-1, num_parts, *x.shape[1:])).swapaxes(0, 1)


def _expand(x, like):
  """Appends axes of size 1 until x has as many axes as `like`."""
  return x.reshape(x.shape + (1,) * (like.ndim - x.ndim))
