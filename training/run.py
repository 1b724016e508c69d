"""One run of life one: open, restore or start, loop, freeze.

`train.py` calls `run`. It goes on from where the workdir was left, so the same
command starts a run, resumes it, and does nothing once it is complete.

Several processes (`parallel/processes.py`) run the same code side by side. Each
of them makes every global batch and sends its devices their rows: the order of
the data, and its position in a checkpoint, are one thing that does not know how
many processes there are. What it costs is that each host tokenises and packs
all of the data, and not its part: see `data/pipeline.py`. The first process
writes what is written once, and tells the user; errors are told by whoever has
them.
"""

import contextlib
import dataclasses
import json
import pathlib

import jax
import rich.console

from frozen import freeze
from parallel import processes
from training import (
  assemble,
  checkpoint,
  config as config_lib,
  hooks,
  interrupt,
  loop,
  metrics,
  story,
  workdir as workdir_lib,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
  """What a run came to."""

  step: int  # the last one taken
  exit_code: int  # 0, or 128 + the signal that stopped it


def run(
  experiment: config_lib.Experiment,
  workdir: pathlib.Path,
  console: rich.console.Console,
) -> Result:
  """Trains to the experiment's last step, then freezes.

  Args:
    experiment: what to run.
    workdir: where everything is written; what is there is gone on with.
    console: where the user is told.

  Raises:
    ValueError, FileNotFoundError: the experiment, the workdir or the data
      cannot be used; nothing was changed.
    loop.NonFiniteError: a loss was not finite.
    processes.PeerError: another process failed, and this one did not.
  """
  processes.check_same(
    '--config', json.dumps(experiment.to_dict(), sort_keys=True)
  )
  experiment.validate()
  with processes.together('workdir'):
    workdir_lib.check(workdir, experiment)
  workdir_lib.check_shared(workdir)
  frozen = workdir / workdir_lib.FROZEN
  with contextlib.closing(
    checkpoint.Checkpoints(workdir, experiment.checkpoint)
  ) as saved:
    step = saved.latest_step() or 0
    if step >= experiment.num_steps and frozen.exists():
      story.say(
        console, f'{workdir} is complete: step {step}, frozen in {frozen}'
      )
      return Result(step=step, exit_code=0)
    if step < experiment.num_steps:
      result = _train(experiment, workdir, console, saved)
      if result.exit_code:
        return result
      step = result.step
  if experiment.freeze.enabled:
    with processes.together('freezing'):
      if processes.is_first():
        _freeze(experiment, workdir, step, console)
  return Result(step=step, exit_code=0)


def _freeze(experiment, workdir, step, console) -> None:
  frozen = workdir / workdir_lib.FROZEN
  manifest = freeze.freeze_checkpoint(
    workdir,
    step=step,
    out=frozen,
    dtype=experiment.freeze.dtype,
    generation={
      'temperature': experiment.freeze.temperature,
      'max_tokens': experiment.freeze.max_tokens,
    },
    # The run's own hand-off: a longer run replaces that of a shorter one.
    overwrite=True,
  )
  story.show_manifest(frozen, manifest, console)


def _train(experiment, workdir, console, saved) -> Result:
  with processes.together('run.json'):
    if processes.is_first():
      workdir_lib.record(workdir, experiment)
  parts = assemble.assemble(experiment, workdir)
  state, progress = _start_or_restore(experiment, parts, saved)
  first_step = saved.latest_step() or 0
  story.describe(experiment, parts, first_step, console)
  with contextlib.ExitStack() as stack:
    stack.callback(parts.batches.close)
    log: metrics.Log = (
      metrics.MetricsLog(workdir, first_step=first_step)
      if processes.is_first()
      else metrics.NoLog()
    )
    stack.callback(log.close)
    terminal = stack.enter_context(
      metrics.Terminal(console, num_steps=experiment.num_steps)
    )
    reporter = loop.Reporter(
      log,
      terminal,
      learning_rate=parts.learner.schedule,
      tokens_per_step=experiment.data.batch_size * experiment.data.row_length,
      mfu_per_token_rate=parts.learner.flops_per_token
      / parts.learner.peak_flops_per_s(),
      last_checkpoint=saved.latest_step,
    )
    keeper = hooks.Keeper(
      experiment, parts, saved, progress, reporter, log, terminal
    )
    stop = stack.enter_context(
      interrupt.Interrupt(wait_for_steps=reporter.wait)
    )
    state = loop.run(
      state,
      parts.batches,
      parts.learner.compile_train_step(),
      first_step=first_step,
      num_steps=experiment.num_steps,
      put_batch=parts.learner.placement.put_batch,
      reporter=reporter,
      report_every=experiment.log_every_steps,
      hooks=[
        loop.Hook(experiment.eval_every_steps, keeper.evaluate),
        loop.Hook(
          experiment.checkpoint.every_steps, keeper.save, when_stopped=True
        ),
      ],
      should_stop=stop.after_step,
    )
    saved.wait()
  step = saved.latest_step()
  if processes.is_first():
    story.summarise(workdir, reporter, step, stop, console)
  return Result(step=step, exit_code=stop.exit_code)


def _start_or_restore(experiment, parts, saved):
  """Returns the placed state and its progress; moves the data along."""
  if saved.latest_step() is None:
    state = parts.learner.init(jax.random.key(experiment.seed))
    return state, checkpoint.Progress()
  state, progress = saved.restore(parts.learner.placement.abstract_whole())
  parts.batches.set_state(progress.data_state)
  return parts.learner.placement.restored(state), progress
