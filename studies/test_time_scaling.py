"""Accuracy against FLOPs of thinking: samples, votes and verifiers.

    python -m studies.test_time_scaling --workdir=runs/think --seeds=5 \
      --figure=runs/think.svg

Trains `experiments/test_time_scaling.py` in two sizes, for each seed, until
half of the answers are right (`studies/think/graded.py`). Each model gives
--samples_per_question answers to the same held-out additions of two to six
digits. Every strategy of `studies/think/strategies.py` is then evaluated from
these pools, without bias. Printed are the accuracies of a level, the accuracy
at equal FLOPs, and the compute-optimal choice per level, of levels that share a
budget, against best of n: both chosen on half of the questions and measured on
the other half. Intervals are 95 %, by the bootstrap over questions and seeds.
Runs and pools are kept below --workdir: the same command resumes. report.html
there has figures and tables.

    python -m studies.test_time_scaling --model=DIR --questions=gsm8k.jsonl \
      --workdir=runs/gsm8k --samples_per_question=64

measures votes of a model that is there (`studies/think/real_model.py`).
"""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import pathlib
from typing import NamedTuple

from absl import app, flags
import numpy as np

from checks import path_flags
from data.problems import generator, problem as problem_lib
from evals.results import pass_at_k
from experiments import test_time_scaling as experiments
from inference import generate
from storage import atomic, locks
from studies.common import figure, quiet_run, study_flags
from studies.think import (
  estimates,
  graded,
  pool as pool_lib,
  real_model,
  strategies,
)
from training.reporting.page import charts, document

NUM_SEEDS = 1
NUM_BUDGETS = 8
REPORT, RESULTS = 'report.html', 'test_time_scaling.json'
# By seed and size.
Pools = list[dict[str, pool_lib.Pool]]


def problems_of(
  num_per_level: int, split: str = 'validation', seed: int = 0
) -> list[problem_lib.Problem]:
  """Returns questions of a split, as many of each level; else held-out ones."""
  return [
    made
    for level in sorted(experiments.LEVELS.values())
    for made in generator.make(
      generator.Settings(
        count=num_per_level, families=('columns',), levels=(level,), seed=seed
      ),
      split,
    )
  ]


def trained(
  workdir: pathlib.Path, size: str, seed: int, steps: int = 0
) -> pathlib.Path:
  """Trains a model, if it is missing; returns its frozen directory.

  Args:
    workdir: of all runs and pools.
    size: of the model.
    seed: of its training.
    steps: of training at most; 0: those of the experiment.

  Raises:
    SystemExit: a signal stopped the run.
  """
  experiment = dataclasses.replace(experiments.get_config(size), seed=seed)
  experiment = quiet_run.shortened(experiment, steps)
  return graded.train(experiment, workdir / f'{size}_{seed}')


def pool_of(
  workdir: pathlib.Path,
  size: str,
  seed: int,
  *,
  num_per_level: int,
  num_samples: int,
  steps: int = 0,
) -> pool_lib.Pool:
  """Trains a model and draws its pool of samples, or reads the pool.

  Args:
    workdir: of all runs and pools.
    size: of the model.
    seed: of its training, and of its samples.
    num_per_level: questions.
    num_samples: of each question.
    steps: of training at most; 0: those of the experiment.

  Raises:
    SystemExit: a signal stopped the run.
    ValueError: a file of a pool is damaged.
  """
  path = workdir / f'{size}_{seed}_{num_per_level}x{num_samples}.npz'
  if path.exists():
    return pool_lib.load(path)
  directory = trained(workdir, size, seed, steps)
  found = pool_lib.draw(
    generate.load(directory, pool_lib.ENGINE),
    problems_of(num_per_level),
    num_samples=num_samples,
    max_tokens=experiments.MAX_TOKENS,
    seed=seed,
  )
  found.save(path)
  return found


class Point(NamedTuple):
  """A mean with its interval, and what it costs."""

  flops: float
  accuracy: float
  low: float
  high: float

  def text(self) -> str:
    """Returns the accuracy and its interval."""
    return f'{self.accuracy:.3f} [{self.low:.3f}, {self.high:.3f}]'


def point(accuracy_SQ: np.ndarray, flops_SQ: np.ndarray) -> Point:
  """Returns the mean over seeds and questions."""
  low, high = estimates.interval(accuracy_SQ)
  return Point(float(flops_SQ.mean()), float(accuracy_SQ.mean()), low, high)


# Points by size, strategy and k, in the order of the ks.
Lines = dict[str, dict[str, list[Point]]]


def lines_of(found: Sequence[Mapping], which: np.ndarray) -> Lines:
  """Returns the curves of all sizes and strategies on some questions.

  Args:
    found: by seed, curves by size and strategy.
    which: questions, by a mask.
  """
  first = found[0]
  return {
    size: {
      name: [
        point(
          np.stack([x[size][name].accuracy_KQ[i][which] for x in found]),
          np.stack([x[size][name].flops_KQ[i][which] for x in found]),
        )
        for i in range(len(curve.ks))
      ]
      for name, curve in first[size].items()
    }
    for size in first
  }


