"""Checkpoints of a run: what it needs to go on as if it had never stopped.

A checkpoint is a directory that is sealed (`frozen/seals.py`). It has an item
of orbax for each tree of a `TrainState` (params, optimizer state, ...), so that
freezing reads the weights alone, and progress.json: step, PRNG key, state of
the data iterator, and what the run has cost so far.

`training/checkpoints/saving.py` writes one, in a thread. Here is which there
are: a run goes on from the newest that is whole, and one that is not is moved
aside, with a word on what is wrong with which file. A save that fails, in any
process and for any reason, fails in all of them, and does no harm to other
checkpoints: nothing is deleted before what replaces it is sealed.

What is written does not depend on how many processes there were: any other
number of them, or of devices, goes on from it.
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
from storage import layout
from training import experiment, state as state_lib
from training.checkpoints import retention, saving


@dataclasses.dataclass(kw_only=True)
class Progress:
  """What a checkpoint holds besides arrays, as JSON values."""

  tokens_seen: int = 0  # targets that were trained on
  training_flops: float = 0.0  # analytic, see models/flops.py
  train_seconds: float = 0.0  # wall time in steps; not compiling or saving
  data_state: dict[str, Any] | None = None  # of the data iterator


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
  """How a save ended."""

  step: int
  error: str = ''  # empty: it is sealed
  blocked_seconds: float  # of the loop, with the wait for the one before
  seconds: float  # from its start until it was sealed, or had failed
  num_bytes: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extras:
  """What else `Checkpoints.save` is told."""

  eval_loss: float | None = None  # of this very step, if it was evaluated
  evaluation_owed: bool = False  # it was due, and cut short
  before_seal: Callable[[], None] = lambda: None  # in the first process
  done: Callable[[Outcome], None] = lambda outcome: None  # called by a thread


class MismatchError(ValueError):
  """A checkpoint that holds other arrays than a run has."""


class Checkpoints:
  """The checkpoints of one workdir. Of several processes, the same in each."""

  def __init__(
    self,
    workdir: pathlib.Path,
    config: experiment.CheckpointConfig,
    identity: Mapping[str, Any] | None = None,
  ):
    """Looks, and changes nothing.

    Args:
      workdir: of the run.
      config: what to keep.
      identity: of the run, see `seals.identity`; others are refused.
    """
    self._root = workdir.absolute() / layout.CHECKPOINTS
    self._config = config
    self._identity = dict(identity or {})
    self._seals: dict[int, seals.Seal] = {}  # of what can be gone back to
    self._thread: threading.Thread | None = None
    self._channel = processes.Channel('save')
    self._handler = ocp.StandardCheckpointHandler()

  def newest_step(self) -> int | None:
    """Returns the step of the newest checkpoint, verified or not, or None."""
    found = seals.steps(self._root)
    return found[-1] if found else None

  def newest_owes(self) -> bool:
    """Returns whether the newest one is not all that there is to its step."""
    step = self.newest_step()
    try:
      return (
        step is not None and seals.read(self._root / str(step)).evaluation_owed
      )
    except (seals.DamagedError, OSError):
      return True

  def latest_step(self) -> int | None:
    """Returns the step of the newest checkpoint to go on from, or None."""
    return max(self._seals, default=None)

  def finished_step(self) -> int | None:
    """Returns the latest step when the save in flight has ended."""
    self.wait()
    return self.latest_step()

  @property
  def evaluation_owed(self) -> bool:
    """Whether the latest one is of a step whose evaluation was cut short."""
    step = self.latest_step()
    return step is not None and self._seals[step].evaluation_owed

  def recover(self, tell: Callable[[str], None] = lambda text: None) -> None:
    """Finds the newest checkpoint that is whole; moves newer ones aside.

    A collective: processes share the reading, and agree. Changes nothing if it
    raises.

    Args:
      tell: is told what is wrong with which file, and what was done.

    Raises:
      ValueError: one is of another run, or all of them are damaged.
    """
    # As the first sees them: a network file system may show others less.
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
        f' going on from step {good}'
      )
    with processes.together('checkpoints'):
      if processes.is_first():
        seals.remove_unfinished(self._root)
      for step in steps:
        if good is not None and step <= good:
          self._remember(step)

  def _problems(self, step: int) -> str:
    """Returns what is wrong with a checkpoint, in all processes the same."""
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
      # An old one, which nobody asked for: found out if it is ever needed.
      return

  def save(
    self,
    state: state_lib.TrainState,
    progress: Progress,
    extras: Extras | None = None,
  ) -> None:
    """Starts to save; the copy off the device is done when it returns.

    Waits for the save before this one. Never raises for one that fails: see
    `Extras.done`, and `latest_step` after `wait`.

    Args:
      state: whole, see `parallel.placement.Placement.whole`.
      progress: of the same step.
      extras: what else there is to say.
    """
    extras = extras or Extras()
    entered = time.monotonic()
    self.wait()
    step = int(state.step)
    if step == self.latest_step():
      return
    started = time.monotonic()
    save = saving.Save(
      root=self._root,
      step=step,
      handler=self._handler,
      channel=self._channel,
      before_seal=extras.before_seal,
    )
    # A failure here is told to the others by the thread.
    save.start(_items(state), _progress(state, progress))
    seal = seals.Seal(
      step=step,
      identity=self._identity,
      leaves={k: _describe(tree) for k, tree in _items(state).items()},
      libraries={
        'jax': jax.__version__,
        'orbax-checkpoint': importlib.metadata.version('orbax-checkpoint'),
      },
      eval_loss=extras.eval_loss,
      evaluation_owed=extras.evaluation_owed,
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
      seconds = time.monotonic() - started
      extras.done(dataclasses.replace(outcome, seconds=seconds))

    self._thread = threading.Thread(target=finish, name='save')
    self._thread.start()

  def _delete_others(self) -> None:
    losses = {step: seal.eval_loss for step, seal in self._seals.items()}
    kept = retention.kept(losses, self._config)
    # Replaced, not changed: the loop may be looking at it.
    self._seals = {step: self._seals[step] for step in kept}
    for step in losses.keys() - kept:
      if processes.is_first():
        # Renamed first: half a directory must not look like a checkpoint.
        doomed = self._root / f'{step}{layout.DELETED}'
        (self._root / str(step)).rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)

  def mark_evaluated(self, step: int, eval_loss: float) -> None:
    """Adds the loss of an evaluation that a checkpoint still owed.

    Raises:
      OSError: it could not be written; the evaluation stays owed.
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
    """Returns the newest state and its progress.

    Args:
      abstract_state: shapes, dtypes and shardings of a whole state.

    Raises:
      MismatchError: the checkpoint holds other names, shapes or dtypes.
    """
    step = self.latest_step()
    assert step is not None, 'nothing to restore'
    seal, directory = self._seals[step], self._root / str(step)
    wanted = _items(abstract_state)
    # An average that was not kept before begins with the weights of here.
    sources = {name: name for name in wanted}
    if 'average' not in seal.leaves:
      sources['average'] = 'params'
    leaves = {name: seal.leaves.get(sources[name], {}) for name in wanted}
    # Orbax casts to the wanted dtype without a word.
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
        (directory / layout.PROGRESS).read_text(encoding='utf-8')
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

  def wait(self) -> None:
    """Returns when the save that was started has ended, well or not."""
    if self._thread is not None:
      self._thread.join()
      self._thread = None

  def close(self) -> None:
    """Waits for the save."""
    self.wait()


def _items(state: state_lib.TrainState) -> dict[str, Any]:
  """Returns the trees of a state by name; the rest is in progress.json."""
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
          ' experiment is another one: set it back or use another --workdir'
        )


def _place(value: jax.Array, sharding: jax.sharding.Sharding) -> jax.Array:
  # device_put refuses devices of other processes.
  return jax.jit(lambda x: x, out_shardings=sharding)(value)
