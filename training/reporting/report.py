"""report.html of a run: one page beside its metrics, from its files alone.

    python -m training.reporting.report --workdir=runs/quickstart

Every start of a run writes the report at its end. The command writes it at any
other time, for example for a run that still trains or was killed. The page
needs no other file and no other host. It has curves of the losses, the learning
rate, the gradient norm and the speed, the goodput, samples over time, and the
record of the run: data, lineage and config.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import datetime
import html
import json
import pathlib
import sys
from typing import Any

from absl import app, flags

from checks import path_flags
from frozen import run_record, seals
from storage import atomic, file_names
from training.reporting import goodput as goodput_lib, metrics, report_figures
from training.reporting.page import document, ticks

_MOST_SAMPLED = 8  # most steps whose samples are shown


def save(
  workdir: pathlib.Path,
  tell: Callable[[str], None] = lambda text: None,
  problem: str = '',
) -> None:
  """Writes the report of a run; a failure is reported and ends nothing.

  Args:
    tell: receives a line if the page cannot be made or written.
    problem: error that ended the run, for the first lines of the page.
  """
  try:
    text = make(workdir, problem)
    atomic.write_text(workdir / file_names.REPORT, text, durable=False)
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    tell(f'{workdir / file_names.REPORT}: got {error!r}, not written')


@contextlib.contextmanager
def if_it_fails(
  workdir: pathlib.Path, tell: Callable[[str], None]
) -> Iterator[None]:
  """Writes the report if the block raises, with the error in it."""
  try:
    yield
  except Exception as error:
    save(workdir, tell, ' '.join(str(error).split()) or type(error).__name__)
    raise


def make(workdir: pathlib.Path, problem: str = '') -> str:
  """Returns the page of a run.

  Raises:
    FileNotFoundError: there is no run in the workdir.
    ValueError: its run.json or its metrics are damaged.
  """
  run = run_record.read(workdir)
  records = metrics.read(workdir)
  attempts = goodput_lib.read(workdir)
  life = goodput_lib.life(attempts)
  name = str(run['experiment'])
  parts = [
    f'<h1>{html.escape(name)}</h1>\n',
    document.paragraph(_state(run, records), 'soft'),
  ]
  if problem:
    parts.append(document.paragraph(f'Ended by an error: {problem}', 'wrong'))
  parts.append(document.facts(_facts(records, life)))
  found = report_figures.of_records(records, _is_text(records))
  if found:
    parts += [document.heading('Curves'), document.figures(found)]
    parts.append(_caption(records))
  if life.running:
    parts += [document.heading('Time'), _time(life)]
  parts += _samples(records)
  parts += _record(workdir, run, attempts)
  return document.document(f'{name} - a training run', parts)


def _is_text(records: Sequence[dict[str, Any]]) -> bool:
  """Returns whether the losses are of text, in nats per token."""
  evals = [r for r in records if r['kind'] == 'eval']
  return not evals or 'bits_per_byte' in evals[-1]


def _last(records: Sequence[dict[str, Any]], kind: str) -> dict[str, Any]:
  return next((r for r in reversed(records) if r['kind'] == kind), {})


def _state(run: dict[str, Any], records: Sequence[dict[str, Any]]) -> str:
  """Returns the progress of the run as text."""
  step, steps = _last(records, 'train').get('step', 0), _num_steps(run)
  where = f'Step {step:,} of {steps:,}'
  state = 'complete' if step >= steps else 'not complete'
  made = datetime.datetime.now().astimezone().isoformat(' ', 'minutes')
  return f'{where}: {state}. Page made {made}.'


def _num_steps(run: dict[str, Any]) -> int:
  return int(run.get('config', {}).get('num_steps', 0))


def _facts(
  records: Sequence[dict[str, Any]], life: goodput_lib.Life
) -> dict[str, str]:
  """Returns the few figures at the top of the page."""
  found = {}
  if evaluated := _last(records, 'eval'):
    at = f'at step {evaluated["step"]:,}'
    # A policy that samples its own text has held-out rewards, and no loss.
    for name, words in (('loss', 'validation loss'), ('reward', 'reward')):
      if name in evaluated:
        found[f'{words} {at}'] = f'{evaluated[name]:.4f}'
    for name in ('bits_per_byte', 'accuracy'):
      if name in evaluated:
        found[name.replace('_', ' ')] = f'{evaluated[name]:.4f}'
  trained = [r for r in records if r['kind'] == 'train']
  if trained:
    found['training loss, last step'] = f'{trained[-1]["loss"]:.4f}'
    tokens = sum(r.get('tokens', 0) for r in trained)
    found['tokens trained'] = f'{tokens:,}'
  if life.running:
    found['goodput'] = f'{life.goodput:.1%}'
    duration = datetime.timedelta(seconds=round(life.running))
    found['time running'] = str(duration)
    found['starts'] = str(life.num_attempts)
  return found


def _caption(records: Sequence[dict[str, Any]]) -> str:
  """Returns the evaluations as a table: the numbers behind the curves."""
  evals = [r for r in records if r['kind'] == 'eval']
  if not evals:
    return ''
  names = [name for name in evals[-1] if name not in ('kind', 'step')]
  rows = [
    [each['step'], *(f'{each[n]:.4f}' if n in each else '' for n in names)]
    for each in evals
  ]
  return document.details(
    f'The evaluations as numbers ({len(evals)})',
    document.table(['step', *names], rows),
  )


def _time(life: goodput_lib.Life) -> str:
  """Returns the use of the time, as a table with shares."""
  rows = [
    (goodput_lib.PARTS[goodput_lib.STEPS], life.parts[goodput_lib.STEPS]),
    ('lost: steps taken again', life.lost),
    *(
      (words, life.parts[name])
      for name, words in goodput_lib.PARTS.items()
      if name != goodput_lib.STEPS
    ),
  ]
  shown = [(words, seconds) for words, seconds in rows if seconds >= 0.05]
  chart = report_figures.shares(
    'Time of the run by its use',
    [
      (words, seconds / life.running, f'{seconds:,.1f} s')
      for words, seconds in shown
    ],
  )
  caption = (
    f'Goodput, the share of steps that were kept: {life.goodput:.1%} of'
    f' {life.running:,.1f} s.'
  )
  if life.between:
    caption += f' Besides, {life.between:,.1f} s between starts.'
  return document.figures(
    [document.figure('Use of the time.', caption, chart, is_whole=True)]
  )


def _samples(records: Sequence[dict[str, Any]]) -> list[str]:
  """Returns the samples of some steps, the last step included."""
  drawn = [r for r in records if r['kind'] == 'sample']
  if not drawn:
    return []
  steps = sorted({r['step'] for r in drawn})
  shown = steps
  if len(steps) > _MOST_SAMPLED:
    last = len(steps) - 1
    shown = [
      steps[round(i * last / (_MOST_SAMPLED - 1))] for i in range(_MOST_SAMPLED)
    ]
  parts = [
    document.heading('Samples'),
    document.paragraph(
      'Beginnings of validation documents; in colour, the next tokens of the'
      ' model at temperature 0.8.'
      + (
        f' {len(shown)} of {len(steps)} evaluations.' if shown != steps else ''
      ),
    ),
  ]
  for step in shown:
    texts = ''.join(
      f'<pre>{html.escape(r["prompt"])}<mark>{html.escape(r["text"])}</mark>'
      '</pre>'
      for r in drawn
      if r['step'] == step
    )
    title = f'Step {step:,}'
    if step == shown[-1]:
      parts.append(document.paragraph(title) + texts)
    else:
      parts.append(document.details(title, texts))
  # The newest step first: a reader wants it most.
  return [*parts[:2], *reversed(parts[2:])]


def _record(
  workdir: pathlib.Path,
  run: dict[str, Any],
  attempts: Sequence[goodput_lib.Attempt],
) -> list[str]:
  """Returns data, lineage and config."""
  parts = [document.heading('Data')]
  data = _json(workdir / file_names.DATA)
  rows = [
    (f'source {i}', _brief(each))
    for i, each in enumerate(data.get('sources') or run.get('data_mix', []))
  ]
  if 'evaluation' in data:
    rows.append(('evaluation', _brief(data['evaluation'])))
  for each in data.get('contamination', []):
    rows.append(('overlap with the evaluation', _brief(each)))
  rows.append(('knowledge cutoff', run.get('knowledge_cutoff') or 'unknown'))
  parts.append(document.table([], rows))
  parts += [
    document.heading('Lineage'),
    document.table([], _lineage(workdir, run)),
  ]
  if len(attempts) > 1:
    starts = [
      (
        datetime.datetime.fromtimestamp(each.start)
        .astimezone()
        .isoformat(' ', 'seconds'),
        f'{each.first_step:,}',
        f'{each.step:,}',
        f'{each.wall:,.1f}',
      )
      for each in attempts
    ]
    head = ['start', 'from step', 'to step', 'seconds']
    parts += [document.heading('Starts'), document.table(head, starts)]
  parts.append(document.heading('Config'))
  config = document.values(run.get('config', {}))
  parts.append(
    document.details(f'All {len(config)} fields', document.table([], config))
  )
  return parts


def _lineage(
  workdir: pathlib.Path, run: dict[str, Any]
) -> list[tuple[str, str]]:
  """Returns the origin of the weights, and the directories made of them."""
  rows = [('commit of the code', str(run.get('code_commit', 'unknown')))]
  rows += [(f'from {k}', str(v)) for k, v in run.get('lineage', {}).items()]
  if not run.get('lineage'):
    rows.append(('from', 'random weights'))
  steps = seals.steps(workdir / file_names.CHECKPOINTS)
  if steps:
    rows.append(('checkpoints', ', '.join(f'step {s:,}' for s in steps)))
  manifest = _json(workdir / file_names.FROZEN / file_names.MANIFEST)
  for name in (
    'step', 'weights', 'dtype', 'num_params', 'weights_digest',
    'adapter_digest', 'base_digest', 'training_flops',
  ):  # fmt: skip
    if name in manifest:
      value = manifest[name]
      shown = ticks.number(value) if isinstance(value, float) else str(value)
      rows.append((f'frozen: {name.replace("_", " ")}', shown))
  return rows


def _json(path: pathlib.Path) -> dict[str, Any]:
  """Returns the values of a JSON file; none if it is absent or damaged."""
  try:
    found = json.loads(path.read_text(encoding='utf-8'))
  except (OSError, ValueError):
    return {}
  return found if isinstance(found, dict) else {}


def _brief(values: Any) -> str:
  """Returns nested values on one line."""
  leaves = document.values(values)
  return ', '.join(f'{name} {value}' for name, value in leaves if value)


def main(argv: Sequence[str]) -> int:
  """Writes the report of a workdir, and says where it is."""
  del argv
  workdir = pathlib.Path(flags.FLAGS.workdir)
  try:
    text = make(workdir)
    atomic.write_text(workdir / file_names.REPORT, text)
  except FileNotFoundError:
    print(
      f'error: --workdir={workdir}: got no {file_names.RUN}, expected the'
      ' workdir of a run that has begun to train',
      file=sys.stderr,
    )
    return 1
  except (OSError, ValueError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  print(workdir / file_names.REPORT)
  return 0


if __name__ == '__main__':
  path_flags.DEFINE_path(
    'workdir', None, 'Directory of the run.', required=True
  )
  app.run(main)
