"""Writes problems as training data, one JSON object per line.

    python -m data.problems --out=problems/train.jsonl --count=2000
    python -m data.problems --out=problems/validation.jsonl --split=validation \
      --count=200
    python -m data.problems --out=pairs.jsonl --kind=pairs --difficulties=3 \
      --families=sums,words --levels=1,2 --seed=7

No two splits share a problem, for any seeds: the problems differ in content,
not only in wording. `data/problems/records.py` describes a line.
"""

import json
import pathlib
import sys

from absl import app, flags

from checks import path_flags
from data.problems import generator, records
from storage import atomic


def main(argv: list[str]) -> None:
  """Writes the file that the flags describe; errors are one line."""
  if len(argv) > 1:
    raise app.UsageError(f'got arguments {argv[1:]}, expected flags only')
  values = flags.FLAGS
  try:
    settings = generator.Settings(
      count=values.count,
      families=tuple(values.families),
      levels=tuple(values.levels),
      seed=values.seed,
      kind=values.kind,
      difficulties=tuple(values.difficulties),
      wrong=values.wrong,
    )
    made = records.make(settings, values.split)
    path = pathlib.Path(values.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_text(path, ''.join(json.dumps(each) + '\n' for each in made))
  except (ValueError, OSError) as error:
    sys.exit(f'error: {error}')
  print(f'wrote {len(made)} {values.kind} of {values.split} to {path}')


class _Numbers(flags.ArgumentParser):
  syntactic_help = 'a comma separated list of whole numbers'

  def parse(self, argument: str | list[int]) -> list[int]:
    items = argument.split(',') if isinstance(argument, str) else argument
    return [int(item) for item in items]


def _define_numbers(name: str, default: tuple[int, ...], text: str) -> None:
  written = ','.join(map(str, default))
  flags.DEFINE(_Numbers(), name, written, text)


if __name__ == '__main__':
  _defaults = generator.Settings()
  path_flags.DEFINE_path('out', None, 'JSONL file to write.', required=True)
  flags.DEFINE_enum('kind', _defaults.kind, generator.KINDS, 'Kind of records.')
  flags.DEFINE_enum(
    'split', 'train', tuple(generator.SPLITS), 'Split to write.'
  )
  flags.DEFINE_integer('count', _defaults.count, 'Number of problems.', 1)
  flags.DEFINE_list(
    'families',
    list(_defaults.families),
    f'Families of problems, from {", ".join(generator.FAMILIES)}.',
  )
  _define_numbers('levels', _defaults.levels, 'Levels, from 1 (easy) to 5.')
  flags.DEFINE_integer('seed', 0, 'Seed of the problems, 64 bits.')
  _define_numbers(
    'difficulties',
    _defaults.difficulties,
    'Kinds of wrong solutions, from easy to hard to see: 1 a wrong answer'
    ' without work, 2 a wrong operation, 3 a slip.',
  )
  flags.DEFINE_integer(
    'wrong',
    _defaults.wrong,
    'Percent of the conversations of --kind=chat whose solution is wrong.',
  )
  app.run(main)
