"""What a run does now and then besides training: evaluate, and save.

`training/run.py` hands these to the loop as hooks.
"""

from collections.abc import Callable
import time
from typing import NamedTuple

import jax

from parallel import processes
from training import (
  assemble,
  experiment as experiment_lib,
  loop,
  state as state_lib,
)
from training.checkpoints import checkpoint, saving
from training.evaluation import model_port, tasks, validation
from training.lifecycle import interrupt
from training.optimizer import average
from training.reporting import metrics

# Between attempts at the last save of a run, which is not given up lightly.
_PAUSES_S = (1.0, 5.0, 15.0)
_PAUSES_WHEN_STOPPED_S = (1.0, 5.0)


class Outlets(NamedTuple):
  """Where a run is told of."""

  log: metrics.Log
  terminal: metrics.Terminal


class WithEpochs:
  """A log that says, with every speed, how often each source was trained."""

  def __init__(
    self, log: metrics.Log, epochs: Callable[[int], dict[str, float]]
  ):
    self._log = log
    self._epochs = epochs  # of each source after so many steps

  def write(self, kind: str, step: int, values: dict[str, float]) -> None:
    """Adds one record."""
    if kind == 'speed':
      epochs = self._epochs(step).items()
      values = values | {f'epochs/{name}': value for name, value in epochs}
    self._log.write(kind, step, values)

  def sync(self) -> None:
    """Returns when all records are on disk."""
    self._log.sync()

  def close(self) -> None:
    """Adds no more."""
    self._log.close()


