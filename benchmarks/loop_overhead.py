"""Overhead of the train loop over the bare jitted step: at most 3 %.

    python -m benchmarks.loop_overhead

Two sides take turns of 200 steps:

    bare   the compiled train step, on one batch that is already on the devices;
           waits for the devices once, at the end
    loop   the loop of `train.py`: batches from text, metrics to JSONL and
           TensorBoard, the progress bar, and one checkpoint as the quickstart
           has it, written while steps continue

`overhead` is the median over rounds of loop / bare - 1. The promise of 3 % is
for the quickstart. A tiny model without checkpoints shows the host's time per
step. The second table splits the host's time by part, with a step that does
nothing, so that no part can hide behind the devices. On an accelerator, the
host costs time only where it takes longer than the step, and in reports.
Evaluation is not measured: it is not part of the loop.
"""

from collections.abc import Sequence
import contextlib
import dataclasses
import functools
import os
import pathlib
import statistics
import tempfile
import time
from typing import Any

from absl import app, flags, logging
import jax
import rich.console

from benchmarks.common import entry, timing
from experiments import quickstart
from hardware import host_memory
from training import assemble, experiment as experiment_lib, loop
from training.checkpoints import checkpoint, saver, workdir as workdir_lib
from training.evaluation import evaluator
from training.lifecycle import run_context
from training.reporting import goodput

# The step number continues from turn to turn and never reaches this end.
_NO_END = 1_000_000
_STEPS = 200  # per turn
_PARTS = {
  goodput.STEPS: 'dispatch and bookkeeping',
  'input': 'next batch, and sending it',
  'report': 'metrics, TensorBoard, progress',
  'save': 'held up by the checkpoint',
}


def experiments() -> dict[str, experiment_lib.Experiment]:
  """Returns the experiments to measure, by name."""
  small = quickstart.get_config()
  small.num_steps = _NO_END
  tiny = dataclasses.replace(
    small,
    model=dataclasses.replace(
      small.model,
      num_layers=1,
      num_heads=2,
      num_kv_heads=1,
      model_width=32,
      mlp_width=64,
      max_length=32,
    ),
    data=dataclasses.replace(small.data, row_length=32),
    checkpoint=experiment_lib.CheckpointConfig(every_steps=_NO_END),
  )
  return {'quickstart': small, 'tiny': tiny}


class Looped:
  """The loop of a run, in turns of some steps."""

  def __init__(
    self,
    experiment: experiment_lib.Experiment,
    parts: assemble.Parts,
    workdir: pathlib.Path,
    stack: contextlib.ExitStack,
  ):
    self._experiment, self._parts = experiment, parts
    self._state = parts.learner.init(jax.random.key(0))
    self._train_step = parts.learner.compile_train_step()
    self._step = 0
    self.goodput = goodput.Goodput(workdir)
    self._saved = stack.enter_context(
      contextlib.closing(
        checkpoint.Checkpoints(
          workdir, experiment.checkpoint, workdir_lib.identity(experiment)
        )
      )
    )
    resume = self._saved.open()
    # Drawn as on a terminal: the bar costs more than plain lines.
    null = stack.enter_context(open(os.devnull, 'w'))  # noqa: SIM115
    context = stack.enter_context(
      run_context.opened(
        experiment,
        parts,
        workdir,
        rich.console.Console(file=null, force_terminal=True),
        goodput=self.goodput,
        resume=resume,
        last_checkpoint=self._saved.wait,
      )
    )
    self._reporter = context.reporter
    self._saver = saver.Saver(
      experiment,
      parts,
      context,
      saved=self._saved,
      evaluator=evaluator.Evaluator(experiment, parts, context),
      before=checkpoint.Progress(),
      first_step=resume.step,
    )

  def take(self, num_steps: int, train_step: Any = None) -> float:
    """Takes steps, and checkpoints that are due; returns the seconds."""
    last = self._step + num_steps
    start = time.perf_counter()
    self._state = loop.run(
      self._state,
      self._parts.batches,
      train_step or self._train_step,
      first_step=self._step,
      num_steps=_NO_END,
      put_batch=self._parts.learner.placement.put_batch,
      reporter=self._reporter,
      report_every=self._experiment.log_every_steps,
      hooks=[
        loop.Hook(
          self._experiment.checkpoint.every_steps, self._saver.save, 'save'
        )
      ],
      should_stop=lambda step: step == last,
    )
    self._reporter.flush()
    with self.goodput.during('end'):
      self._saved.wait()
    self._step = last
    return time.perf_counter() - start

  def take_nothing(self) -> dict[str, float]:
    """Runs the loop with a step that does nothing; returns seconds by part."""
    before = {part: self.goodput.seconds(part) for part in _PARTS}
    done = {'loss': jax.numpy.float32(1.0), 'weight': jax.numpy.float32(1.0)}
    numbers = iter(range(self._step + 1, _NO_END))

    def step_of_nothing(state, batch):
      del batch
      # The state's own step number is the name of its checkpoint.
      return dataclasses.replace(state, step=next(numbers)), done

    self.take(_STEPS, step_of_nothing)
    return {
      part: self.goodput.seconds(part) - seconds
      for part, seconds in before.items()
    }


