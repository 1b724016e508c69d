"""Routing: how much thinking a question deserves, against fixed efforts.

    python -m studies.routing --workdir=runs/think --figure=runs/routing.svg

Uses models and samples of `studies.test_time_scaling` in the same --workdir,
and makes them where they are missing. An effort is 1, 4 or 16 samples, of which
--chosen_by takes the majority, or the answer whose steps a program finds right;
`studies/think/routing.py` describes the ways that are compared.
Printed are, at several mean budgets, the accuracy of the best random mix, of
the router and of the oracle, and how much of the distance between mix and
oracle the router goes; the calibration error of P(correct), beside that of
perfect predictions; and the budget that was kept while requests are served one
by one. Then the same under shift: a predictor of the shorter half of the
lengths meets longer sums.

Written below --workdir: outcomes.jsonl and effort.json, the table and the
predictor of `python -m training.effort`, and routing.html. A server that takes
this predictor (--server.effort_predictor) does what was measured; the efforts
of --chosen_by=steps need --server.verifiers=column_sum there.
"""

from collections.abc import Sequence
import json
import pathlib
from typing import Any

from absl import app, flags
import numpy as np

from evals.results import calibration
from experiments import test_time_scaling as experiments
from frozen import effort_predictor, format as frozen_format
from storage import atomic
from studies import test_time_scaling
from studies.common import figure, study_flags
from studies.think import estimates, pool as pool_lib, routing
from training.effort import fit as fit_lib, outcomes
from training.reporting.page import charts, document

_SIZE = flags.DEFINE_enum(
  'size', 'large', experiments.SIZES, 'Model whose samples are routed.'
)
_POOLING = flags.DEFINE_enum(
  'pooling',
  'mean',
  ('mean', 'last'),
  'Hidden states of the prompt that the predictor reads.',
)
_CHOSEN_BY = flags.DEFINE_enum(
  'chosen_by',
  routing.MAJORITY,
  routing.EFFORTS,
  'How an effort chooses among its samples.',
)
NUM_BUDGETS = 5
REPORT, RESULTS = 'routing.html', 'routing.json'


def budgets_of(table: outcomes.Outcomes) -> list[float]:
  """Returns budgets between the cheapest and the dearest effort."""
  means_E = table.flops_BE.mean(axis=0)
  inside = np.geomspace(means_E[0], means_E[-1], NUM_BUDGETS + 2)[1:-1]
  return inside.tolist()


def shifted(
  table: outcomes.Outcomes, levels_B: np.ndarray, config: fit_lib.FitConfig
) -> tuple[outcomes.Outcomes, list[routing.Fold]]:
  """Returns the longer sums, and a fold whose predictor saw shorter ones."""
  middle = np.median(np.unique(levels_B))
  easy = np.random.default_rng(0).permutation(
    np.flatnonzero(levels_B <= middle)
  )
  num_kept = len(easy) // 4
  hard = table.take(np.flatnonzero(levels_B > middle))
  kept = table.take(easy[:num_kept])
  fitted = fit_lib.fit(table.take(easy[num_kept:]), kept, config)
  fold = routing.Fold(
    places=np.arange(len(hard)),
    calibration=kept,
    predictor=effort_predictor.Predictor(
      params=fitted.params, efforts=fitted.efforts, weights_digest=''
    ),
  )
  return hard, [fold]


def mistakes(
  table: outcomes.Outcomes, found: Sequence[routing.Fold], budget: float
) -> dict[str, float]:
  """Returns what the router does where it differs from the oracle.

  Too little: it pays less than the oracle, and loses accuracy. Too much: it
  pays more, for which it gains or loses accuracy.
  """
  weights_BE = routing.routed(table, found, budget)
  best_BE = routing.oracle(table, max(budget, 1.001 * _least(table)))
  paid_B, best_paid_B = (
    routing.value_Q(x, table.flops_BE) for x in (weights_BE, best_BE)
  )
  gap_B = routing.value_Q(weights_BE - best_BE, table.correct_BE)
  less_B, more_B = paid_B < 0.99 * best_paid_B, paid_B > 1.01 * best_paid_B
  return {
    'too little, share': float(less_B.mean()),
    'accuracy there': float(gap_B[less_B].mean()) if less_B.any() else 0.0,
    'too much, share': float(more_B.mean()),
    'accuracy there too': float(gap_B[more_B].mean()) if more_B.any() else 0.0,
  }


