"""Pipeline parallelism: the stack of layers split over the axis 'stage'.

A batch is cut into M micro-batches, which follow each other through the S
stages. A stage holds its layers in R pieces, one for each time that a
micro-batch comes round: layer n = (r S + s) L + l is the l-th of stage s in
repeat r. With R = 1 this is GPipe's schedule (arXiv:1811.06965); R > 1 is the
circular, or interleaved, one (arXiv:2104.04473, section 2.2). Of M R + S - 1
iterations a stage spends S - 1 on nothing: the bubble is the share
(S - 1) / (M R + S - 1) of the time, smaller with more micro-batches and with
more repeats, which cost R times the messages.

There is one program for all devices and no explicit message in it. The stages
are an array axis, `vmap` runs them side by side, and rolling that axis by one
hands every micro-batch on: the compiler makes a collective-permute of it.

For the backward pass each layer stores, for each micro-batch and for each
bubble, what it stores without stages too. Storing only what enters an iteration
would take an eighth less memory under remat = full (57 MB for 65 MB, 8 layers
in 2 stages), and one more forward pass: not worth its while.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from parallel import rules

_STAGE = 'stage'

# (layer_params, x_BTD, shared, key) -> (x_BTD, sums)
ApplyLayer = Callable[..., tuple[jax.Array, Any]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
  """What every stage does in every iteration: [iterations, S] each.

  In iteration t stage s is where stage 0 was s iterations ago, u = t - s.
  Groups of S micro-batches go round together: micro-batch g S + p is in repeat
  r of stage 0 at u = (g R + r) S + p, which is S after repeat r - 1.
  """

  microbatch: np.ndarray  # which one it works on; any one in a bubble
  repeat: np.ndarray
  is_real: np.ndarray  # bool; False in a bubble, whose results go nowhere


def schedule(num_stages: int, repeats: int, num_microbatches: int) -> Schedule:
  """Returns the circular schedule; M is a multiple of S."""
  num_steps = num_microbatches * repeats
  iteration_T1 = np.arange(num_steps + num_stages - 1)[:, None]
  age_TS = iteration_T1 - np.arange(num_stages)[None, :]
  # What a bubble works on does not matter, but that it exists does.
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
  """Returns `run_layers`: the layers of a stack, in stages over the mesh.

  Args:
    mesh: with an axis 'stage' of size S.
    repeats: R, how many times a micro-batch passes every stage.
    num_microbatches: M, how many parts the rows are cut into; a multiple of S.
    policy: what `jax.checkpoint` may store of a layer, where `apply_layer`
      computes the rest again; None where it does not.

  Returns:
    run_layers(apply_layer, stacked_params, x_BTD, shared, key) -> (x_BTD,
    sums). Leaves of `stacked_params` are [N, ...], or [R, N / R, ...] where
    R > 1, split over 'stage' along N or N / R. The first axis of x and of each
    leaf of `shared` is the batch. `sums` has what apply_layer returns beside x,
    added over micro-batches and stacked over layers, [N, ...]. Every layer of
    every micro-batch is given a key of its own, the same for any S and R.

  Raises:
    ValueError: M is no multiple of S, or (from `run_layers`) rows or layers do
      not divide.
  """
  num_stages = mesh.shape[_STAGE]
  if num_microbatches % num_stages:
    raise ValueError(
      f'num_microbatches: got {num_microbatches}, expected a multiple of the'
      f' {num_stages} stages; change parallel.stage_microbatches'
    )
  plan = schedule(num_stages, repeats, num_microbatches)

  def run_layers(apply_layer, stacked_params, x_BTD, shared, key):
    if x_BTD.shape[0] % num_microbatches:
      raise ValueError(
        f'rows: got {x_BTD.shape[0]}, expected a multiple of'
        f' {num_microbatches}, the parts that the stages take them in; change'
        ' data.batch_size or parallel.stage_microbatches'
      )
    run_stages = _make_run_stages(
      apply_layer,
      jax.tree.map(lambda x: _by_stage(x, repeats, num_stages), stacked_params),
      jax.tree.map(lambda x: _deal(x, num_microbatches), shared),
      key,
      policy or _all_but_weights,
    )
    x_MBTD = _deal(x_BTD, num_microbatches)
    # Every stage has a copy of the inputs, of which only the first one's is
    # read, and a place for outputs, of which only the last one's is kept: a
    # single copy would have its gradient, or itself, sent in every iteration.
    inputs_SMBTD = by_stage(
      jnp.broadcast_to(x_MBTD[None], (num_stages, *x_MBTD.shape))
    )
    outputs_SMBTD, sums = _run(run_stages, inputs_SMBTD, plan, by_stage)
    is_last_S = np.arange(num_stages) == num_stages - 1
    x_MBTD = jnp.sum(
      jnp.where(_expand(is_last_S, outputs_SMBTD), outputs_SMBTD, 0), axis=0
    )
    return x_MBTD.swapaxes(0, 1).reshape(x_BTD.shape), sums

  def by_stage(x_SBTD):
    """Lays out axis 0 over the stages and rows, third from last, as ever."""
    spec = (_STAGE, *(None,) * (x_SBTD.ndim - 4), rules.BATCH_AXES, None, None)
    return jax.lax.with_sharding_constraint(
      x_SBTD, NamedSharding(mesh, PartitionSpec(*spec))
    )

  return run_layers


def _run(run_stages, inputs_SMBTD, plan, by_stage):
  """Returns outputs [S, M, ...], of which the last stage's are meant; sums."""
  num_repeats = int(plan.repeat.max()) + 1
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
    # Written on every pass; what counts is what the last one leaves there.
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

  # A bubble computes on real rows: nobody reads its numbers, but a norm of
  # nothing could be infinite, and infinity times no gradient is not zero.
  filler_SBTD = jax.lax.stop_gradient(inputs_SMBTD[:, 0])
  sums_SL = jax.eval_shape(
    run_stages, filler_SBTD, plan.microbatch[0], plan.repeat[0]
  )[1]
  zeros_RSL = jax.tree.map(
    lambda x: jnp.zeros((num_repeats, *x.shape), x.dtype), sums_SL
  )
  # What all must know of the first stage and the last is in numbers of its own:
  # taken from the stages' it would be sent to everyone in every iteration.
  ends = plan.microbatch[:, 0], plan.microbatch[:, -1], plan.repeat[:, 0] == 0
  (_, outputs_SMBTD, sums_RSL), _ = jax.lax.scan(
    iterate,
    (filler_SBTD, jnp.zeros_like(inputs_SMBTD), zeros_RSL),
    (plan, ends),
  )
  return outputs_SMBTD, jax.tree.map(
    lambda x: x.reshape((-1, *x.shape[3:])), sums_RSL
  )


