"""The loop: batch, step, report, save, until the last step or a signal.

It is the same for every objective. Everything besides training (evaluation,
saving) is a hook `(every, run)`.
"""

from collections.abc import Callable, Iterator, Sequence
import time
from typing import Any, NamedTuple

from training import state as state_lib
from training.reporting import reporter as reporter_lib


class Hook(NamedTuple):
  """A function that runs every few steps, and after the last step."""

  every: int  # steps; 0: only after the last step
  run: Callable[[int, state_lib.TrainState], bool | None]  # True: stop the run
  part: str  # of goodput.PARTS, to which its time belongs
  when_stopped: bool = False  # also after the step at which the run stops

  def is_due(self, step: int, *, is_last: bool, stopped: bool) -> bool:
    """Returns whether the hook runs after `step`."""
    return (
      is_last
      or (self.every > 0 and step % self.every == 0)
      or (stopped and self.when_stopped)
    )


def run(
  state: state_lib.TrainState,
  batches: Iterator[Any],
  train_step: Callable[..., Any],
  *,
  first_step: int,
  num_steps: int,
  put_batch: Callable[[Any], Any],
  reporter: reporter_lib.Reporter,
  report_every: int,
  hooks: Sequence[Hook],
  should_stop: Callable[[int], bool],
) -> state_lib.TrainState:
  """Takes steps to `num_steps` or to a request to stop; returns the state.

  Args:
    state: the state after `first_step` steps. Donated.
    batches: host batches, at the position that belongs to `first_step`.
    train_step: compiled; donates its state.
    hooks: run in this order. A hook that stops the run makes later hooks due
      that have `when_stopped`.
    should_stop: called after every step, with its number.
  """
  reporter.begin(first_step)
  for step in range(first_step + 1, num_steps + 1):
    asked_at = time.perf_counter()
    rows = next(batches)
    batch = put_batch(rows)
    reporter.batch_came(asked_at, rows)
    state, step_metrics = train_step(state, batch)
    reporter.add(step, step_metrics)
    is_last, stopped = step == num_steps, should_stop(step)
    if step % report_every == 0 or any(
      hook.is_due(step, is_last=is_last, stopped=stopped) for hook in hooks
    ):
      # Checked before the hooks: a saved state is known to be finite.
      reporter.flush()
    for hook in hooks:
      if hook.is_due(step, is_last=is_last, stopped=stopped):
        if hook.part == 'save':
          reporter.goodput.mark(step)
        with reporter.goodput.during(hook.part):
          stopped = bool(hook.run(step, state)) or stopped
    if stopped:
      break
  return state
