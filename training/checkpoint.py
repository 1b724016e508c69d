"""Checkpoints of a run: what it needs to go on as if it had never stopped.

Orbax, asynchronous, kept by policy. Params and optimizer are separate items, so
that freezing reads the params alone; the third item, `progress`, is JSON: step,
PRNG key, state of the data iterator, and what the run has cost so far.

Of several processes each writes the shards of its own devices, and the first
one the rest. What is written does not depend on how many there were: any other
number of processes, or of devices, goes on from it.
"""

import dataclasses
import pathlib
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from parallel import processes
from training import config as config_lib, state as state_lib

DIRECTORY = 'checkpoints'
_METRIC = 'eval_loss'


@dataclasses.dataclass(kw_only=True)
class Progress:
  """What a checkpoint holds besides params and optimizer, as JSON values."""

  tokens_seen: int = 0  # targets that were trained on
  training_flops: float = 0.0  # analytic, see models/flops.py
  train_seconds: float = 0.0  # wall time in steps; not compiling or saving
  data_state: dict[str, Any] | None = None  # of the grain iterator


class Checkpoints:
  """The checkpoints of one workdir: a thin face of orbax's manager."""

  def __init__(
    self, workdir: pathlib.Path, config: config_lib.CheckpointConfig
  ):
    policies = ocp.checkpoint_managers
    keep: list[Any] = [policies.LatestN(config.keep_latest)]
    if config.keep_best:
      keep.append(
        policies.BestN(
          get_metric_fn=lambda metrics: metrics[_METRIC],
          reverse=True,  # the lowest loss is the best
          n=config.keep_best,
          keep_checkpoints_without_metrics=False,
        )
      )
    if config.keep_every_steps:
      keep.append(policies.EveryNSteps(config.keep_every_steps))
    directory = workdir.absolute() / DIRECTORY
    directory.mkdir(parents=True, exist_ok=True)
    if processes.is_first():
      _remove_unfinished(directory)
    processes.barrier('no unfinished checkpoints')
    self._manager = ocp.CheckpointManager(
      directory,
      options=ocp.CheckpointManagerOptions(
        enable_async_checkpointing=True,
        preservation_policy=policies.AnyPreservationPolicy(keep),
        save_decision_policy=policies.FixedIntervalPolicy(1),
        # Without it orbax keeps metrics in memory only, and forgets after a
        # restart which checkpoint was the best.
        best_fn=lambda metrics: metrics[_METRIC],
        best_mode='min',
      ),
    )

  def latest_step(self) -> int | None:
    """Returns the step of the newest complete checkpoint, or None."""
    return self._manager.latest_step()

  def save(
    self,
    state: state_lib.TrainState,
    progress: Progress,
    eval_loss: float | None = None,
  ) -> None:
    """Starts to save; the copy off the device is done when it returns.

    Args:
      state: whole, see `parallel.placement.Placement.whole`.
      progress: of the same step.
      eval_loss: validation loss of this very step, if it was evaluated.
    """
    step = int(state.step)
    if step == self.latest_step():
      return
    saved = self._manager.save(
      step,
      args=ocp.args.Composite(
        params=ocp.args.StandardSave(state.params),
        opt_state=ocp.args.StandardSave(state.opt_state),
        progress=ocp.args.JsonSave(
          {
            'step': step,
            'key_data': jax.random.key_data(state.key).tolist(),
            'key_impl': str(jax.random.key_impl(state.key)),
            **dataclasses.asdict(progress),
          }
        ),
      ),
      metrics=None if eval_loss is None else {_METRIC: eval_loss},
    )
    if not saved:
      # Orbax returns False, and says nothing, for a step it takes for old.
      raise RuntimeError(
        f'checkpoint of step {step} was not saved: got latest step'
        f' {self.latest_step()}, expected an earlier one'
      )

  def restore(
    self, abstract_state: state_lib.TrainState
  ) -> tuple[state_lib.TrainState, Progress]:
    """Returns the newest state and its progress.

    Args:
      abstract_state: shapes, dtypes and shardings of a whole state.

    Raises:
      ValueError: the checkpoint holds other shapes or dtypes.
    """
    step = self.latest_step()
    self._check_dtypes(step, abstract_state)
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        params=ocp.args.StandardRestore(abstract_state.params),
        opt_state=ocp.args.StandardRestore(abstract_state.opt_state),
        progress=ocp.args.JsonRestore(),
      ),
    )
    fields = dict(restored['progress'])
    key = jax.random.wrap_key_data(
      jnp.asarray(fields.pop('key_data'), jnp.uint32),
      impl=fields.pop('key_impl'),
    )
    state = state_lib.TrainState(
      step=_place(
        jnp.asarray(fields.pop('step'), jnp.int32), abstract_state.step.sharding
      ),
      params=restored['params'],
      opt_state=restored['opt_state'],
      key=_place(key, abstract_state.key.sharding),
    )
    return state, Progress(**fields)

  def wait(self) -> None:
    """Returns when every save that was started is on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits for the saves and stops their threads."""
    self._manager.close()

  def _check_dtypes(self, step, abstract_state):
    # Orbax casts to the wanted dtype without a word.
    directory = self._manager.directory / str(step)
    with ocp.StandardCheckpointer() as checkpointer:
      found = checkpointer.metadata(directory / 'params').item_metadata.tree
      moments = checkpointer.metadata(directory / 'opt_state').item_metadata
    wanted = jax.tree_util.tree_leaves_with_path(abstract_state.params)
    found = {
      jax.tree_util.keystr(name): leaf
      for name, leaf in jax.tree_util.tree_leaves_with_path(found)
    }
    for path, leaf in wanted:
      name = jax.tree_util.keystr(path)
      got = found.get(name)
      if got is None or (got.shape, got.dtype) != (leaf.shape, leaf.dtype):
        what = 'nothing' if got is None else f'{got.dtype}{list(got.shape)}'
        raise ValueError(
          f'checkpoint of step {step}, parameter {name}: got {what}, expected'
          f' {leaf.dtype}{list(leaf.shape)}; the model of this experiment is'
          ' another one: use another --workdir'
        )
    # Its tree is saved without the names of optax's tuples.
    got, expected = (
      {
        jnp.dtype(leaf.dtype).name
        for leaf in jax.tree.leaves(tree)
        if leaf.shape
      }
      for tree in (moments.tree, abstract_state.opt_state)
    )
    if got != expected:
      raise ValueError(
        f'checkpoint of step {step}, optimizer state: got'
        f' {", ".join(sorted(got))}, expected {", ".join(sorted(expected))};'
        ' set optimizer.state_dtype back or use another --workdir'
      )


def _place(value: jax.Array, sharding: jax.sharding.Sharding) -> jax.Array:
  # device_put refuses devices of other processes.
  return jax.jit(lambda x: x, out_shardings=sharding)(value)


def _remove_unfinished(directory: pathlib.Path) -> None:
  """Deletes what a killed save left behind; orbax lists but never clears it."""
  for path in directory.glob('*.orbax-checkpoint-tmp*'):
    epath.Path(path).rmtree()
