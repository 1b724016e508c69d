"""The loop: batch, step, report, save, until the last step or a signal.

The same for every objective. What happens besides training (evaluating,
saving) is a list of hooks `(every, fn)`; what differs between runs was decided
before the loop was entered.
"""

from collections.abc import Callable, Iterator, Sequence
import math
import time
from typing import Any, NamedTuple

import jax

from training import metrics as metrics_lib, state as state_lib


class NonFiniteError(FloatingPointError):
  """A loss or gradient norm that is NaN or infinite."""


class Hook(NamedTuple):
  """Something to do after every so many steps, and after the last one."""

  every: int  # 0: only after the last
  run: Callable[[int, state_lib.TrainState], None]
  when_stopped: bool = False  # also when the run is asked to stop


class Reporter:
  """Fetches metrics now and then, so that the devices never wait for the host.

  Measures speed between reports. Time spent in hooks and the first step,
  which compiles, do not count.
  """

  def __init__(
    self,
    log: metrics_lib.Log,
    terminal: metrics_lib.Terminal,
    *,
    learning_rate: Callable[[int], Any],
    tokens_per_step: int,
    mfu_per_token_rate: float,
    last_checkpoint: Callable[[], int | None],
  ):
    """Prepares to report.

    Args:
      log: where records go.
      terminal: where the user looks.
      learning_rate: the schedule, a function of the step.
      tokens_per_step: rows times row length.
      mfu_per_token_rate: MFU of one token/s: FLOPs per token over peak FLOP/s.
      last_checkpoint: names the step to go back to in an error.
    """
    self._log = log
    self._terminal = terminal
    self._learning_rate = learning_rate
    self._tokens_per_step = tokens_per_step
    self._mfu_per_token_rate = mfu_per_token_rate
    self._last_checkpoint = last_checkpoint
    self._pending: list[tuple[int, dict[str, Any]]] = []
    self._window_start = time.perf_counter()
    self._is_first = True
    self.tokens_seen = 0
    self.train_seconds = 0.0
    self.compile_seconds = 0.0
    self.timed_steps = 0
    self.losses: list[float] = []

  def add(self, step: int, step_metrics: dict[str, Any]) -> None:
    """Takes the metrics of a step without waiting for them."""
    self._pending.append((step, step_metrics))
    if self._is_first:
      self.flush()

  def flush(self) -> None:
    """Waits for the steps so far, records them and shows the last.

    Raises:
      NonFiniteError: names the first step that is not finite.
    """
    if not self._pending:
      return
    for step, on_device in self._pending:
      values = {name: float(value) for name, value in on_device.items()}
      self._check_finite(step, values)
      tokens = int(values.pop('weight'))
      self.tokens_seen += tokens
      self.losses.append(values['loss'])
      # The schedule counts from 0: this is the rate the step was taken with.
      rate = float(self._learning_rate(step - 1))
      self._log.write(
        'train', step, {**values, 'learning_rate': rate, 'tokens': tokens}
      )
    step = self._pending[-1][0]
    speed = self._speed(len(self._pending))
    if speed:
      self._log.write('speed', step, speed)
    self._terminal.update(step, self.losses[-1], speed)
    self._pending = []
    self._is_first = False

  def wait(self) -> None:
    """Waits for the steps so far."""
    jax.block_until_ready([on_device for _, on_device in self._pending])

  def resume_clock(self) -> None:
    """Starts a new measuring window: what came before was not training."""
    self._window_start = time.perf_counter()

  def _speed(self, num_steps: int) -> dict[str, float]:
    now = time.perf_counter()
    seconds, self._window_start = now - self._window_start, now
    if self._is_first:
      self.compile_seconds = seconds
      return {}
    self.train_seconds += seconds
    self.timed_steps += num_steps
    rate = num_steps * self._tokens_per_step / seconds
    return {
      'tokens_per_s': rate,
      'mfu': rate * self._mfu_per_token_rate,
      'seconds_per_step': seconds / num_steps,
    }

  def _check_finite(self, step: int, values: dict[str, float]) -> None:
    for name, value in values.items():
      if not math.isfinite(value):
        good = self._last_checkpoint()
        where = 'none was saved yet' if good is None else f'step {good}'
        raise NonFiniteError(
          f'step {step}: got {name} = {value}, expected a finite number; last'
          f' good checkpoint: {where}. Lower optimizer.peak_lr, lengthen'
          ' optimizer.warmup_steps or clip harder, and start again from there'
        )


def run(
  state: state_lib.TrainState,
  batches: Iterator[Any],
  train_step: Callable[..., Any],
  *,
  first_step: int,
  num_steps: int,
  put_batch: Callable[[Any], Any],
  reporter: Reporter,
  report_every: int,
  hooks: Sequence[Hook],
  should_stop: Callable[[int], bool],
) -> state_lib.TrainState:
  """Takes steps until `num_steps` were taken or `should_stop()`.

  Hooks run in order after a report, so what they save is known to be finite.

  Args:
    state: after `first_step` steps. Donated.
    batches: host batches, at the position that belongs to `first_step`.
    train_step: compiled; donates its state.
    first_step: steps already taken.
    num_steps: of the whole run.
    put_batch: sends a batch to the devices.
    reporter: takes each step's metrics.
    report_every: steps between reports.
    hooks: what else to do, and how often.
    should_stop: asked after every step, with its number.

  Returns:
    The last state.
  """
  reporter.resume_clock()
  for step in range(first_step + 1, num_steps + 1):
    batch = put_batch(next(batches))
    state, step_metrics = train_step(state, batch)
    reporter.add(step, step_metrics)
    stopped = should_stop(step)
    due = [
      hook
      for hook in hooks
      if step == num_steps
      or (hook.every and step % hook.every == 0)
      or (stopped and hook.when_stopped)
    ]
    if due or step % report_every == 0:
      reporter.flush()
    for hook in due:
      hook.run(step, state)
    if due:
      reporter.resume_clock()
    if stopped:
      break
  return state
