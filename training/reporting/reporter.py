"""The reporter of a run: metrics of each step, and the speed in between."""

from collections.abc import Callable
import math
import time
from typing import Any, NamedTuple

import jax

from training.reporting import (
  goodput as goodput_lib,
  input_wait,
  metrics as metrics_lib,
  terminal as terminal_lib,
)


class NonFiniteError(FloatingPointError):
  """A metric of a step, such as its loss, that is NaN or infinite."""

  def __init__(self, message: str, step: int):
    super().__init__(message)
    self.step = step  # the first step whose metrics are not finite


class _Taken(NamedTuple):
  """A step that was dispatched and whose metrics are not fetched yet."""

  step: int
  metrics: dict[str, Any]
  learning_rate: Any
  num_positions: int  # in the batch, padding and context included


class Reporter:
  """Fetches metrics only at reports, so the devices never wait for the host.

  Measures the speed between two reports. Time in hooks does not count, nor does
  the first step of each batch shape, which compiles. Tokens are targets, as in
  `tokens_seen`. If batches have more positions, for padding or prompts, the
  speed has both figures.
  """

  def __init__(
    self,
    log: metrics_lib.Log,
    terminal: terminal_lib.Terminal,
    goodput: goodput_lib.Goodput,
    *,
    learning_rate: Callable[[Any], Any],
    mfu_per_token_rate: float,
    epochs: Callable[[int], dict[str, float]],
    last_checkpoint: Callable[[], int | None],
  ):
    """Creates the reporter of one start of a run.

    Args:
      log: receives the records.
      terminal: shows the last report.
      goodput: counts the time of the run.
      learning_rate: the schedule, a function of the step that jax can trace.
      mfu_per_token_rate: MFU of one token/s: FLOPs per token over peak FLOP/s.
      epochs: returns how often each source was trained on, from a step.
      last_checkpoint: returns the newest saved step, for an error text.
    """
    self._log = log
    self._terminal = terminal
    self.goodput = goodput
    # One program for one step, so that the bits do not depend on the number of
    # steps in a report. Op by op it would take longer than some steps.
    self._learning_rate = jax.jit(learning_rate)
    self._mfu_per_token_rate = mfu_per_token_rate
    self._epochs = epochs
    self._last_checkpoint = last_checkpoint
    self._input_wait = input_wait.InputWait()
    self._pending: list[_Taken] = []
    self._shapes: set[Any] = set()
    self._num_positions = 0  # in the last batch
    self._is_compiling = False
    self._reported_seconds = 0.0  # part of train_seconds already reported
    self.tokens_seen = 0
    self.losses: list[float] = []

  @property
  def train_seconds(self) -> float:
    """Returns the seconds in the loop, without hooks and compilation."""
    return self.goodput.seconds(goodput_lib.STEPS, 'input', 'report')

  def begin(self, first_step: int) -> None:
    """Marks the start of the loop, after `first_step` steps."""
    self.goodput.begin(first_step)
    self.goodput.enter(goodput_lib.STEPS)

  def batch_came(self, asked_at: float, batch: Any) -> None:
    """Records the wait for a batch, and notices a new batch shape.

    Args:
      asked_at: time at which the loop began to wait, by `time.perf_counter`.
      batch: host arrays [B, T].
    """
    self._input_wait.batch_came(asked_at, time.perf_counter())
    leaves = jax.tree.leaves(batch)
    self._num_positions = leaves[0].size
    shapes = tuple(leaf.shape for leaf in leaves)
    if shapes not in self._shapes:
      self._shapes.add(shapes)
      # Flushed first: otherwise the steps so far would count as compilation.
      self.flush()
      self.goodput.enter('compile')
      self._is_compiling = True

  def add(self, step: int, step_metrics: dict[str, Any]) -> None:
    """Adds the metrics of a step without waiting for them."""
    self._input_wait.dispatched(step_metrics)
    # The schedule counts steps from 0, the loop from 1.
    rate = self._learning_rate(step - 1)
    self._pending.append(_Taken(step, step_metrics, rate, self._num_positions))
    if self._is_compiling:
      self.flush()
      self.goodput.enter(goodput_lib.STEPS)
      self._is_compiling = False
      self._reported_seconds = self.train_seconds

  def flush(self) -> None:
    """Waits for the steps so far, records them and shows the last one.

    Raises:
      NonFiniteError: names the first step with a metric that is not finite.
    """
    # All values at once: each fetch is a round trip to the device.
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
    """Ends the thread that watches the devices."""
    self._input_wait.close()

  def _record(self, fetched: list[tuple[dict[str, Any], Any]]) -> None:
    seen_before = self.tokens_seen
    for taken, (on_host, rate) in zip(self._pending, fetched, strict=True):
      values = {name: float(value) for name, value in on_host.items()}
      self._check_finite(taken.step, values)
      if values.get('skipped'):
        self._terminal.say(
          f'step {taken.step}: skipped, its gradient norm of'
          f' {values["grad_norm"]:.3g} is an outlier'
        )
      weight = values.pop('weight')
      tokens = int(values.pop('tokens', weight))
      self.tokens_seen += tokens
      self.losses.append(values['loss'])
      self._log.write(
        'train',
        taken.step,
        {**values, 'learning_rate': float(rate), 'tokens': tokens},
      )
    step = self._pending[-1].step
    speed = self._speed(self.tokens_seen - seen_before)
    if speed:
      epochs = self._epochs(step).items()
      named = {f'epochs/{name}': value for name, value in epochs}
      self._log.write('speed', step, speed | named)
    self._terminal.update(step, self.losses[-1], speed)
    self.goodput.reached(step)

  def wait(self) -> None:
    """Returns when the devices have done all steps so far."""
    jax.block_until_ready([taken.metrics for taken in self._pending])

  def _speed(self, num_tokens: int) -> dict[str, float]:
    """Returns the speed since the last report; empty after a compilation."""
    if self._is_compiling:
      return {}
    now, before = self.train_seconds, self._reported_seconds
    seconds, self._reported_seconds = now - before, now
    num_positions = sum(taken.num_positions for taken in self._pending)
    rate, positions_rate = num_tokens / seconds, num_positions / seconds
    speed = {'tokens_per_s': rate, 'mfu': rate * self._mfu_per_token_rate}
    if num_positions != num_tokens:
      speed['positions_per_s'] = positions_rate
      speed['positions_mfu'] = positions_rate * self._mfu_per_token_rate
    return {
      **speed,
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
