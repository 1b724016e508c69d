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
  evaluate,
  interrupt,
  loop,
  metrics,
  state as state_lib,
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
      _say(console, f'{workdir} is complete: step {step}, frozen in {frozen}')
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
  _show_manifest(frozen, manifest, console)


def _train(experiment, workdir, console, saved) -> Result:
  with processes.together('run.json'):
    if processes.is_first():
      workdir_lib.record(workdir, experiment)
  parts = assemble.assemble(experiment, workdir)
  state, progress = _start_or_restore(experiment, parts, saved)
  first_step = saved.latest_step() or 0
  _describe(experiment, parts, first_step, console)
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
    keeper = _Keeper(
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
    _summarise(workdir, reporter, step, stop, console)
  return Result(step=step, exit_code=stop.exit_code)


def _start_or_restore(experiment, parts, saved):
  """Returns the placed state and its progress; moves the data along."""
  if saved.latest_step() is None:
    state = parts.learner.init(jax.random.key(experiment.seed))
    return state, checkpoint.Progress()
  state, progress = saved.restore(parts.learner.placement.abstract_whole())
  parts.batches.set_state(progress.data_state)
  return parts.learner.placement.restored(state), progress


class _Keeper:
  """The two hooks of a run: evaluates, and saves with what it evaluated."""

  def __init__(
    self,
    experiment: config_lib.Experiment,
    parts: assemble.Parts,
    saved: checkpoint.Checkpoints,
    progress: checkpoint.Progress,
    reporter: loop.Reporter,
    log: metrics.Log,
    terminal: metrics.Terminal,
  ):
    self._parts = parts
    self._saved = saved
    self._before = progress  # what earlier starts of this run had done
    self._reporter = reporter
    self._log = log
    self._terminal = terminal
    self._max_eval_batches = experiment.eval_batches
    self._eval_step = parts.learner.compile_eval_step()
    self._last_eval: tuple[int, float] | None = None

  def evaluate(self, step: int, state: state_lib.TrainState) -> None:
    """Records the validation loss of `state`."""
    values = evaluate.evaluate(
      self._eval_step,
      state.params,
      self._parts.eval_batches,
      put_batch=self._parts.learner.placement.put_batch,
      num_bytes_V=self._parts.tokenizer.num_bytes_V(),
      max_batches=self._max_eval_batches,
    )
    self._log.write('eval', step, values)
    self._last_eval = step, values['loss']
    self._terminal.say(
      f'step {step}: validation loss {values["loss"]:.4f} nats/token,'
      f' {values["bits_per_byte"]:.4f} bits/byte'
    )

  def save(self, step: int, state: state_lib.TrainState) -> None:
    """Starts to save a checkpoint of `state`."""
    evaluated_at, loss = self._last_eval or (None, None)
    tokens_seen = self._before.tokens_seen + self._reporter.tokens_seen
    self._saved.save(
      self._parts.learner.placement.whole(state),
      checkpoint.Progress(
        tokens_seen=tokens_seen,
        training_flops=tokens_seen * self._parts.learner.flops_per_token,
        train_seconds=self._before.train_seconds + self._reporter.train_seconds,
        data_state=self._parts.batches.get_state(),
      ),
      eval_loss=loss if evaluated_at == step else None,
    )


def _describe(experiment, parts, first_step, console) -> None:
  """Says what is about to run."""
  data = experiment.data
  source = f'{data.open_source.__name__} {data.path}'.strip()
  tokens_per_step = data.batch_size * data.row_length
  tokens = experiment.num_steps * tokens_per_step
  devices = parts.learner.placement.devices
  rows = {
    'experiment': experiment.name,
    'data': (
      f'{source}, {len(parts.source):,} documents in {data.train_split};'
      f' {data.tokenizer.kind} tokenizer of {parts.tokenizer.vocab_size:,}'
    ),
    'model': f'{parts.learner.num_params:,} parameters',
    'batch': (
      f'{data.batch_size} rows x {data.row_length} = {tokens_per_step:,} tokens'
    ),
    'run': (
      f'{experiment.num_steps:,} steps, {tokens:,} tokens,'
      f' {tokens * parts.learner.flops_per_token:.2e} FLOPs'
    ),
    'devices': (
      f'{len(devices)} x {devices[0].device_kind}{_in_processes()},'
      f' {experiment.parallel.kind},'
      f' {experiment.compute_dtype}'
    ),
  }
  if first_step:
    rows['resumed'] = f'after step {first_step}'
  for name, value in rows.items():
    _say(console, f'{name:<10} {value}')


def _in_processes() -> str:
  num = processes.count()
  return f' in {num} processes' if num > 1 else ''


def _show_manifest(directory, manifest, console) -> None:
  """Shows what was handed over."""
  _say(
    console,
    f'frozen     {directory}: {manifest.num_params:,} {manifest.dtype}'
    f' parameters in {len(manifest.files)} files\n'
    f'  step {manifest.step}, {manifest.tokens_seen:,} tokens,'
    f' {manifest.training_flops:.2e} FLOPs,'
    f' {manifest.train_seconds:.0f} s\n'
    f'  data {", ".join(mix["source"] for mix in manifest.data_mix)},'
    f' knowledge cutoff {manifest.knowledge_cutoff or "unknown"}\n'
    f'  code {manifest.code_commit}\n'
    f'  weights {manifest.weights_digest}',
  )


def _summarise(workdir, reporter, step, stop, console) -> None:
  """Shows the loss curve of the whole run, and its speed."""
  records = metrics.read(workdir)
  losses = [r['loss'] for r in records if r['kind'] == 'train']
  _say(
    console,
    f'loss       {losses[0]:.3f} {metrics.sparkline(losses)} {losses[-1]:.3f}',
  )
  evals = [r for r in records if r['kind'] == 'eval']
  for record in evals[-1:]:
    _say(
      console,
      f'validation {record["loss"]:.4f} nats/token,'
      f' {record["bits_per_byte"]:.4f} bits/byte at step {record["step"]}',
    )
  _say(
    console,
    f'time       {reporter.train_seconds:.0f} s training,'
    f' {reporter.compile_seconds:.0f} s compiling and first step',
  )
  if stop:
    _say(
      console,
      f'stopped by {stop.signal.name} after step {step}; saved. The same'
      ' command goes on from there.',
    )


def _say(console: rich.console.Console, text: str) -> None:
  console.print(text, highlight=False, markup=False, soft_wrap=True)
