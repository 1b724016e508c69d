"""Train a larger model, or think longer? By the requests that will be served.

    python -m studies.train_or_think --workdir=runs/think --targets=0.3,0.5

Uses models and samples of `studies.test_time_scaling` in the same --workdir,
and makes them where they are missing. An option is a size, a strategy and a
number of samples. Its bill, in FLOPs, is its training, once, and its answers:

    bill = training + requests x FLOPs of a question

For each target accuracy, printed is the cheapest option of each size that
reaches it on half of the questions, its accuracy on the other half, and the
number of requests from which the larger size is cheaper. With --prices the
bills are in money, at equal shares of the device's peak for training and for
answers; `python -m studies.economics` has finer models of time.

The question is that of Snell et al. 2024 (arXiv:2408.03314), section 7.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import math

from absl import app, flags
import numpy as np

from checks import path_flags
from evals.results import pass_at_k
from experiments import test_time_scaling as experiments
from frozen import format as frozen_format
from storage import atomic, locks
from studies import prices as prices_lib, test_time_scaling
from studies.common import study_flags
from studies.think import strategies

RESULTS = 'train_or_think.json'
_SHARE = 0.4  # of the peak, for training and for answers alike


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bill:
  """An option that reaches a target, and what it costs."""

  name: str
  training: float  # FLOPs, once
  answer: float  # FLOPs of a question
  accuracy: float  # of the questions that did not choose it

  def total(self, requests: float) -> float:
    """Returns the FLOPs of the model and so many requests."""
    return self.training + requests * self.answer


def cheapest(
  among: Sequence[strategies.Option],
  levels_Q: np.ndarray,
  training: float,
  target: float,
) -> Bill | None:
  """Returns the option of one size that reaches a target for the least FLOPs.

  Chosen on one half of the questions, measured on the other; None if no option
  reaches the target.
  """
  seen = strategies.halves(levels_Q) == 0
  fitting = [x for x in among if x.accuracy_Q[seen].mean() >= target]
  if not fitting:
    return None
  best = min(fitting, key=lambda x: x.flops_Q[seen].mean())
  return Bill(
    name=best.name,
    training=training,
    answer=float(best.flops_Q[~seen].mean()),
    accuracy=float(best.accuracy_Q[~seen].mean()),
  )


def crossing(small: Bill, large: Bill) -> float:
  """Returns the requests from which the larger model is cheaper.

  0: from the first one on. inf: at no number, since its answers cost more.
  """
  if large.training <= small.training and large.answer <= small.answer:
    return 0.0
  saved = small.answer - large.answer
  if saved <= 0:
    return math.inf
  return max(0.0, (large.training - small.training) / saved)


def rows_of(
  bills: Mapping[float, Mapping[str, Bill | None]],
  price: prices_lib.Price | None = None,
) -> list[list[str]]:
  """Returns the rows of the table: a target, each size, and the crossing."""

  def shown(flops: float) -> str:
    if price is None:
      return f'{flops:.2e}'
    peak = price.peaks.flops_per_s['bfloat16'] * _SHARE
    return f'{price.of_seconds(flops / peak):.3g} {price.currency}'

  rows = []
  for target, found in bills.items():
    cells = [f'{target:.2f}']
    for size in experiments.SIZES:
      bill = found[size]
      cells.append(
        'not reached'
        if bill is None
        else f'{bill.name}: {bill.accuracy:.3f}, {shown(bill.training)} +'
        f' {shown(bill.answer)} per question'
      )
    small, large = (found[size] for size in experiments.SIZES)
    if small is None or large is None:
      cells.append('only large' if large else 'only small' if small else '-')
    else:
      at = crossing(small, large)
      cells.append('never' if math.isinf(at) else f'{at:.3g} requests')
    rows.append(cells)
  return rows


def _targets(values: Sequence[str]) -> list[float]:
  try:
    found = [float(each) for each in values]
  except ValueError:
    found = [-1.0]
  if not found or not all(0 < each <= 1 for each in found):
    raise ValueError(
      f'--targets: got {",".join(values)}, expected accuracies above 0 and at'
      ' most 1, as 0.3,0.5'
    )
  return found


def main(argv: list[str]) -> None:
  """Makes what is missing; prints the table."""
  workdir = study_flags.begin(argv)
  try:
    targets = _targets(flags.FLAGS.targets)
    price = prices_lib.read(flags.FLAGS.prices) if flags.FLAGS.prices else None
    curves, training, levels_Q = {}, {}, np.zeros(0)
    for size in experiments.SIZES:
      pool = test_time_scaling.pool_of(
        workdir,
        size,
        0,
        num_per_level=study_flags.QUESTIONS_PER_LEVEL.value,
        num_samples=study_flags.SAMPLES_PER_QUESTION.value,
        steps=study_flags.STEPS.value,
      )
      levels_Q = pool.levels_Q
      ks = pass_at_k.useful_ks(pool.codes_QN.shape[1])
      curves[size] = strategies.curves(pool, ks)
      frozen = frozen_format.open_directory(workdir / f'{size}_0' / 'frozen')
      training[size] = frozen.manifest.training_flops
  except (ValueError, OSError, locks.InUseError) as error:
    raise SystemExit(f'error: {error}') from None
  bills = {
    target: {
      size: cheapest(
        strategies.options({size: curves[size]}),
        levels_Q,
        training[size],
        target,
      )
      for size in experiments.SIZES
    }
    for target in targets
  }
  head = ['target', *experiments.SIZES, 'large is cheaper from']
  title = price.source if price else 'Bills in FLOPs'
  print(test_time_scaling.markdown(title, head, rows_of(bills, price)))
  tree = {
    target: {
      size: bill and dataclasses.asdict(bill) for size, bill in x.items()
    }
    for target, x in bills.items()
  }
  atomic.write_text(workdir / RESULTS, json.dumps(tree, indent=2) + '\n')


if __name__ == '__main__':
  flags.DEFINE_list('targets', ['0.3', '0.5', '0.7'], 'Accuracies to reach.')
  path_flags.DEFINE_path(
    'prices', '', 'Price file, see studies/prices.py; none: bills in FLOPs.'
  )
  app.run(main)
