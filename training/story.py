"""What the user is told of a run: before, when it is frozen, and after."""

import pathlib

import rich.console

from frozen import manifest as manifest_lib
from parallel import processes
from training import assemble, config as config_lib, interrupt, loop, metrics


def describe(
  experiment: config_lib.Experiment,
  parts: assemble.Parts,
  first_step: int,
  console: rich.console.Console,
) -> None:
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
    say(console, f'{name:<10} {value}')


def _in_processes() -> str:
  num = processes.count()
  return f' in {num} processes' if num > 1 else ''


def show_manifest(
  directory: pathlib.Path,
  manifest: manifest_lib.Manifest,
  console: rich.console.Console,
) -> None:
  """Shows what was handed over."""
  say(
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


def summarise(
  workdir: pathlib.Path,
  reporter: loop.Reporter,
  step: int | None,
  stop: interrupt.Interrupt,
  console: rich.console.Console,
) -> None:
  """Shows the loss curve of the whole run, and its speed."""
  records = metrics.read(workdir)
  losses = [r['loss'] for r in records if r['kind'] == 'train']
  say(
    console,
    f'loss       {losses[0]:.3f} {metrics.sparkline(losses)} {losses[-1]:.3f}',
  )
  evals = [r for r in records if r['kind'] == 'eval']
  for record in evals[-1:]:
    say(
      console,
      f'validation {record["loss"]:.4f} nats/token,'
      f' {record["bits_per_byte"]:.4f} bits/byte at step {record["step"]}',
    )
  say(
    console,
    f'time       {reporter.train_seconds:.0f} s training,'
    f' {reporter.compile_seconds:.0f} s compiling and first step',
  )
  if stop.signal:
    say(
      console,
      f'stopped by {stop.signal.name} after step {step}; saved. The same'
      ' command goes on from there.',
    )


def say(console: rich.console.Console, text: str) -> None:
  """Prints a line as it is."""
  console.print(text, highlight=False, markup=False, soft_wrap=True)
