"""Checkpoints: everything that a run needs to continue as if never stopped.

A checkpoint is a sealed directory (`frozen/seals.py`). It has an orbax item for
each tree of a `TrainState` (params, optimizer state, ...), so that freezing can
read the weights alone. progress.json has the step, the PRNG key, the position
in the data and the cost of the run so far.

`training/checkpoints/saving.py` writes a checkpoint in a thread. This module
decides which checkpoint a run resumes from, and which ones are kept:

- A run resumes from the newest checkpoint that is whole. A damaged one is set
  aside, and an error line names the damaged file and the damage.
- A save that fails in one process fails in all of them. It does no harm to
  other checkpoints: nothing is deleted before its replacement is sealed.
- The contents do not depend on the number of processes: a run may resume with
  any other number of processes or devices.
"""

from collections.abc import Callable, Mapping
import dataclasses
import importlib.metadata
import json
import pathlib
import shutil
import threading
import time
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from frozen import seals
from parallel import processes
from storage import file_names
from training import experiment, state as state_lib
from training.checkpoints import saving


@dataclasses.dataclass(kw_only=True)
class Progress:
  """The part of a checkpoint that is not arrays, as JSON values."""

  tokens_seen: int = 0  # targets that were trained on
  training_flops: float = 0.0  # analytic, see models/flops.py
  train_seconds: float = 0.0  # wall time in steps; not compiling or saving
  data_state: dict[str, Any] | None = None  # state of the data iterator


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
  """The result of one save."""

  step: int
  error: str = ''  # empty: the checkpoint is sealed
  blocked_seconds: float  # the loop waited, also for the save before this one
  seconds: float  # from the start of the save to its end
  num_bytes: int = 0
  latest_step: int | None = None  # newest checkpoint after this save


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resume:
  """The checkpoint that a run resumes from."""

  step: int = 0  # 0: there is none, the run starts
  # Its step was due for an evaluation, which a signal cut short.
  evaluation_owed: bool = False


class MismatchError(ValueError):
  """A checkpoint whose arrays do not fit the run."""


