"""The context of a run: its log, terminal, reporter and stop signal.

They are opened together when the run begins to train, and closed together in
the reverse order, whether it ends well or not.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import pathlib

import rich.console

from parallel import processes
from training import assemble, experiment as experiment_lib
from training.checkpoints import checkpoint
from training.lifecycle import interrupt
from training.reporting import (
  goodput as goodput_lib,
  metrics,
  reporter as reporter_lib,
  summary,
  terminal as terminal_lib,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunContext:
  """The outputs of a run, and its request to stop."""

  log: metrics.Log
  terminal: terminal_lib.Terminal
  reporter: reporter_lib.Reporter
  stop: interrupt.Interrupt


@contextlib.contextmanager
def opened(
  experiment: experiment_lib.Experiment,
  parts: assemble.Parts,
  workdir: pathlib.Path,
  console: rich.console.Console,
  *,
  goodput: goodput_lib.Goodput,
  resume: checkpoint.Resume,
  last_checkpoint: Callable[[], int | None],
) -> Iterator[RunContext]:
  """Yields the context of a run.

  Args:
    resume: the checkpoint that the run resumes from.
    last_checkpoint: see `Reporter`.

  Raises:
    ValueError: the metrics of earlier starts are damaged.
  """
  with processes.together('metrics'):
    log = metrics.Log(
      workdir if processes.is_first() else None,
      first_step=resume.step,
      evaluation_owed=resume.evaluation_owed,
      tell=lambda text: summary.say(console, text),
    )
  learner = parts.learner
  with (
    contextlib.closing(log),
    terminal_lib.Terminal(console, num_steps=experiment.num_steps) as terminal,
    contextlib.closing(
      reporter_lib.Reporter(
        log,
        terminal,
        goodput,
        learning_rate=learner.schedule,
        mfu_per_token_rate=learner.flops_per_token / learner.peak_flops_per_s(),
        epochs=parts.batches.epochs,
        last_checkpoint=last_checkpoint,
      )
    ) as reporter,
    interrupt.Interrupt(
      grace_s=experiment.checkpoint.grace_s, wait_for_steps=reporter.wait
    ) as stop,
  ):
    yield RunContext(log=log, terminal=terminal, reporter=reporter, stop=stop)
