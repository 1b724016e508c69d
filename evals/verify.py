r"""Gives the answers in a file their scores, by a verifier.

    python -m evals.verify --verifier=unit_tests --input=answers.jsonl \
      --out=scored.jsonl

A line of the input has `completion`, the text of an answer, and the fields that
the verifier reads, such as `answer` or `tests` (evals/verifiers/kinds.py). The
output has the same lines, each with `score` and `reason`. `python serve.py
--model=DIR --eval=verify:FILE` asks a model for the answers.
"""

from collections.abc import Sequence
import json
import pathlib
import sys

from absl import app, flags
import numpy as np

from checks import path_flags
from evals.results import statistics
from evals.tasks import records
from evals.verifiers import kinds, verifier
from evals.verifiers.sandbox import runner
from storage import atomic


def verify_file(
  name: str, source: str, out: str, workers: int = 0
) -> Sequence[verifier.Score]:
  """Writes the lines of a file with the score of each; returns the scores.

  Raises:
    FileNotFoundError: there is no file.
    ValueError: a line is wrong, or there is no such verifier.
    ModuleNotFoundError: the verifier needs a package that is not installed.
    Unavailable: the verifier needs a sandbox, which this system does not have.
  """
  rule = kinds.named(name)
  found = records.read(source, required=('completion',), optional=None)
  answered = []
  for record in found:
    try:
      rule.check(record.fields)
    except ValueError as error:
      raise ValueError(f'{record.place}: {error}') from None
    answered.append((record.text('completion'), record.fields))
  scores = verifier.score_all(rule, answered, workers)
  lines = [
    json.dumps(
      record.fields | {'score': each.value, 'reason': each.reason},
      ensure_ascii=False,
    )
    for record, each in zip(found, scores, strict=True)
  ]
  atomic.write_text(pathlib.Path(out), '\n'.join(lines) + '\n')
  return scores


def main(argv: list[str]) -> int:
  """Scores the answers that the flags name."""
  if len(argv) > 1:
    raise app.UsageError(f'got arguments {argv[1:]}, expected flags only')
  values = flags.FLAGS
  try:
    scores = verify_file(
      values.verifier, values.input, values.out, values.workers
    )
  except (
    ValueError,
    OSError,
    ModuleNotFoundError,
    runner.Unavailable,
  ) as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  numbers = [each.value for each in scores]
  mean, error = np.mean(numbers), statistics.standard_error(numbers)
  failed = [each for each in scores if each.failure]
  print(f'{len(scores)} answers, mean score {mean:.4f} +- {error:.4f}')
  if failed:
    print(f'{len(failed)} count as 0 because their verifier failed; the first:'
          f' {failed[0].reason}')  # fmt: skip
  print(f'scored {values.out}')
  return 0


def _define_flags() -> None:
  flags.DEFINE_enum(
    'verifier', None, list(kinds.KINDS), 'The rule that gives the scores.'
  )
  path_flags.DEFINE_path(
    'input', None, 'JSON Lines file: completion, and fields for the verifier.'
  )
  path_flags.DEFINE_path(
    'out', None, 'File to write: the same lines, each with score and reason.'
  )
  flags.DEFINE_integer(
    'workers', 0, 'Answers at a time; 0: one per core.', lower_bound=0
  )
  flags.mark_flags_as_required(['verifier', 'input', 'out'])


if __name__ == '__main__':
  # Not at import: serve.py has flags of these names.
  _define_flags()
  app.run(main)