class Checkpoints:
  """The checkpoints of one workdir; the same in every process of a run."""

  def __init__(
    self,
    workdir: pathlib.Path,
    config: experiment.CheckpointConfig,
    identity: Mapping[str, Any] | None = None,
  ):
    """Creates the object; reads and changes nothing on disk.

    Args:
      identity: identity of the run, see `seals.identity`. Checkpoints of
        another run are refused.
    """
    self._root = workdir.absolute() / file_names.CHECKPOINTS
    self._config = config
    self._identity = dict(identity or {})
    self._seals: dict[int, seals.Seal] = {}  # usable checkpoints, by step
    self._thread: threading.Thread | None = None
    self._channel = processes.Channel('save')
    self._handler = ocp.StandardCheckpointHandler()

  def peek(self) -> Resume:
    """Returns the newest checkpoint without verifying it; changes nothing."""
    found = seals.steps(self._root)
    if not found:
      return Resume()
    try:
      seal = seals.read(self._root / str(found[-1]))
    except (seals.DamagedError, OSError):
      # The damage is reported by `open`, which verifies.
      return Resume(step=found[-1], evaluation_owed=True)
    return Resume(step=found[-1], evaluation_owed=seal.evaluation_owed)

  def open(self, tell: Callable[[str], None] = lambda text: None) -> Resume:
    """Returns the newest checkpoint that is whole; sets damaged ones aside.

    A collective: all processes call it, share the reading, and agree. It
    changes no checkpoint if it raises.

    Raises:
      ValueError: a checkpoint belongs to another run, or all are damaged.
    """
    with processes.together('checkpoints'):
      if processes.is_first():
        seals.restore_replaced(self._root)
    # The first process decides: on a network file system, another process may
    # see older directory contents.
    steps = json.loads(
      self._channel.gather(json.dumps(seals.steps(self._root)))[0]
    )
    good, damaged = None, []
    for step in reversed(steps):
      wrong = self._problems(step)
      if not wrong:
        good = step
        break
      damaged.append((step, wrong))
    if good is None and (damaged or seals.set_aside(self._root)):
      raise ValueError(self._nothing_left(damaged))
    for step, wrong in damaged:
      with processes.together('damaged checkpoints'):
        place = self._root / f'{step}'
        if processes.is_first():
          place = seals.move_aside(self._root, step)
      tell(
        f'checkpoint of step {step} is damaged: {wrong}. Moved to {place.name},'
        f' resuming from step {good}'
      )
    with processes.together('checkpoints'):
      if processes.is_first():
        seals.remove_unfinished(self._root)
      for step in steps:
        if good is not None and step <= good:
          self._remember(step)
    if good is None:
      return Resume()
    return Resume(step=good, evaluation_owed=self._seals[good].evaluation_owed)

  def _problems(self, step: int) -> str:
    """Returns the damage of a checkpoint as text; the same in all processes.

    Raises:
      ValueError: the checkpoint belongs to another run, or has another version.
    """
    directory = self._root / str(step)
    stranger = ''
    try:
      seal = seals.read(directory)
      part = processes.index(), processes.count()
      wrong = '; '.join(seals.problems(directory, seal, part=part))
      try:
        seals.check_owner(directory, seal, self._identity)
      except ValueError as error:
        stranger = str(error)
    except (seals.DamagedError, OSError) as error:
      wrong = str(error)
    except seals.VersionError as error:
      wrong, stranger = '', str(error)
    told = [json.loads(t) for t in self._channel.gather(
      json.dumps([wrong, stranger])
    )]  # fmt: skip
    found = [text for text, _ in told if text]
    if not found and any(text for _, text in told):
      raise ValueError(next(text for _, text in told if text))
    return found[0] if found else ''

  def _nothing_left(self, damaged) -> str:
    what = '; '.join(f'step {step}: {wrong}' for step, wrong in damaged)
    return (
      f'{self._root}: got no checkpoint that is whole'
      f' ({what or ", ".join(seals.set_aside(self._root))}), expected at least'
      ' one; put a good copy there, or start over: delete this directory, or'
      ' use another --workdir'
    )

  def _remember(self, step: int) -> None:
    try:
      self._seals[step] = seals.read(self._root / str(step))
    except seals.DamagedError:
      # An older checkpoint. The damage is reported if the run resumes from it.
      return

  def save(
    self,
    state: state_lib.TrainState,
    progress: Progress,
    *,
    eval_loss: float | None = None,
    evaluation_owed: bool = False,
    before_seal: Callable[[], None] = lambda: None,
    done: Callable[[Outcome], None] = lambda outcome: None,
  ) -> None:
    """Starts a save; the copy off the devices is done when this returns.

    Waits for the save before this one. A save that fails raises nothing here:
    `done` receives its error.

    Args:
      state: whole, see `parallel.placement.Placement.whole`.
      eval_loss: validation loss of this step, if it was evaluated.
      evaluation_owed: whether an evaluation of this step was cut short.
      before_seal: called in the first process when all arrays are written. If
        it raises, the save fails.
      done: called by the thread of the save with its outcome.
    """
    entered = time.monotonic()
    self.wait()
    step = int(state.step)
    if step == self._latest_step():
      return
    started = time.monotonic()
    save = saving.Save(
      root=self._root,
      step=step,
      handler=self._handler,
      channel=self._channel,
      before_seal=before_seal,
    )
    # A failure here reaches the other processes through the save's thread.
    save.start(_items(state), _progress(state, progress))
    seal = seals.Seal(
      step=step,
      identity=self._identity,
      leaves={k: _describe(tree) for k, tree in _items(state).items()},
      libraries={
        'jax': jax.__version__,
        'orbax-checkpoint': importlib.metadata.version('orbax-checkpoint'),
      },
      eval_loss=eval_loss,
      evaluation_owed=evaluation_owed,
      files={},
    )
    blocked = time.monotonic() - entered

    def finish():
      outcome = Outcome(step=step, blocked_seconds=blocked, seconds=0.0)
      try:
        sealed = save.finish(seal)
        self._seals = {**self._seals, step: sealed}
        num_bytes = sum(e.num_bytes or 0 for e in sealed.files.values())
        outcome = dataclasses.replace(outcome, num_bytes=num_bytes)
        self._delete_others()
      except Exception as error:
        if step not in self._seals:
          outcome = dataclasses.replace(outcome, error=str(error))
      done(
        dataclasses.replace(
          outcome,
          seconds=time.monotonic() - started,
          latest_step=self._latest_step(),
        )
      )

    self._thread = threading.Thread(target=finish, name='save')
    self._thread.start()

  def _delete_others(self) -> None:
    losses = {step: seal.eval_loss for step, seal in self._seals.items()}
    kept = steps_to_keep(losses, self._config)
    # A new dict: another thread may be reading the old one.
    self._seals = {step: self._seals[step] for step in kept}
    for step in losses.keys() - kept:
      if processes.is_first():
        # Renamed first: a half deleted directory must not look like a
        # checkpoint.
        doomed = self._root / f'{step}{file_names.DELETED}'
        (self._root / str(step)).rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)

  def mark_evaluated(self, step: int, eval_loss: float) -> None:
    """Adds the loss of an evaluation that the checkpoint still owed.

    Raises:
      OSError: the seal could not be written; the evaluation stays owed.
    """
    seal = dataclasses.replace(
      self._seals[step], eval_loss=eval_loss, evaluation_owed=False
    )
    if processes.is_first():
      seals.write(self._root / str(step), seal)
    self._seals[step] = seal

  def restore(
    self, abstract_state: state_lib.TrainState
  ) -> tuple[state_lib.TrainState, Progress]:
    """Returns the state and the progress of the newest checkpoint.

    Raises:
      MismatchError: the checkpoint has other names, shapes or dtypes.
    """
    step = self._latest_step()
    assert step is not None, 'nothing to restore'
    seal, directory = self._seals[step], self._root / str(step)
    wanted = _items(abstract_state)
    # A run that did not average its weights so far starts the average with the
    # weights of this checkpoint.
    sources = {name: name for name in wanted}
    if 'average' not in seal.leaves:
      sources['average'] = 'params'
    leaves = {name: seal.leaves.get(sources[name], {}) for name in wanted}
    # Compared first: orbax casts silently to the wanted dtype.
    _check_leaves(step, leaves, {k: _describe(v) for k, v in wanted.items()})
    restored = {}
    with processes.together('restoring'):
      for name, tree in wanted.items():
        restored[name] = self._handler.restore(
          epath.Path(directory / sources[name]),
          args=ocp.args.StandardRestore(tree),
        )
        _check_leaves(
          step, {name: _describe(restored[name])}, {name: leaves[name]}
        )
      fields = json.loads(
        (directory / file_names.PROGRESS).read_text(encoding='utf-8')
      )
    key = jax.random.wrap_key_data(
      jnp.asarray(fields.pop('key_data'), jnp.uint32),
      impl=fields.pop('key_impl'),
    )
    state = dataclasses.replace(
      abstract_state,
      step=_place(
        jnp.asarray(fields.pop('step'), jnp.int32), abstract_state.step.sharding
      ),
      key=_place(key, abstract_state.key.sharding),
      **restored,
    )
    return state, Progress(**fields)

  def wait(self) -> int | None:
    """Waits for a save in flight; returns the step of the newest checkpoint."""
    if self._thread is not None:
      self._thread.join()
      self._thread = None
    return self._latest_step()

  def close(self) -> None:
    """Waits for the save that was started."""
    self.wait()

  def _latest_step(self) -> int | None:
    return max(self._seals, default=None)