class Keeper:
  """The two hooks of a run: evaluates, and saves with what it evaluated."""

  def __init__(
    self,
    experiment: experiment_lib.Experiment,
    parts: assemble.Parts,
    saved: checkpoint.Checkpoints,
    progress: checkpoint.Progress,
    reporter: loop.Reporter,
    stop: interrupt.Interrupt,
    outlets: Outlets,
  ):
    self._parts = parts
    self._saved = saved
    self._before = progress  # what earlier starts of this run had done
    self._reporter = reporter
    self._stop = stop
    self._log, self._terminal = outlets
    self._max_eval_batches = experiment.eval_batches
    self._eval_step = parts.learner.compile_eval_step()
    self._tasks_every = experiment.evals.every_steps
    self._num_steps = experiment.num_steps
    self._has_bos = experiment.data.has_bos
    self._scorer = model_port.Scorer(parts.learner)
    # Of the weights that `freeze.weights` asks for: it decides which is best.
    self._best_by = (
      'loss' if experiment.freeze.weights == 'raw' else 'average_loss'
    )
    self._average = average.reader(
      experiment.optimizer.rule, experiment.ema_decay
    )
    self._place_average = parts.learner.placement.compile_weights(
      self._average or (lambda state: state.params)
    )
    self._last_eval: tuple[int, float] | None = None
    self._owed_at: int | None = None
    self._first_step = saved.latest_step() or 0
    self._last_step: int | None = None
    self._has_warned = False

  def evaluate(self, step: int, state: state_lib.TrainState) -> bool:
    """Records the validation loss of `state`; returns whether to stop.

    Where the run keeps an average of its weights, its loss is told besides.
    Tasks are measured with the weights that will be frozen.

    An evaluation that a signal cuts short is owed: the state is saved, and the
    run that goes on from there evaluates it before it takes a step.
    """
    try:
      values, frozen = self._evaluate(state.params, state), state.params
      if self._average is not None:
        average_params = self._place_average(state)
        averaged = self._evaluate(average_params, state)
        values |= {f'average_{k}': value for k, value in averaged.items()}
        if self._best_by != 'loss':
          frozen = average_params
      measured = self._measure(step, frozen)
    except validation.Stopped:
      self._owed_at = step
      self.save(step, state)
      return True
    self._log.write('eval', step, values | measured)
    self._last_eval = step, values.get(self._best_by, values['loss'])
    self._terminal.say(f'step {step}: {validation.report(values)}')
    if measured:
      self._terminal.say(f'step {step}: {tasks.report(measured)}')
    return False

  def _measure(self, step: int, params) -> dict[str, float]:
    """Returns what the tasks that are due give."""
    is_due = (
      step == self._num_steps
      or not self._tasks_every
      or step % self._tasks_every == 0
    )
    if not self._parts.tasks or not is_due:
      return {}
    return tasks.measure(
      self._parts.tasks,
      self._scorer,
      params,
      self._parts.tokenizer,
      has_bos=self._has_bos,
      should_stop=self._stop.between_batches(),
    )

  def _evaluate(self, params, state) -> dict[str, float]:
    frozen = () if state.frozen_params is None else (state.frozen_params,)
    return validation.evaluate(
      lambda params, batch: self._eval_step(params, batch, *frozen),
      params,
      self._parts.eval_batches,
      put_batch=self._parts.learner.placement.put_batch,
      num_bytes_V=self._parts.tokenizer.num_bytes_V(),
      max_batches=self._max_eval_batches,
      should_stop=self._stop.between_batches(),
    )

  def evaluate_owed(self, step: int, state: state_lib.TrainState) -> bool:
    """Does the evaluation that the checkpoint `state` is from still owed.

    Returns whether to stop.
    """
    if self.evaluate(step, state):
      return True
    assert self._last_eval is not None
    try:
      self._log.sync()
      self._saved.mark_evaluated(step, self._last_eval[1])
    except OSError as error:
      # Then it is done once more, should the run ever be resumed from here.
      self._terminal.say(f'step {step}: got {error}, evaluation not recorded')
    return False

  def save(self, step: int, state: state_lib.TrainState) -> None:
    """Starts to save a checkpoint of `state`."""
    evaluated_at, loss = self._last_eval or (None, None)
    tokens_seen = self._before.tokens_seen + self._reporter.tokens_seen
    self._last_step = step
    whole = self._parts.learner.placement.whole(state)
    if self._average is not None and whole.average is None:
      whole = whole.replace(average=jax.jit(self._average)(whole))
    self._saved.save(
      whole,
      checkpoint.Progress(
        tokens_seen=tokens_seen,
        training_flops=tokens_seen * self._parts.learner.flops_per_token,
        train_seconds=self._before.train_seconds + self._reporter.train_seconds,
        data_state=self._parts.batches.get_state(),
      ),
      checkpoint.Extras(
        eval_loss=loss if evaluated_at == step else None,
        evaluation_owed=self._owed_at == step,
        # Or a checkpoint could be ahead of the metrics for good.
        before_seal=self._log.sync,
        done=self._tell(step),
      ),
    )

  def finish(self, state: state_lib.TrainState) -> None:
    """Returns when the last step is saved; a save that failed is repeated.

    Args:
      state: after the last step.

    Raises:
      saving.SaveError: it cannot be saved.
    """
    step = self._last_step
    if step is None:
      return
    is_stopped = bool(self._stop.exit_code)
    for pause in (*(_PAUSES_WHEN_STOPPED_S if is_stopped else _PAUSES_S), None):
      self._saved.wait()
      if self._saved.latest_step() == step:
        return
      if pause is not None:
        self._terminal.say(f'step {step}: saving again in {pause:g} s')
        time.sleep(pause)
        self.save(step, state)
    raise saving.SaveError(
      f'step {step}, the last one: got no checkpoint of it, expected one; make'
      ' room where --workdir is, or make it writable, and start again: the run'
      f' goes on from {self._last_good()}'
    )

  def _last_good(self) -> str:
    step = self._saved.latest_step()
    return 'its start, nothing was saved' if step is None else f'step {step}'

  def _tell(self, step: int) -> Callable[[checkpoint.Outcome], None]:
    """Returns what is called with the outcome of a save, by its thread."""
    # Asked now: the clock is the loop's.
    num_steps = max(step - self._first_step, 1)
    seconds_per_step = self._reporter.train_seconds / num_steps

    def tell(outcome: checkpoint.Outcome) -> None:
      self._log.write(
        'save',
        step,
        {
          'saved': int(not outcome.error),
          'seconds': outcome.seconds,
          'blocked_seconds': outcome.blocked_seconds,
          'bytes': outcome.num_bytes,
        },
      )
      if outcome.error:
        self._terminal.say(
          f'step {step}: the checkpoint was not saved: got {outcome.error}; it'
          f' is tried again when the next one is due, and until then the run'
          f' can be resumed from {self._last_good()}'
        )
      else:
        self._warn_of_grace(seconds_per_step + outcome.seconds)

    return tell

  def _warn_of_grace(self, seconds: float) -> None:
    if processes.count() > 1:
      seconds += interrupt.SECONDS_BETWEEN_QUESTIONS
    if self._has_warned or seconds <= self._stop.grace_s:
      return
    self._has_warned = True
    self._terminal.say(
      f'warning: a step and a save take {seconds:.0f} s, more than the'
      f' {self._stop.grace_s:g} s of checkpoint.grace_s: on SIGTERM the run may'
      ' be killed before it has saved; ask the cluster for more time'
    )
