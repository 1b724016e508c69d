"""Compares two saved results example by example.

    python -m evals.compare A.json B.json
    python -m evals.compare A.json B.json --difference=0.005

A is the baseline. Prints, for every score that both have, the difference with
its interval and test, and how many examples would resolve it, and how many the
difference that --difference states.
"""

import sys

from absl import app, flags

from evals.results import report, scores


def main(argv: list[str]) -> int:
  """Compares the results that the arguments name."""
  if len(argv) != 3:
    raise app.UsageError(
      f'got {len(argv) - 1} files, expected two results: A.json B.json'
    )
  try:
    a, b = (scores.load(path) for path in argv[1:])
    print(report.compare(a, b, flags.FLAGS.difference))
  except (ValueError, FileNotFoundError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  return 0


def _define_flags() -> None:
  flags.DEFINE_float(
    'difference',
    0.0,
    'To be resolved; 0: a hundredth of a share, or of the value of a score.',
    lower_bound=0.0,
  )


if __name__ == '__main__':
  _define_flags()
  app.run(main)