def _make_run_stages(apply_layer, params_RSL, shared_MB, key, policy):
  """Returns (x_SBTD, microbatch_S, repeat_S) -> (x_SBTD, sums_SL)."""
  repeats, num_stages, num_layers = jax.tree.leaves(params_RSL)[0].shape[:3]

  def run_stage(params_RL, x_BTD, stage, microbatch, repeat):
    """One stage: its layers of this repeat, one after the other."""
    shared_B = jax.tree.map(
      lambda x: jax.lax.dynamic_index_in_dim(x, microbatch, keepdims=False),
      shared_MB,
    )

    def apply(params, x_BTD, index):
      layer_key = None
      if key is not None:
        # Of a micro-batch and a layer, whichever stage and time they meet at.
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
    # Weights that were chosen are another array in every iteration. Left to
    # itself JAX would store each for the backward pass: the model M times.
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
  """Of a layer: all that is computed, nothing that is only fetched or cast."""
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
  """Gives each stage what the one before it has; the first, the last's."""
  return jnp.roll(x_SBTD, 1, axis=0)


# A roll's own derivative is two halves, which would be two messages.
_hand_on.defvjp(
  lambda x_SBTD: (_hand_on(x_SBTD), None),
  lambda _, dx_SBTD: (jnp.roll(dx_SBTD, -1, axis=0),),
)


def _by_stage(x, repeats: int, num_stages: int):
  """[N, ...] or [R, N / R, ...] to [R, S, L, ...]."""
  per_layer = x.shape[1:] if repeats == 1 else x.shape[2:]
  return x.reshape((repeats, num_stages, -1, *per_layer))


def _deal(x, num_parts: int):
  """[B, ...] to [M, B / M, ...]: dealt out one by one.

  Where rows are laid out over devices each keeps its own; nothing is moved.
  """
  return x.reshape((-1, num_parts, *x.shape[1:])).swapaxes(0, 1)


def _expand(x, like):
  """Appends axes of size 1, up to those of `like`."""
  return x.reshape(x.shape + (1,) * (like.ndim - x.ndim))
