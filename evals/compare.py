"""Compares two saved results example by example.

    python -m evals.compare A.json B.json
    python -m evals.compare A.json B.json --difference=0.005

A is the baseline. For every score that both results have, prints the difference
with its confidence interval and test. Then prints how many examples would show
this difference, and how many would show the difference in --difference.
"""

import sys

from absl import app, flags

from checks import paths
from evals.results import report, scores


def main(argv: list[str]) -> int:
  """Compares the results that the arguments name."""
  if len(argv) != 3:
    raise app.UsageError(
      f'got {len(argv) - 1} files, expected two results: A.json B.json'
    )
  try:
    files = [paths.expanded('file', path) for path in argv[1:]]
    a, b = (scores.load(path) for path in files)
    print(report.compare(a, b, flags.FLAGS.difference))
  except (ValueError, FileNotFoundError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  return 0


if __name__ == '__main__':
  flags.DEFINE_float(
    'difference',
    0.0,
    'Difference that you want to detect, on the scale of the score. The report'
    ' says how many examples that takes. 0: 0.01 of a share such as accuracy,'
    ' else 1 % of the value of the score.',
    lower_bound=0.0,
  )
  app.run(main)
