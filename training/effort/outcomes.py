"""Logged outcomes: the result of each question at each effort.

Each line of the file is one question:

    {"id": "...", "features": [0.1, ...],
     "outcomes": {"low": {"correct": 1, "flops": 2e7, "tokens": 31}, ...}}

`correct` is 0 or 1, or the share of several tries that was right. Every line
has the same features and efforts. The file is JSON Lines; a damaged line is an
error, since a table that lost questions would be biased in silence.
"""

from collections.abc import Sequence
import dataclasses
import hashlib
import json
import math
import os
import pathlib
from typing import Any, Self

import numpy as np

from checks import expect
from storage import atomic

# Shares of the questions, by a hash of their id: questions that are logged
# again stay in their part.
SPLITS = {'train': 0.6, 'calibration': 0.2, 'test': 0.2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcomes:
  """A table of questions (B), features (F) and efforts (E)."""

  ids: tuple[str, ...]
  efforts: tuple[str, ...]  # from the cheapest to the dearest, by mean FLOPs
  features_BF: np.ndarray
  correct_BE: np.ndarray  # from 0 to 1
  flops_BE: np.ndarray
  tokens_BE: np.ndarray

  def __len__(self) -> int:
    return len(self.ids)

  def take(self, which: np.ndarray | Sequence[int]) -> Self:
    """Returns the table of some questions, by their places."""
    which = np.asarray(which, np.int64)
    return dataclasses.replace(
      self,
      ids=tuple(self.ids[i] for i in which),
      **{
        name: getattr(self, name)[which]
        for name in ('features_BF', 'correct_BE', 'flops_BE', 'tokens_BE')
      },
    )

  def split(self, name: str) -> Self:
    """Returns the questions of a part: train, calibration or test.

    Raises:
      ValueError: there is no such part, or it has no question.
    """
    expect.one_of('split', name, SPLITS)
    which = [i for i, each in enumerate(self.ids) if split_of(each) == name]
    if not which:
      raise ValueError(
        f'outcomes: got {len(self)} questions of which none is in {name},'
        ' expected at least one; log more questions'
      )
    return self.take(which)


def split_of(question_id: str) -> str:
  """Returns the part of a question; a function of its id alone."""
  digest = hashlib.sha256(f'outcome {question_id}'.encode()).digest()
  place = int.from_bytes(digest[:8]) / 2**64
  for name, share in SPLITS.items():
    if place < share:
      return name
    place -= share
  return name


def save(path: str | os.PathLike, table: Outcomes) -> None:
  """Writes a table."""
  lines = []
  for i, each in enumerate(table.ids):
    outcomes = {
      effort: {
        'correct': float(table.correct_BE[i, e]),
        'flops': float(table.flops_BE[i, e]),
        'tokens': float(table.tokens_BE[i, e]),
      }
      for e, effort in enumerate(table.efforts)
    }
    features = [float(f'{x:.7g}') for x in table.features_BF[i]]
    lines.append(
      json.dumps({'id': each, 'features': features, 'outcomes': outcomes})
    )
  atomic.write_text(pathlib.Path(path), '\n'.join(lines) + '\n')


def read(path: str | os.PathLike) -> Outcomes:
  """Returns the table of a file.

  Raises:
    ValueError: a line is not as above; the error names it.
    OSError: the file cannot be read.
  """
  rows: list[dict[str, Any]] = []
  text = pathlib.Path(path).read_text(encoding='utf-8')
  for number, line in enumerate(text.splitlines(), 1):
    place = f'{os.fspath(path)}, line {number}'
    row = _row(line, place)
    if rows and (
      row['outcomes'].keys() != rows[0]['outcomes'].keys()
      or len(row['features']) != len(rows[0]['features'])
    ):
      raise ValueError(
        f'{place}: got {len(row["features"])} features and the efforts'
        f' {sorted(row["outcomes"])}, expected'
        f' {len(rows[0]["features"])} and {sorted(rows[0]["outcomes"])}, as in'
        ' line 1'
      )
    rows.append(row)
  if not rows:
    raise ValueError(
      f'{os.fspath(path)}: got no line, expected one for each question'
    )
  efforts = list(rows[0]['outcomes'])

  def column(name: str) -> np.ndarray:
    return np.array(
      [[row['outcomes'][effort][name] for effort in efforts] for row in rows],
      np.float64,
    )

  order = np.argsort(column('flops').mean(axis=0), kind='stable')
  return Outcomes(
    ids=tuple(row['id'] for row in rows),
    efforts=tuple(efforts[e] for e in order),
    features_BF=np.array([row['features'] for row in rows], np.float64),
    correct_BE=column('correct')[:, order],
    flops_BE=column('flops')[:, order],
    tokens_BE=column('tokens')[:, order],
  )


def _row(line: str, place: str) -> dict[str, Any]:
  """Returns the checked fields of a line."""
  try:
    row = json.loads(line)
    outcomes = {
      str(effort): {
        name: float(each[name]) for name in ('correct', 'flops', 'tokens')
      }
      for effort, each in row['outcomes'].items()
    }
    found = {
      'id': str(row['id']),
      'features': [float(x) for x in row['features']],
      'outcomes': outcomes,
    }
  except (ValueError, TypeError, KeyError, AttributeError) as error:
    raise ValueError(
      f'{place}: got {expect.shown(line)}, expected an object with id, features'
      ' and outcomes, each effort with correct, flops and tokens'
      f' ({type(error).__name__}: {error})'
    ) from None
  if not outcomes:
    raise ValueError(f'{place}: got no effort, expected at least one')
  for effort, each in outcomes.items():
    if not 0 <= each['correct'] <= 1:
      raise ValueError(
        f'{place}: {effort}: got correct {each["correct"]}, expected a share'
        ' from 0 to 1'
      )
    if not (0 < each['flops'] < math.inf and 0 <= each['tokens'] < math.inf):
      raise ValueError(
        f'{place}: {effort}: got {each["flops"]} FLOPs and {each["tokens"]}'
        ' tokens, expected a positive and a finite number'
      )
  if not all(map(math.isfinite, found['features'])):
    raise ValueError(f'{place}: got features that are not finite')
  return found
