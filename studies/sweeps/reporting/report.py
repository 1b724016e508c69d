"""report.html of a sweep: one file that needs no other, for screen and print.

It has the best point, figures, the table of all trials, the config, and the
versions and places of its inputs. It has the design of a run's report
(`training/reporting/page/`); figures are inside the page, and also SVG files
beside it, for papers.
"""

from collections.abc import Sequence
import datetime
import html
import pathlib

from storage import atomic, code_commit
from studies.sweeps.reporting import figures, results as results_lib
from training import experiment as experiment_lib
from training.reporting.page import document

PAGE, FIGURES = 'report.html', 'figures'


def save(
  results: results_lib.Results,
  experiment: experiment_lib.Experiment,
  workdir: pathlib.Path,
  place: str,
  rerun: Sequence[str] = (),
) -> None:
  """Writes report.html, and its figures as SVG files into figures/.

  Args:
    place: address of the storage, without a password.
    rerun: flags of train.py that train the best point.
  """
  sweep = results.sweep
  parts = [f'<h1>Sweep {html.escape(sweep.name)}</h1>\n', *_summary(results)]
  if rerun and results.best is not None:
    command = html.escape(f'python train.py {" ".join(rerun)} --workdir=...')
    parts.append(f'<p>To train the best point:</p><pre>{command}</pre>\n')
  drawn = figures.of_results(results)
  if drawn:
    parts.append(document.heading('Figures'))
    parts.append(
      document.figures(
        document.figure(
          each.title, each.caption, each.svg(), is_whole=each.is_whole
        )
        for each in drawn
      )
    )
  parts += [document.heading('Trials'), _table(results)]
  parts += _lineage(results, place)
  for title, values in (
    ('Sweep', sweep.to_dict()),
    ('Experiment', experiment.to_dict()),
  ):
    leaves = document.values(values)
    inside = document.table([], leaves)
    parts.append(document.details(f'{title}: {len(leaves)} fields', inside))
  directory = workdir / FIGURES
  if drawn:
    atomic.make_directory(directory)
  for each in drawn:
    atomic.write_text(directory / f'{each.name}.svg', each.svg(is_file=True))
  page = document.document(f'{sweep.name} - a sweep', parts)
  atomic.write_text(workdir / PAGE, page)


def _summary(results: results_lib.Results) -> list[str]:
  found = []
  for line in results_lib.summary(results):
    name, _, words = line.partition(' ')
    if name.startswith('error'):
      found.append(document.paragraph(line, 'wrong'))
    else:
      words = words.strip().replace('+-', '±')
      found.append(f'<p><b>{name}</b> {html.escape(words)}</p>\n')
  return found


def _table(results: results_lib.Results) -> str:
  names = list(results.sweep.parameters)
  metric = results.sweep.metric
  ranked = results_lib.ranked(results)
  best = None if results.best is None else results.best.point
  points = [row.point for row in ranked]
  return document.table(
    ['trial', 'state', *names, f'{metric}, mean and 95 %', 'note'],
    [
      [
        row.point,
        row.state,
        *(results_lib.short(row.params.get(name, '')) for name in names),
        results_lib.value_text(row).replace('+-', '±'),
        row.note,
      ]
      for row in ranked
    ],
    best=points.index(best) if best is not None else None,
  )


def _lineage(results: results_lib.Results, place: str) -> list[str]:
  made = datetime.datetime.now().astimezone().isoformat(' ', 'minutes')
  sweep = results.sweep
  rows = [
    ('page made', made),
    ('commit of the code', code_commit.find()),
    ('storage', place),
    ('study', sweep.name),
    ('metric', f'{sweep.metric} ({sweep.direction})'),
    ('seeds of a trial', str(sweep.num_seeds)),
  ]
  return [document.heading('Lineage'), document.table([], rows)]
