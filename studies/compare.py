"""Says whether two sets of runs differ, and how many seeds it takes to know.

    python -m studies.compare runs/a0,runs/a1,runs/a2 runs/b0,runs/b1,runs/b2
    python -m studies.compare runs/lr/trials/0003 runs/lr/trials/0007

A set is a list of workdirs, or a directory whose subdirectories are workdirs,
as a trial of a sweep is. The metric is that of the last evaluation in
metrics.jsonl. Runs with the same seeds on both sides are paired (a paired t
test): a seed gives both the same order of data, and common noise cancels.
Otherwise the test is Welch's. `seeds to know` is the number of runs on each
side with which a test at 5 % would see the measured difference four times out
of five (normal approximation, two-sided).

Reference: Welch 1947, Biometrika 34, for unequal variances.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
import pathlib
import statistics

from absl import app, flags, logging
from scipy import stats

from checks import expect
from frozen import run_record
from storage import file_names
from training.reporting import metrics

_METRIC = flags.DEFINE_string(
  'metric', 'loss', 'A value of the evaluations in metrics.jsonl.'
)
_LEVEL, _POWER = 0.95, 0.8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
  """The difference of two sets of runs, second minus first."""

  difference: float
  low: float  # of the 95 % interval
  high: float
  p_value: float
  is_paired: bool
  # On each side; infinite if the means are equal, nan if nothing varies.
  seeds_to_know: float

  @property
  def differs(self) -> bool:
    """Whether the interval excludes zero."""
    return self.low > 0 or self.high < 0


def compare(
  first: Mapping[int, float], second: Mapping[int, float]
) -> Comparison:
  """Compares two sets of values by seed.

  Raises:
    ValueError: a side has fewer than two values.
  """
  for name, side in (('first', first), ('second', second)):
    expect.at_least(
      f'runs of the {name} set', len(side), 2, 'one run has no spread'
    )
  a, b = list(first.values()), list(second.values())
  is_paired = first.keys() == second.keys()
  mean = statistics.mean(b) - statistics.mean(a)
  if is_paired:
    gaps = [second[seed] - first[seed] for seed in sorted(first)]
    # The spread of one pair; of two independent runs otherwise.
    variance = statistics.variance(gaps)
    error, freedom = math.sqrt(variance / len(gaps)), len(gaps) - 1
  else:
    parts = [statistics.variance(side) / len(side) for side in (a, b)]
    variance = statistics.variance(a) + statistics.variance(b)
    error = math.sqrt(sum(parts))
    freedom = _welch(parts, (len(a), len(b)))
  half = float(stats.t.ppf((1 + _LEVEL) / 2, freedom)) * error
  p_value = (
    2 * float(stats.t.sf(abs(mean) / error, freedom)) if error else math.nan
  )
  return Comparison(
    difference=mean,
    low=mean - half,
    high=mean + half,
    p_value=p_value,
    is_paired=is_paired,
    seeds_to_know=_seeds_to_know(mean, variance),
  )


def _welch(parts: Sequence[float], sizes: Sequence[int]) -> float:
  """Returns the degrees of freedom of Welch and Satterthwaite."""
  total = sum(parts)
  if not total:
    return float(sum(sizes) - 2)
  below = sum(p * p / (n - 1) for p, n in zip(parts, sizes, strict=True))
  return total * total / below


def _seeds_to_know(mean: float, variance: float) -> float:
  if not mean:
    return math.inf
  if not variance:
    return math.nan
  z = float(stats.norm.ppf((1 + _LEVEL) / 2) + stats.norm.ppf(_POWER))
  return variance * (z / mean) ** 2


def read(place: str, metric: str) -> dict[int, float]:
  """Returns the metric of the last evaluation of each run, by seed.

  Args:
    place: workdirs with commas between them, or a directory of workdirs.

  Raises:
    ValueError: there is no run, a run has no evaluation or no such metric, or
      two runs have one seed.
  """
  found: dict[int, float] = {}
  for workdir in _workdirs(place):
    evals = [r for r in metrics.read(workdir) if r['kind'] == 'eval']
    if not evals:
      raise ValueError(
        f'{workdir}: got a run without an evaluation, expected one; train it to'
        ' its end'
      )
    if metric not in evals[-1]:
      names = sorted(evals[-1].keys() - {'kind', 'step'})
      expect.one_of('--metric', metric, names)
    seed = int(run_record.read(workdir)['config']['seed'])
    if seed in found:
      raise ValueError(
        f'{workdir}: got a second run of seed {seed}, expected each seed once;'
        ' leave one out'
      )
    found[seed] = evals[-1][metric]
  return found


def _workdirs(place: str) -> list[pathlib.Path]:
  found = []
  for each in place.split(','):
    path = pathlib.Path(each)
    if (path / file_names.RUN).exists():
      found.append(path)
      continue
    below = sorted(p.parent for p in path.glob(f'*/{file_names.RUN}'))
    if not below:
      raise ValueError(
        f'{each}: got a directory without runs, expected a workdir of train.py,'
        ' or a directory of workdirs'
      )
    found += below
  return found


def report(
  first: Mapping[int, float], second: Mapping[int, float], metric: str
) -> str:
  """Returns the comparison as text."""
  found = compare(first, second)
  kind = 'paired by seed' if found.is_paired else "Welch's, unpaired"
  lines = [
    f'first      {metric} {_mean(first)}',
    f'second     {metric} {_mean(second)}',
    f'difference {found.difference:+.4f}, 95 % interval {found.low:+.4f} to'
    f' {found.high:+.4f} ({kind}; p = {found.p_value:.3g})',
  ]
  if math.isnan(found.seeds_to_know):
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


def _mean(side: Mapping[int, float]) -> str:
  return f'{statistics.mean(side.values()):.4f}, {len(side)} seeds'


def main(argv: list[str]) -> int:
  """Prints the comparison of two sets of runs."""
  if len(argv) != 3:
    raise app.UsageError(
      f'got {len(argv) - 1} sets of runs, expected two, as in python -m'
      ' studies.compare runs/a runs/b'
    )
  logging.set_verbosity(logging.ERROR)
  try:
    first, second = (read(place, _METRIC.value) for place in argv[1:])
    print(report(first, second, _METRIC.value))
  except (ValueError, OSError) as error:
    print(f'error: {error}')
    return 1
  return 0


if __name__ == '__main__':
  app.run(main)
