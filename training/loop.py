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

from training import state as state_lib
from training.reporting import (
  goodput as goodput_lib,
  input_wait,
  metrics as metrics_lib,
)


class NonFiniteError(FloatingPointError):
  """A loss, or another metric of a step, that is NaN or infinite."""

  def __init__(self, message: str, step: int):
    super().__init__(message)
    self.step = step  # the first whose metrics are not finite


class Hook(NamedTuple):
  """Something to do after every so many steps, and after the last one."""

  every: int  # 0: only after the last
  run: Callable[[int, state_lib.TrainState], bool | None]  # True: stop
  part: str  # of training/reporting/goodput.py, which its time belongs to
  when_stopped: bool = False  # also when the run is asked to stop


class _Taken(NamedTuple):
  """A step that was dispatched; values are on their way."""

  step: int
  metrics: dict[str, Any]
  learning_rate: Any
  num_tokens: int  # places in its batch, padding included


class Reporter:
  """Fetches metrics now and then, so that the devices never wait for the host.

  Measures speed between reports. Time spent in hooks and in the first step of
  each batch shape, which compiles, does not count.
  """

  def __init__(
    self,
    log: metrics_lib.Log,
    terminal: metrics_lib.Terminal,
    goodput: goodput_lib.Goodput,
    *,
    learning_rate: Callable[[Any], Any],
    mfu_per_token_rate: float,
    last_checkpoint: Callable[[], int | None],
  ):
    """Prepares to report.

    Args:
      log: where records go.
      terminal: where the user looks.
      goodput: what the time of the run is counted by.
      learning_rate: the schedule, a function of the step that can be traced.
      mfu_per_token_rate: MFU of one token/s: FLOPs per token over peak FLOP/s.
      last_checkpoint: names the step to go back to in an error.
    """
    self._log = log
    self._terminal = terminal
    self.goodput = goodput
    # Always the same program of one step: the same bits, however many steps
    # are reported at a time. Op by op it would take longer than some steps.
    self._learning_rate = jax.jit(learning_rate)
    self._mfu_per_token_rate = mfu_per_token_rate
    self._last_checkpoint = last_checkpoint
    self._input_wait = input_wait.InputWait()
    self._pending: list[_Taken] = []
    self._shapes: set[Any] = set()
    self._num_tokens = 0  # of the batch that came last
    self._is_compiling = False
    self._reported_seconds = 0.0  # of train_seconds
    self.tokens_seen = 0
    self.losses: list[float] = []

  @property
  def train_seconds(self) -> float:
    """Returns the time in the loop without its hooks and compilations."""
    return self.goodput.seconds(goodput_lib.STEPS, 'input', 'report')

  def begin(self, first_step: int) -> None:
    """Says that the loop is entered after so many steps."""
    self.goodput.begin(first_step)
    self.goodput.enter(goodput_lib.STEPS)

  def batch_came(self, asked_at: float, batch: Any) -> None:
    """Takes note of a batch for the next step: how long it took, and its shape.

    Args:
      asked_at: when the loop began to wait for it, by `time.perf_counter`.
      batch: host arrays [B, T].
    """
    self._input_wait.batch_came(asked_at, time.perf_counter())
    leaves = jax.tree.leaves(batch)
    self._num_tokens = leaves[0].size
    shapes = tuple(leaf.shape for leaf in leaves)
    if shapes not in self._shapes:
      self._shapes.add(shapes)
      self.flush()  # or the steps so far would count as compilation
      self.goodput.enter('compile')
      self._is_compiling = True

  def add(self, step: int, step_metrics: dict[str, Any]) -> None:
    """Takes the metrics of a step without waiting for them."""
    self._input_wait.dispatched(step_metrics)
    # The schedule counts from 0: this is the rate the step was taken with.
    rate = self._learning_rate(step - 1)
    self._pending.append(_Taken(step, step_metrics, rate, self._num_tokens))
    if self._is_compiling:
      self.flush()
      self.goodput.enter(goodput_lib.STEPS)
      self._is_compiling = False
      self._reported_seconds = self.train_seconds

  def flush(self) -> None:
    """Waits for the steps so far, records them and shows the last.

    Raises:
      NonFiniteError: names the first step that is not finite.
    """
    # All at once: one by one, each value would be a round trip.
    fetched = jax.device_get(
      [(t.metrics, t.learning_rate) for t in self._pending]
    )
    self.goodput.move(self._input_wait.take(), goodput_lib.STEPS, 'input')
    if not self._pending:
      return
    with self.goodput.during('report'):
      self._record(fetched)
    self._pending = []

  def close(self) -> None:
    """Ends what was started."""
    self._input_wait.close()

  def _record(self, fetched: list[tuple[dict[str, Any], Any]]) -> None:
    for taken, (on_host, rate) in zip(self._pending, fetched, strict=True):
      values = {name: float(value) for name, value in on_host.items()}
      self._check_finite(taken.step, values)
      if values.get('skipped'):
        self._terminal.say(
          f'step {taken.step}: skipped, its gradient norm of'
          f' {values["grad_norm"]:.3g} is an outlier'
        )
      tokens = int(values.pop('weight'))
      self.tokens_seen += tokens
      self.losses.append(values['loss'])
      self._log.write(
        'train',
        taken.step,
        {**values, 'learning_rate': float(rate), 'tokens': tokens},
      )
    step = self._pending[-1].step
    speed = {} if self._is_compiling else self._speed()
    if speed:
      self._log.write('speed', step, speed)
    self._terminal.update(step, self.losses[-1], speed)
    self.goodput.reached(step)

  def wait(self) -> None:
    """Waits for the steps so far."""
    jax.block_until_ready([taken.metrics for taken in self._pending])

  def _speed(self) -> dict[str, float]:
    now, before = self.train_seconds, self._reported_seconds
    seconds, self._reported_seconds = now - before, now
    rate = sum(taken.num_tokens for taken in self._pending) / seconds
    return {
      'tokens_per_s': rate,
      'mfu': rate * self._mfu_per_token_rate,
      'seconds_per_step': seconds / len(self._pending),
      'goodput': self.goodput.life().goodput,
    }

  def _check_finite(self, step: int, values: dict[str, float]) -> None:
    for name, value in values.items():
      if not math.isfinite(value):
        good = self._last_checkpoint()
        where = 'none was saved yet' if good is None else f'step {good}'
        raise NonFiniteError(
          f'step {step}: got {name} = {value}, expected a finite number; last'
          f' good checkpoint: {where}. Lower optimizer.peak_lr, lengthen'
          ' optimizer.warmup_steps or clip harder, and start again from there',
          step,
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
  reporter.begin(first_step)
  for step in range(first_step + 1, num_steps + 1):
    asked_at = time.perf_counter()
    rows = next(batches)
    batch = put_batch(rows)
    reporter.batch_came(asked_at, rows)
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
    if any(hook.part == 'save' for hook in due):
      reporter.goodput.mark(step)
    for hook in due:
      with reporter.goodput.during(hook.part):
        stopped = bool(hook.run(step, state)) or stopped
    if stopped:
      break
  return state