def steps_to_keep(
  eval_losses: Mapping[int, float | None], config: experiment.CheckpointConfig
) -> set[int]:
  """Returns the steps whose checkpoints are kept.

  Args:
    eval_losses: validation loss by step; None: the step was not evaluated.
    config: how many of the latest and of the best are kept.
  """
  steps = sorted(eval_losses)
  evaluated = {
    step: loss for step, loss in eval_losses.items() if loss is not None
  }
  # Of equal losses the latest step wins: its checkpoint is kept for resuming
  # anyway.
  best = sorted(evaluated, key=lambda step: (evaluated[step], -step))
  chosen = {*steps[-config.keep_latest :], *best[: config.keep_best]}
  if config.keep_every_steps:
    chosen |= {step for step in steps if step % config.keep_every_steps == 0}
  return chosen


def _items(state: state_lib.TrainState) -> dict[str, Any]:
  """Returns the trees of a state by name; progress.json has the rest."""
  fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
  return {
    name: tree
    for name, tree in fields.items()
    if name not in ('step', 'key', 'frozen_params') and tree is not None
  }


def _progress(state: state_lib.TrainState, progress: Progress):
  return {
    'step': int(state.step),
    'key_data': jax.random.key_data(state.key).tolist(),
    'key_impl': str(jax.random.key_impl(state.key)),
    **dataclasses.asdict(progress),
  }


def _describe(tree: Any) -> dict[str, str]:
  """Returns dtype and shape of every leaf, by path."""
  return {
    jax.tree_util.keystr(path): f'{leaf.dtype}{list(leaf.shape)}'
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _check_leaves(
  step: int,
  got: Mapping[str, Mapping[str, str]],
  expected: Mapping[str, Mapping[str, str]],
) -> None:
  """Compares descriptions of items.

  Raises:
    MismatchError: names the first leaf that differs.
  """
  for item in expected:
    found, wanted = got.get(item, {}), expected[item]
    if item == 'opt_state' and found != wanted:
      dtypes = [
        ', '.join(sorted({x.split('[')[0] for x in leaves if '[]' not in x}))
        for leaves in (found.values(), wanted.values())
      ]
      if found.keys() == wanted.keys() and dtypes[0] != dtypes[1]:
        raise MismatchError(
          f'checkpoint of step {step}, optimizer state: got {dtypes[0]},'
          f' expected {dtypes[1]}; set optimizer.rule.state_dtype back or use'
          ' another --workdir'
        )
    for name in sorted(found.keys() | wanted.keys()):
      if found.get(name) != wanted.get(name):
        raise MismatchError(
          f'checkpoint of step {step}, {item}{name}: got'
          f' {found.get(name, "nothing")}, expected'
          f' {wanted.get(name, "nothing")}; the model or optimizer of this'
          ' experiment is another one, or another version of this code saved'
          ' the checkpoint: set it back or use another --workdir'
        )


def _place(value: jax.Array, sharding: jax.sharding.Sharding) -> jax.Array:
  # jit, because device_put refuses devices of other processes.
  return jax.jit(lambda x: x, out_shardings=sharding)(value)
