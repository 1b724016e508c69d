"""Says whether runs differ, and how many seeds are needed to decide that.

    python -m studies.compare runs/a runs/b                   # two runs
    python -m studies.compare runs/a0,runs/a1,runs/a2 runs/b0,runs/b1,runs/b2
    python -m studies.compare runs/lr:3 runs/lr:best          # of a sweep
    E=experiments/muon_against_adamw.py
    python -m studies.compare $E:adamw $E:muon --seeds=5 --workdir=runs/compared

Sides are runs that exist, or experiments that are trained here first
(`comparison/sides.py` says how each is written). Every side is compared with
the first. The value of a run is the metric of its last evaluation.

A single run has no spread over seeds. For two single runs, the answer is the
largest spread at which a number of seeds would be enough; --spread_of=RUNS
takes the spread of other runs of the same kind. `comparison/differences.py` has
the tests.
"""

import math
import pathlib
import statistics

from absl import app, flags, logging

from hardware import host_memory
from studies.common import figure, study_flags
from studies.comparison import differences, sides, trained

_METRIC = flags.DEFINE_string(
  'metric',
  'loss',
  'A value of the evaluations in metrics.jsonl, as loss, bits_per_byte,'
  ' accuracy or TASK/SCORE; or a speed, as tokens_per_s.',
)
_SPREAD_OF = flags.DEFINE_string(
  'spread_of',
  '',
  'Runs of one experiment with several seeds, written like a side. Their spread'
  ' is taken for sides that have one run each.',
)
_NUM_SEEDS = 5  # of each experiment
_EXAMPLES = (3, 10)  # seeds, for sides without a spread
_MOST_FIELDS = 6  # of the config


def report(
  first: sides.Side,
  second: sides.Side,
  metric: str,
  like: sides.Side | None = None,
) -> str:
  """Returns a comparison as text."""
  found = differences.compare(
    first.values, second.values, None if like is None else like.values
  )
  lines = [
    *(
      f'{name:10} {side.name}: {metric} {_values(side)}'
      for name, side in (('first', first), ('second', second))
    ),
    *_notes(first, second),
  ]
  if not found.test:
    lines.append(f'difference {found.difference:+.4g}')
    return '\n'.join([*lines, f'verdict    {_without_spread(found)}'])
  lines.append(
    f'difference {found.difference:+.4g}, 95 % interval {found.low:+.4g} to'
    f' {found.high:+.4g} ({found.test}; p = {found.p_value:.3g})'
  )
  if math.isinf(found.seeds_to_know):
    verdict = 'no difference'
  elif math.isnan(found.seeds_to_know):
    verdict = 'cannot be told: all seeds differ alike'
  elif found.differs:
    verdict = 'they differ'
  else:
    verdict = 'not known: the interval includes 0'
  if math.isfinite(found.seeds_to_know):
    least = max(2, math.ceil(found.seeds_to_know))
    verdict += (
      f'; seeds to know a difference of this size, on each side: {least}'
    )
  return '\n'.join([*lines, f'verdict    {verdict}'])


def _without_spread(found: differences.Comparison) -> str:
  if not found.difference:
    return 'no difference, in one run on each side'
  enough = ', '.join(
    f'{seeds} are enough up to'
    f' {differences.most_spread(found.difference, seeds):.2g}'
    for seeds in _EXAMPLES
  )
  return (
    'not known: one run on each side has no spread over seeds. Seeds to know a'
    f' difference of this size, by the standard deviation over seeds: {enough}.'
    ' Train a second seed (--config.seed=1), or name runs like these with'
    ' --spread_of'
  )


def _notes(first: sides.Side, second: sides.Side) -> list[str]:
  """Returns further differences between two sides: steps and config."""
  lines = []
  if first.step != second.step:
    lines.append(
      f'note       last evaluations at steps {first.step} and {second.step}'
    )
  changed = sides.config_differences(first.config, second.config)
  lines += [f'config     {each}' for each in changed[:_MOST_FIELDS]]
  if len(changed) > _MOST_FIELDS:
    lines.append(f'config     and {len(changed) - _MOST_FIELDS} more fields')
  if not changed and first.values.keys() == second.values.keys():
    lines.append('config     the same, with the same seeds')
  return lines


def _values(side: sides.Side) -> str:
  """Returns the mean of a side, and its values by seed."""
  values = [side.values[seed] for seed in sorted(side.values)]
  if len(values) == 1:
    return f'{values[0]:.4f}, one run (seed {next(iter(side.values))})'
  listed = ' '.join(f'{value:.4f}' for value in values)
  return f'{statistics.mean(values):.4f}, {len(values)} seeds: {listed}'


def _sides(places: list[str], metric: str) -> list[sides.Side]:
  """Trains the experiments among the places; returns all sides."""
  experiments = [place for place in places if trained.is_experiment(place)]
  made = {}
  if experiments:
    # Orbax logs many lines, warnings included, about successful saves.
    host_memory.reuse_freed_memory()
    made = trained.train(
      experiments,
      seeds=study_flags.SEEDS.value or _NUM_SEEDS,
      num_steps=study_flags.STEPS.value,
      workdir=pathlib.Path(study_flags.required_workdir()),
      tell=lambda line: print(line, flush=True),
    )
  return [
    sides.of_workdirs(place, made[place], metric)
    if place in made
    else sides.read(place, metric)
    for place in places
  ]


def main(argv: list[str]) -> int:
  """Prints the comparison of each side with the first."""
  if len(argv) < 3 or len({*argv[1:]}) < len(argv) - 1:
    raise app.UsageError(
      f'got {len(argv) - 1} sides, expected two or more different ones, as in'
      ' python -m studies.compare runs/a runs/b'
    )
  logging.set_verbosity(logging.ERROR)
  metric = _METRIC.value
  try:
    like = sides.read(_SPREAD_OF.value, metric) if _SPREAD_OF.value else None
    if like is not None and len(like.values) < 2:
      raise ValueError(
        f'--spread_of: got {_SPREAD_OF.value!r}, which has one run, expected'
        ' several seeds of one experiment'
      )
    first, *others = _sides(argv[1:], metric)
    print('\n\n'.join(report(first, each, metric, like) for each in others))
    if study_flags.FIGURE.value:
      figure.save(study_flags.FIGURE.value, [trained.curves([first, *others])])
  except trained.Stopped:
    print('stopped; the same command resumes from here')
    return 1
  except (ValueError, OSError) as error:
    print(f'error: {error}')
    return 1
  return 0


if __name__ == '__main__':
  app.run(main)