class Compared(NamedTuple):
  """Compute-optimal choice and best of n, at one budget."""

  budget: float
  optimal: Point
  best_of_n: Point
  gain: Point  # paired difference of the accuracies
  names: tuple[str, ...]  # options by level, of the first seed and half


def compared(
  found: Sequence[Mapping], levels_Q: np.ndarray, budgets: Sequence[float]
) -> list[Compared]:
  """Returns the comparison at each mean budget that pays an answer.

  Best of n chooses its size, its score and n by the same halves, but has one
  choice for all levels.
  """
  rows = []
  plain = (strategies.LIKELIEST, strategies.STEPS)
  for budget in budgets:
    pairs = [
      (
        strategies.allocated(strategies.options(x), levels_Q, budget),
        strategies.best_within(strategies.options(x, plain), levels_Q, budget),
      )
      for x in found
    ]
    complete = [(a, b) for a, b in pairs if a is not None and b is not None]
    if len(complete) < len(pairs):
      continue
    optimal, plainly = (
      (
        np.stack([pair[i].accuracy_Q for pair in complete]),
        np.stack([pair[i].flops_Q for pair in complete]),
      )
      for i in (0, 1)
    )
    rows.append(
      Compared(
        budget=budget,
        optimal=point(*optimal),
        best_of_n=point(*plainly),
        gain=point(optimal[0] - plainly[0], optimal[1] - plainly[1]),
        names=complete[0][0].names[0],
      )
    )
  return rows


def budgets_of(found: Sequence[Mapping]) -> list[float]:
  """Returns budgets from one answer to all samples of the small size."""
  small = min(
    (x[size] for x in found for size in x),
    key=lambda curves: curves[strategies.MAJORITY].flops_KQ.mean(),
  )[strategies.MAJORITY]
  means_K = small.flops_KQ.mean(axis=1)
  # A level above the mean has longer answers.
  return np.geomspace(1.5 * means_K[0], 4 * means_K[-1], NUM_BUDGETS).tolist()


def tables(
  by_level: Mapping[int, Lines], rows: Sequence[Compared], ks: Sequence[int]
) -> list[tuple[str, list[str], list[list[str]]]]:
  """Returns (title, head, rows) of each table."""
  digits = {level: number for number, level in experiments.LEVELS.items()}
  last = len(ks) - 1
  of_levels = []
  for level, lines in by_level.items():
    for size, curves in lines.items():
      cells = [f'{digits[level]}', size, curves[strategies.MAJORITY][0].text()]
      cells += [
        curves[name][last].text() for name in (*strategies.USABLE, _PASS)
      ]
      of_levels.append(cells)
  head = ['digits', 'size', strategies.ONCE]
  head += [f'{name}, n = {ks[last]}' for name in (*strategies.USABLE, _PASS)]
  budgets = [
    [
      f'{row.budget:.2e}',
      row.optimal.text(),
      row.best_of_n.text(),
      f'{row.gain.accuracy:+.3f} [{row.gain.low:+.3f}, {row.gain.high:+.3f}]',
      '; '.join(row.names),
    ]
    for row in rows
  ]
  return [
    ('Accuracy by level', head, of_levels),
    (
      'Compute-optimal choice per level against best of n',
      [
        'FLOPs per question',
        'compute-optimal',
        'best of n',
        'gain',
        'choices by level',
      ],
      budgets,
    ),
  ]


_PASS = strategies.COVERAGE


def markdown(title: str, head: list[str], rows: list[list[str]]) -> str:
  """Returns a table as Markdown, below its title."""
  lines = [
    f'{title}',
    '',
    f'| {" | ".join(head)} |',
    f'|{"---|" * len(head)}',
    *(f'| {" | ".join(row)} |' for row in rows),
    '',
  ]
  return '\n'.join(lines)


def charts_of(lines: Lines, rows: Sequence[Compared]) -> list[charts.Chart]:
  """Returns a chart of each size, and one of the comparison."""

  def series(label: str, points: Sequence[Point], colour: int):
    return charts.Series(
      label=label,
      x=[each.flops for each in points],
      y=[each.accuracy for each in points],
      low=[each.low for each in points],
      high=[each.high for each in points],
      colour=colour,
    )

  x = charts.Axis(label='FLOPs per question', is_log=True)
  y = charts.Axis(label='accuracy', low=0.0, high=1.0)
  found = [
    charts.Chart(
      title=f'Accuracy of the {size} model',
      x=x,
      y=y,
      series=[
        series(name, points, i)
        for i, (name, points) in enumerate(curves.items())
      ],
    )
    for size, curves in lines.items()
  ]
  if rows:
    found.append(
      charts.Chart(
        title='Compute-optimal per level, and best of n',
        x=x,
        y=y,
        series=[
          series('compute-optimal', [row.optimal for row in rows], 0),
          series('best of n', [row.best_of_n for row in rows], 1),
        ],
      )
    )
  return found