def _least(table: outcomes.Outcomes) -> float:
  return float(table.flops_BE.min(axis=1).mean())


def measured(
  table: outcomes.Outcomes,
  found: Sequence[routing.Fold],
  budgets: Sequence[float],
  num_tries: int,
) -> dict[str, Any]:
  """Returns all numbers of a table and its predictors."""
  probs_BE, _ = routing.predicted(table, found)
  ece, error, perfect, spread = routing.calibration_error(
    probs_BE, table.correct_BE, num_tries
  )
  rows = []
  for budget in budgets:
    at = routing.at_budget(table, found, budget)
    accuracy, spent = routing.paced(table, found, budget)
    low, high = at.share_interval()
    gain_B = at.accuracy['router'] - at.accuracy['mix']
    rows.append(
      {
        'budget': budget,
        **{name: float(x.mean()) for name, x in at.accuracy.items()},
        'spent / budget': float(at.flops['router'].mean()) / budget,
        'gain': float(gain_B.mean()),
        'gain interval': estimates.interval(gain_B),
        'share': at.share,
        'share interval': (low, high),
        'paced accuracy': accuracy,
        'paced spent / budget': spent / budget,
      }
    )
  return {
    'questions': len(table),
    'ece': ece,
    'ece error': error,
    'ece of perfect predictions': perfect,
    'its spread': spread,
    'always': {
      name: [
        float(table.correct_BE[:, e].mean()),
        float(table.flops_BE[:, e].mean()),
      ]
      for e, name in enumerate(table.efforts)
    },
    'budgets': rows,
    'mistakes': mistakes(table, found, budgets[len(budgets) // 2]),
    'reliability': [
      each._asdict()
      for each in calibration.bins(probs_BE.ravel(), table.correct_BE.ravel())
    ],
  }


_HEAD = [
  'FLOPs per question',
  'best mix',
  'router',
  'oracle',
  'gain over the mix',
  'part of the way to the oracle',
  'spent / budget',
  'spent / budget, paced',
]


def cells_of(numbers: dict[str, Any]) -> list[list[str]]:
  """Returns the rows of the table of budgets."""
  return [
    [
      f'{row["budget"]:.2e}',
      f'{row["mix"]:.3f}',
      f'{row["router"]:.3f}',
      f'{row["oracle"]:.3f}',
      f'{row["gain"]:+.3f} [{row["gain interval"][0]:+.3f},'
      f' {row["gain interval"][1]:+.3f}]',
      f'{row["share"]:.2f} [{row["share interval"][0]:.2f},'
      f' {row["share interval"][1]:.2f}]',
      f'{row["spent / budget"]:.3f}',
      f'{row["paced spent / budget"]:.3f}',
    ]
    for row in numbers['budgets']
  ]


def words_of(numbers: dict[str, Any]) -> list[str]:
  """Returns lines about calibration, fixed efforts and mistakes."""
  always = ', '.join(
    f'{name} {accuracy:.3f} at {flops:.2e} FLOPs'
    for name, (accuracy, flops) in numbers['always'].items()
  )
  wrong = ', '.join(f'{k} {v:.3f}' for k, v in numbers['mistakes'].items())
  return [
    f'{numbers["questions"]} questions; ECE {numbers["ece"]:.3f} +-'
    f' {numbers["ece error"]:.3f}; of perfect predictions'
    f' {numbers["ece of perfect predictions"]:.3f} +-'
    f' {numbers["its spread"]:.3f}',
    f'always one effort: {always}',
    f'where the router and the oracle differ: {wrong}',
  ]


def panels(numbers: dict[str, Any]) -> list[figure.Panel]:
  """Returns accuracy against FLOPs, and the reliability diagram."""
  rows = numbers['budgets']
  x = [row['budget'] for row in rows]
  always = list(numbers['always'].values())
  lines = {
    name: figure.Line(x=x, y=[row[name] for row in rows], style='.-')
    for name in ('mix', 'router', 'oracle')
  }
  lines['always one effort'] = figure.Line(
    x=[flops for _, flops in always], y=[y for y, _ in always], style='o'
  )
  bins = numbers['reliability']
  return [
    figure.Panel(
      title='routing',
      x_label='FLOPs per question',
      y_label='accuracy',
      lines=lines,
      log_x=True,
      log_base=10,
    ),
    figure.Panel(
      title='reliability of P(correct)',
      x_label='predicted',
      y_label='share of right answers',
      lines={
        'perfect': figure.Line(x=[0, 1], y=[0, 1], style=':'),
        'router': figure.Line(
          x=[each['confidence'] for each in bins],
          y=[each['accuracy'] for each in bins],
          style='.-',
        ),
      },
    ),
  ]


def _charts(found: Sequence[figure.Panel]) -> list[str]:
  """Returns the panels as figures of the page."""
  return [
    document.figure(
      panel.title,
      '',
      charts.svg(
        charts.Chart(
          title=panel.title,
          x=charts.Axis(label=panel.x_label, is_log=panel.log_x),
          y=charts.Axis(label=panel.y_label),
          series=[
            charts.Series(
              label=name,
              x=list(line.x),
              y=list(line.y),
              is_joined=line.style != 'o',
              colour=i,
            )
            for i, (name, line) in enumerate(panel.lines.items())
          ],
        )
      ),
    )
    for panel in found
  ]


def report(
  pool: pool_lib.Pool,
  workdir: pathlib.Path,
  *,
  pooling: str = 'mean',
  chosen_by: str = routing.MAJORITY,
  figure_path: str = '',
  config: fit_lib.FitConfig = fit_lib.FitConfig(),
) -> str:
  """Writes page, numbers and table of outcomes; returns the tables."""
  table = routing.outcomes_of(pool, pooling, chosen_by)
  outcomes.save(workdir / 'outcomes.jsonl', table)
  budgets, num = budgets_of(table), pool.codes_QN.shape[1]
  numbers = {
    'held out': measured(table, routing.folds(table, config), budgets, num)
  }
  hard, fold = shifted(table, pool.levels_Q, config)
  numbers['under shift'] = measured(hard, fold, budgets_of(hard), num)
  parts = ['<h1>Routing</h1>\n']
  lines = []
  for name, each in numbers.items():
    parts.append(document.heading(name.capitalize()))
    parts += [document.paragraph(words) for words in words_of(each)]
    parts += [
      document.table(_HEAD, cells_of(each)),
      document.figures(_charts(panels(each))),
    ]
    lines += [f'**{name}**', '', *words_of(each), '']
    lines.append(test_time_scaling.markdown('', _HEAD, cells_of(each)))
  atomic.write_text(workdir / REPORT, document.document('Routing', parts))
  atomic.write_text(workdir / RESULTS, json.dumps(numbers, indent=2) + '\n')
  if figure_path:
    figure.save(figure_path, panels(numbers['held out']), share_y=False)
  return '\n'.join(lines)


def freeze(
  table: outcomes.Outcomes, model: pathlib.Path, pooling: str
) -> effort_predictor.Predictor:
  """Returns the predictor that a server takes, of the table's own splits."""
  fitted = fit_lib.fit(table.split('train'), table.split('calibration'))
  manifest = frozen_format.open_directory(model).manifest
  return effort_predictor.Predictor(
    params=fitted.params,
    efforts=fitted.efforts,
    weights_digest=manifest.weights_digest,
    pooling=pooling,
  )


def main(argv: list[str]) -> None:
  """Makes what is missing; prints the tables."""
  workdir = study_flags.begin(argv)
  size, pooling = _SIZE.value, _POOLING.value
  try:
    pool = test_time_scaling.pool_of(
      workdir,
      size,
      0,
      num_per_level=study_flags.QUESTIONS_PER_LEVEL.value,
      num_samples=study_flags.SAMPLES_PER_QUESTION.value,
      steps=study_flags.STEPS.value,
    )
    print(
      report(
        pool,
        workdir,
        pooling=pooling,
        chosen_by=_CHOSEN_BY.value,
        figure_path=study_flags.FIGURE.value,
      )
    )
    predictor = freeze(
      outcomes.read(workdir / 'outcomes.jsonl'),
      workdir / f'{size}_0' / 'frozen',
      pooling,
    )
    effort_predictor.save(workdir / 'effort.json', predictor)
  except ValueError as error:
    raise SystemExit(f'error: {error}') from None
  print(f'wrote {workdir / "effort.json"}')


if __name__ == '__main__':
  app.run(main)
