"""The saver of a run: writes checkpoints between steps, and the last one."""

from collections.abc import Callable
import time

import jax

from parallel import processes
from storage import disk
from training import assemble, experiment as experiment_lib, state as state_lib
from training.checkpoints import checkpoint
from training.evaluation import evaluator as evaluator_lib
from training.lifecycle import interrupt, run_context
from training.optimizer import average

# Seconds between attempts at the last save of a run. A stopped run has less
# time: the cluster kills it after the grace period.
_PAUSES_S = (1.0, 5.0, 15.0)
_PAUSES_WHEN_STOPPED_S = (1.0, 5.0)


class Saver:
  """Saves the states of one run; `save` is a hook of the loop."""

  def __init__(
    self,
    experiment: experiment_lib.Experiment,
    parts: assemble.Parts,
    context: run_context.RunContext,
    *,
    saved: checkpoint.Checkpoints,
    evaluator: evaluator_lib.Evaluator,
    before: checkpoint.Progress,
    first_step: int,
  ):
    """Creates the saver of one start of a run.

    Args:
      evaluator: knows the loss of a step, which ranks its checkpoint.
      before: the cost of the run before this start.
      first_step: the step that this start resumed from.
    """
    self._parts = parts
    self._context = context
    self._saved = saved
    self._evaluator = evaluator
    self._before = before
    self._first_step = first_step
    self._average = average.reader(
      experiment.optimizer.rule, experiment.ema_decay
    )
    self._last_step: int | None = None  # last step given to `save`
    self._has_warned = False

  def save(self, step: int, state: state_lib.TrainState) -> None:
    """Starts to save a checkpoint of `state`."""
    self._last_step = step
    whole = self._parts.learner.placement.whole(state)
    if self._average is not None and whole.average is None:
      whole = whole.replace(average=jax.jit(self._average)(whole))
    reporter = self._context.reporter
    tokens_seen = self._before.tokens_seen + reporter.tokens_seen
    self._saved.save(
      whole,
      checkpoint.Progress(
        tokens_seen=tokens_seen,
        training_flops=tokens_seen * self._parts.learner.flops_per_token,
        train_seconds=self._before.train_seconds + reporter.train_seconds,
        data_state=self._parts.batches.get_state(),
      ),
      eval_loss=self._evaluator.loss_at(step),
      evaluation_owed=self._evaluator.owes(step),
      # A checkpoint must not be ahead of the metrics: a run that resumed from
      # it would never write the records in between.
      before_seal=self._context.log.sync,
      done=self._report(step),
    )

  def settle(self, step: int) -> None:
    """Adds the loss of an evaluation that the checkpoint of `step` owed."""
    loss = self._evaluator.loss_at(step)
    assert loss is not None, 'not evaluated'
    try:
      self._context.log.sync()
      self._saved.mark_evaluated(step, loss)
    except OSError as error:
      # A run that resumes from this step evaluates it once more.
      self._context.terminal.say(
        f'step {step}: got {error}, evaluation not recorded'
      )

  def finish(self, state: state_lib.TrainState) -> None:
    """Returns when the last step is saved; repeats a save that failed.

    Raises:
      disk.SaveError: it cannot be saved.
    """
    step = self._last_step
    if step is None:
      return
    is_stopped = bool(self._context.stop.exit_code)
    for pause in (*(_PAUSES_WHEN_STOPPED_S if is_stopped else _PAUSES_S), None):
      if self._saved.wait() == step:
        return
      if pause is not None:
        self._context.terminal.say(f'step {step}: saving again in {pause:g} s')
        time.sleep(pause)
        self.save(step, state)
    raise disk.SaveError(
      f'step {step}, the last one: got no checkpoint of it, expected one; make'
      ' room where --workdir is, or make it writable, and start again: the run'
      f' resumes from {_place(self._saved.wait())}'
    )

  def close(self) -> None:
    """Waits for a save in flight, which still reports its outcome."""
    self._saved.wait()

  def _report(self, step: int) -> Callable[[checkpoint.Outcome], None]:
    """Returns the function that the thread of a save calls with its outcome."""
    # Read now: the clock belongs to the thread of the loop.
    num_steps = max(step - self._first_step, 1)
    seconds_per_step = self._context.reporter.train_seconds / num_steps

    def report(outcome: checkpoint.Outcome) -> None:
      self._context.log.write(
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
        self._context.terminal.say(
          f'step {step}: the checkpoint was not saved: got {outcome.error}; it'
          ' is tried again when the next one is due, and until then the run'
          f' can be resumed from {_place(outcome.latest_step)}'
        )
      else:
        self._warn_of_grace(seconds_per_step + outcome.seconds)

    return report

  def _warn_of_grace(self, seconds: float) -> None:
    stop = self._context.stop
    if processes.count() > 1:
      seconds += interrupt.SECONDS_BETWEEN_QUESTIONS
    if self._has_warned or seconds <= stop.grace_s:
      return
    self._has_warned = True
    self._context.terminal.say(
      f'warning: a step and a save take {seconds:.0f} s, more than the'
      f' {stop.grace_s:g} s of checkpoint.grace_s: on SIGTERM the run may be'
      ' killed before it has saved; ask the cluster for more time'
    )


def _place(step: int | None) -> str:
  return 'its start, nothing was saved' if step is None else f'step {step}'
