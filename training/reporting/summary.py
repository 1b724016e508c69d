"""Lines for the user: before a run, after a run, and after freezing."""

from collections.abc import Sequence
import pathlib

import rich.console

from frozen import adapters, draft_heads, freeze
from models import flops
from parallel import processes
from training import (
  assemble,
  execution,
  experiment as experiment_lib,
  learner as learner_lib,
)
from training.evaluation import validation
from training.lifecycle import interrupt
from training.reporting import metrics, terminal
from training.rollouts import held_out


def describe(
  experiment: experiment_lib.Experiment,
  parts: assemble.Parts,
  first_step: int,
  console: rich.console.Console,
) -> None:
  """Prints the facts of a run before its first step."""
  data = experiment.data
  positions = data.rows_before(experiment.num_steps) * data.row_length
  tokens = round(positions * _fill_rate(experiment, parts))
  padded = f' in {positions:,} positions' if tokens != positions else ''
  devices = parts.learner.placement.devices
  rows = [
    ('experiment', experiment.name),
    ('data', _describe_data(experiment, parts)),
    ('tokenizer', f'{data.tokenizer.kind}, {parts.tokenizer.vocab_size:,} ids'),
    ('model', _describe_model(parts.learner)),
    (
      'batch',
      f'{" -> ".join(map(str, data.batch_sizes))} rows x {data.row_length} ='
      f' {" -> ".join(f"{n * data.row_length:,}" for n in data.batch_sizes)}'
      ' tokens',
    ),
    (
      'run',
      f'{experiment.num_steps:,} steps, {tokens:,} tokens{padded},'
      f' {tokens * parts.learner.flops_per_token:.2e} FLOPs',
    ),
    (
      'devices',
      f'{len(devices)} x {devices[0].device_kind}{_in_processes()},'
      f' {experiment.parallel.kind}, {experiment.compute_dtype}',
    ),
    ('attention', _describe_attention(parts.learner)),
  ]
  rows += _describe_examples(experiment, parts)
  rows += _warn_of_dropout(experiment)
  for overlap in parts.overlaps:
    is_much = overlap.share > data.contamination_warning or overlap.num_copied
    rows.append(
      ('WARNING' if is_much else 'overlap', f'{overlap.source} {overlap}')
    )
  if first_step:
    rows.append(('resumed', f'after step {first_step}'))
  for name, value in rows:
    say(console, f'{name:<10} {value}')


def _describe_model(learner: learner_lib.Learner) -> str:
  """Returns the parameter counts; with adapters, the frozen count too."""
  config, trained = learner.experiment.adapter, learner.num_params
  total = flops.num_params(learner.experiment.model)
  if learner.experiment.objective.trains_heads_alone:
    return (
      f'{total:,} frozen parameters, {trained:,} trained, in a head:'
      f' {trained / total:.2%} of the model'
    )
  if not config.rank:
    return f'{trained:,} parameters'
  merged = (
    ''
    if config.base == 'float'
    else '; merged into these, dequantised: the function that is trained'
  )
  return (
    f'{total:,} frozen parameters, kernels in {config.base}{merged}\n'
    f'{" " * 11}{trained:,} trained, in adapters of rank {config.rank}:'
    f' {trained / total:.2%} of the model'
  )


def _describe_attention(learner: learner_lib.Learner) -> str:
  return execution.describe_attention(
    learner.experiment, learner.placement, learner.max_documents
  )


def _fill_rate(
  experiment: experiment_lib.Experiment, parts: assemble.Parts
) -> float:
  """Returns the share of the positions of a run that are no padding."""
  weights = [source.weight for source in experiment.data.train_sources()]
  rates = [rows.fill_rate for rows in parts.batches.sources]
  if not sum(weights):  # a single source
    return rates[0]
  pairs = zip(weights, rates, strict=True)
  return sum(w * rate for w, rate in pairs) / sum(weights)


def _describe_data(
  experiment: experiment_lib.Experiment, parts: assemble.Parts
) -> str:
  """Returns a line for each source: its size, fill rate and epochs."""
  data = experiment.data
  mixed = data.train_sources()
  total = sum(source.weight for source in mixed)
  epochs = parts.batches.epochs(experiment.num_steps)
  lines = []
  for source, rows in zip(mixed, parts.batches.sources, strict=True):
    share = f' {source.weight / total:.2%} of the rows,' if total else ''
    lines.append(
      f'{rows.name} {source.path}'.strip()
      + f':{share if len(mixed) > 1 else ""}'
      f' {rows.store.num_documents:,} documents in {source.split},'
      f' {rows.store.num_ids:,} tokens, {data.packing} fills'
      f' {rows.fill_rate:.2%} of {rows.num_rows:,} rows;'
      f' {epochs[rows.name]:.3g} epochs'
    )
  return ('\n' + ' ' * 11).join(lines)