def panels(lines: Lines) -> list[figure.Panel]:
  """Returns a panel for each size."""
  return [
    figure.Panel(
      title=f'{size} model',
      x_label='FLOPs per question',
      y_label='accuracy',
      lines={
        name: figure.Line(
          x=[each.flops for each in points],
          y=[each.accuracy for each in points],
          low=[each.low for each in points],
          high=[each.high for each in points],
          style='.-',
        )
        for name, points in curves.items()
      },
      log_x=True,
      log_base=10,
      y_limits=(0.0, 1.0),
    )
    for size, curves in lines.items()
  ]


def report(pools: Pools, workdir: pathlib.Path, figure_path: str = '') -> str:
  """Writes page, results and figure; returns the tables as Markdown."""
  some = next(iter(pools[0].values()))
  num_samples = some.codes_QN.shape[1]
  ks = pass_at_k.useful_ks(num_samples)
  found = [
    {size: strategies.curves(pool, ks) for size, pool in each.items()}
    for each in pools
  ]
  levels_Q = some.levels_Q
  by_level = {
    int(level): lines_of(found, levels_Q == level)
    for level in np.unique(levels_Q)
  }
  overall = lines_of(found, np.ones(len(levels_Q), bool))
  rows = compared(found, levels_Q, budgets_of(found))
  made = tables(by_level, rows, ks)
  words = (
    f'{len(pools)} seeds, {len(levels_Q)} held-out questions,'
    f' {num_samples} samples of each; 95 % intervals by the bootstrap over'
    ' questions and seeds'
  )
  parts = ['<h1>Compute at test time</h1>\n', document.paragraph(words)]
  parts.append(
    document.figures(
      document.figure(each.title, '', charts.svg(each))
      for each in charts_of(overall, rows)
    )
  )
  for title, head, cells in made:
    parts += [document.heading(title), document.table(head, cells)]
  atomic.write_text(
    workdir / REPORT, document.document('Compute at test time', parts)
  )
  tree = {
    'overall': {
      size: {name: [p._asdict() for p in points] for name, points in x.items()}
      for size, x in overall.items()
    },
    'compared': [
      {
        'budget': row.budget,
        'optimal': row.optimal._asdict(),
        'best_of_n': row.best_of_n._asdict(),
        'gain': row.gain._asdict(),
        'choices': row.names,
      }
      for row in rows
    ],
  }
  atomic.write_text(workdir / RESULTS, json.dumps(tree, indent=2) + '\n')
  if figure_path:
    figure.save(figure_path, panels(overall))
  return '\n'.join([words, '', *(markdown(*each) for each in made)])


def main(argv: list[str]) -> None:
  """Trains and samples what is missing; prints the tables."""
  workdir = study_flags.begin(argv)
  pools: Pools = []
  try:
    if asked := asked_of_flags():
      print(real_model.report(asked, workdir, study_flags.FIGURE.value))
      return
    for seed in range(study_flags.SEEDS.value or NUM_SEEDS):
      pools.append({})
      for size in experiments.SIZES:
        pools[-1][size] = pool_of(
          workdir,
          size,
          seed,
          num_per_level=study_flags.QUESTIONS_PER_LEVEL.value,
          num_samples=study_flags.SAMPLES_PER_QUESTION.value,
          steps=study_flags.STEPS.value,
        )
        accuracy = pools[-1][size].is_right_QN.mean()
        print(f'{size}, seed {seed}: one sample {accuracy:.3f}', flush=True)
    print(report(pools, workdir, study_flags.FIGURE.value))
  except (ValueError, FileNotFoundError, locks.InUseError) as error:
    raise SystemExit(f'error: {error}') from None


def asked_of_flags() -> real_model.Settings | None:
  """Returns what --model is asked; None: there is no such flag.

  Raises:
    ValueError: --questions is missing, or --model.
  """
  values = flags.FLAGS
  if not values.model and not values.questions:
    return None
  return real_model.Settings(
    model=values.model,
    questions=values.questions,
    num_questions=values.num_questions,
    num_samples=study_flags.SAMPLES_PER_QUESTION.value,
    max_tokens=values.max_answer_tokens,
    temperature=values.temperature,
  )


def define_flags() -> None:
  """Defines the flags of a model that is there."""
  path_flags.DEFINE_path(
    'model',
    '',
    'Frozen directory of a model that answers --questions; empty: trains the'
    ' two models of the experiment.',
  )
  path_flags.DEFINE_path(
    'questions',
    '',
    'JSON Lines of question and answer, a number, as GSM8K has them (#### 42).',
  )
  flags.DEFINE_integer(
    'num_questions', 0, 'First questions of --questions; 0: all.', 0
  )
  flags.DEFINE_integer(
    'max_answer_tokens', 320, 'Tokens of an answer to --questions, at most.', 1
  )
  flags.DEFINE_float(
    'temperature', 0.8, 'Temperature of the answers to --questions.', 0.01
  )


if __name__ == '__main__':
  define_flags()
  app.run(main)