def bare_turn(parts: assemble.Parts) -> timing.Turn:
  """Returns a turn of the compiled train step alone, warmed up."""
  train_step = parts.learner.compile_train_step()
  state = parts.learner.init(jax.random.key(0))
  batch = parts.learner.placement.put_batch(next(parts.batches))

  def turn(num_steps: int = _STEPS) -> float:
    nonlocal state
    start = time.perf_counter()
    for _ in range(num_steps):
      state, _ = train_step(state, batch)
    jax.block_until_ready(state)
    return time.perf_counter() - start

  turn(1)
  return turn


def measure(
  name: str, experiment: experiment_lib.Experiment, rounds: int
) -> dict[str, Any]:
  """Measures one model; returns the values that `report` prints."""
  with contextlib.ExitStack() as stack:
    workdir = pathlib.Path(
      stack.enter_context(tempfile.TemporaryDirectory(prefix='loop_overhead_'))
    )
    parts = assemble.assemble(experiment, workdir, lambda text: None)
    stack.callback(parts.batches.close)
    looped = Looped(experiment, parts, workdir, stack)
    # Half a turn first, so that turns end halfway between two checkpoints and
    # none is still being written.
    looped.take(_STEPS // 2)
    seconds = timing.interleave(
      {
        'bare': bare_turn(parts),
        'loop': functools.partial(looped.take, _STEPS),
      },
      rounds,
    )
    idle = [looped.take_nothing() for _ in range(rounds)]
  return {
    'benchmark': 'loop_overhead',
    'model': name,
    'device': jax.devices()[0].device_kind,
    'num_params': parts.learner.num_params,
    'checkpoints_per_turn': _STEPS // experiment.checkpoint.every_steps,
    'log_every_steps': experiment.log_every_steps,
    'seconds_per_turn': seconds,
    'overhead': timing.median_ratio(seconds['loop'], seconds['bare']) - 1,
    'host_seconds_per_step': {
      part: statistics.median(turn[part] for turn in idle) / _STEPS
      for part in _PARTS
    },
  }


def report(result: dict[str, Any]) -> str:
  """Returns the tables of one model."""
  bare, looped = (
    statistics.median(result['seconds_per_turn'][side]) / _STEPS * 1e6
    for side in ('bare', 'loop')
  )
  title = (
    f'Loop, {result["model"]}: {result["num_params"] / 1e6:.2f}M parameters,'
    f' {result["checkpoints_per_turn"]} checkpoint in {_STEPS} steps, a report'
    f' in {result["log_every_steps"]}; {result["device"]}'
  )
  rows = [
    ('us per step', 'median'),
    ('bare step', f'{bare:,.0f}'),
    ('loop', f'{looped:,.0f}'),
  ]
  parts = result['host_seconds_per_step']
  idle = [
    ('us per step of nothing', 'median'),
    *((_PARTS[part], f'{s * 1e6:,.0f}') for part, s in parts.items()),
    ('all', f'{sum(parts.values()) * 1e6:,.0f}'),
  ]
  return '\n'.join(
    [
      timing.table(title, rows),
      f'  overhead: {result["overhead"]:.1%}',
      timing.table('  by part', idle),
    ]
  )


def main(argv: Sequence[str]) -> None:
  """Runs the benchmark."""
  del argv
  logging.set_verbosity(logging.ERROR)
  host_memory.reuse_freed_memory()  # as train.py does
  entry.run(
    lambda args: (
      measure(name, experiment, args.rounds)
      for name, experiment in experiments().items()
      if args.model in ('all', name)
    ),
    report,
    is_list=True,
  )


if __name__ == '__main__':
  entry.define_flags(rounds=5)
  flags.DEFINE_enum(
    'model', 'all', ['all', *experiments()], 'The model to train.'
  )
  app.run(main)