def _describe_examples(
  experiment: experiment_lib.Experiment, parts: assemble.Parts
) -> list[tuple[str, str]]:
  """Returns lines about the trained tokens of records; none for text."""
  held_out = parts.eval_batches.source
  lines = []
  for rows in (*parts.batches.sources, held_out):
    store = rows.store
    if not store.streams:
      continue
    units = store.num_documents // store.documents_per_unit
    lines.append(
      (
        'examples',
        f'{rows.name}: {units:,} {experiment.data.examples},'
        f' {rows.trained_share:.2%} of their tokens are trained',
      )
    )
    for why, count in sorted(store.counts.items()):
      lines.append(('WARNING', f'{rows.name}: {count:,} records {why}'))
  return lines


def _warn_of_dropout(
  experiment: experiment_lib.Experiment,
) -> list[tuple[str, str]]:
  """Returns a row if dropout disturbs the comparison with a reference."""
  rate = experiment.model.dropout_rate
  if not (rate and experiment.objective.logprobs_needed):
    return []
  return [
    (
      'WARNING',
      f'dropout {rate} is on in the model and off in its reference, so their'
      ' log-probabilities differ from the first step on; set'
      ' config.model.dropout_rate = 0 unless this noise is wanted',
    )
  ]


def _in_processes() -> str:
  num = processes.count()
  return f' in {num} processes' if num > 1 else ''


def tell_unused(
  step: int,
  experiment: experiment_lib.Experiment,
  changes: Sequence[str],
  console: rich.console.Console,
) -> None:
  """Prints the values that have no effect on a run without steps left."""
  if step > experiment.num_steps:
    say(
      console,
      f'note: the run has taken {step} steps, more than config.num_steps ='
      f' {experiment.num_steps}: the last one counts',
    )
  unused = [
    words for words in changes if not words.startswith(('freeze.', 'num_steps'))
  ]
  if unused:
    say(
      console,
      'note: no step is left to take, so these values have no effect:'
      f' {"; ".join(unused)}',
    )


def show_manifest(
  directory: pathlib.Path,
  manifest: freeze.Frozen,
  console: rich.console.Console,
) -> None:
  """Prints the main facts of a frozen directory of any kind."""
  if isinstance(manifest, adapters.AdapterManifest):
    kind = 'adapter'
    weights = (
      f'adapter {manifest.adapter_digest} ({manifest.weights})\n  of base'
      f' {manifest.base_digest} ({manifest.base_name})'
    )
  elif isinstance(manifest, draft_heads.DraftHeadManifest):
    kind = 'draft head'
    weights = (
      f'draft head {manifest.head_digest} ({manifest.weights})\n  of weights'
      f' {manifest.base_digest}'
    )
  else:
    kind = manifest.dtype
    weights = f'weights {manifest.weights_digest} ({manifest.weights})'
  say(
    console,
    f'frozen     {directory}: {manifest.num_params:,} {kind}'
    f' parameters in {len(manifest.files)} files\n'
    f'  step {manifest.step}, {manifest.tokens_seen:,} tokens,'
    f' {manifest.training_flops:.2e} FLOPs,'
    f' {manifest.train_seconds:.0f} s\n'
    f'  data {", ".join(mix["source"] for mix in manifest.data_mix)},'
    f' knowledge cutoff {manifest.knowledge_cutoff or "unknown"}\n'
    f'  code {manifest.code_commit}\n'
    f'  {weights}',
  )


def summarise(
  workdir: pathlib.Path,
  step: int | None,
  stop: interrupt.Interrupt,
  console: rich.console.Console,
) -> None:
  """Prints the loss curve of the whole run and its last evaluation."""
  records = metrics.read(workdir)
  losses = [r['loss'] for r in records if r['kind'] == 'train']
  if losses:  # a disk that failed may have lost the last records
    say(
      console,
      f'loss       {losses[0]:.3f} {terminal.sparkline(losses)}'
      f' {losses[-1]:.3f}',
    )
  evals = [r for r in records if r['kind'] == 'eval']
  for record in evals[-1:]:
    # A policy that samples its own text is evaluated by rewards.
    is_text = 'loss' in record
    report = validation.report if is_text else held_out.report
    say(console, f'{report(record)} at step {record["step"]}')
  skipped = [r['step'] for r in records if r.get('skipped')]
  if skipped:
    say(
      console,
      f'skipped    {len(skipped)} steps with outlying gradients, the last was'
      f' {skipped[-1]}',
    )
  if stop.signal:
    say(
      console,
      f'stopped by {stop.signal.name} after step {step}; saved within'
      f' {stop.seconds():.1f} s, of {stop.grace_s:g} s in checkpoint.grace_s.'
      ' The same command resumes from there.',
    )


def say_epochs(epochs: dict[str, float], console: rich.console.Console) -> None:
  """Prints how many epochs of each source were trained on."""
  of_each = ', '.join(f'{name} {value:.3g}' for name, value in epochs.items())
  say(console, f'epochs     {of_each}')


def say(console: rich.console.Console, text: str) -> None:
  """Prints a line without markup or wrapping."""
  console.print(text, highlight=False, markup=False, soft_wrap=True)
