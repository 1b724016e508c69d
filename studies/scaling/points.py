"""Points of a scaling study: size, tokens and loss of trained models.

A CSV file has the columns `params`, `tokens` and `loss`, and `flops` where runs
belong to budgets. The columns of the points that Besiroglu et al.
(arXiv:2404.10102) read off figure 4 of Hoffmann et al. (arXiv:2203.15556) are
read as well: `Model Size`, `Training FLOP` and `loss`; their tokens are
C / 6N.
"""

import csv
import dataclasses
import math
import os
import pathlib

import numpy as np

from checks import expect
from storage import atomic

COLUMNS = 'params', 'tokens', 'loss', 'flops'
_SIZE, _COMPUTE = 'Model Size', 'Training FLOP'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Points:
  """Trained models, as vectors of one length, float64."""

  params: np.ndarray
  tokens: np.ndarray
  losses: np.ndarray  # nats per token
  flops: np.ndarray  # the budget that the model belongs to

  def __len__(self) -> int:
    """Returns the number of models."""
    return len(self.losses)

  def at(self, chosen: np.ndarray) -> 'Points':
    """Returns the points of indices or of a mask; an index may repeat."""
    return Points(
      **{
        field.name: getattr(self, field.name)[chosen]
        for field in dataclasses.fields(self)
      }
    )

  @property
  def budgets(self) -> np.ndarray:
    """Returns the budgets in FLOPs, ascending."""
    return np.unique(self.flops)


def make(params, tokens, losses, flops=None) -> Points:
  """Returns points of sequences; without `flops`, budgets are 6 N D."""
  params, tokens, losses = (
    np.asarray(values, float) for values in (params, tokens, losses)
  )
  flops = 6 * params * tokens if flops is None else np.asarray(flops, float)
  return Points(params=params, tokens=tokens, losses=losses, flops=flops)


def read(path: str | os.PathLike) -> Points:
  """Reads a CSV file of points.

  Raises:
    ValueError: the file is not there, lacks a column, has no rows, or has a
      value that is not a positive number; the text names the line.
  """
  try:
    with pathlib.Path(path).open(encoding='utf-8', newline='') as file:
      reader = csv.DictReader(file)
      rows, columns = list(reader), list(reader.fieldnames or [])
  except (OSError, UnicodeDecodeError, csv.Error) as error:
    raise ValueError(
      f'--points={path}: got {error}, expected a CSV file with the columns'
      ' params, tokens, loss'
    ) from None
  names = _columns(path, columns)
  if not rows:
    raise ValueError(
      f'--points={path}: got no rows, expected a trained model in each'
    )
  values = {
    name: [_number(path, row, i, name) for i, row in enumerate(rows, 2)]
    for name in names
  }
  if _SIZE in values:
    flops, params = np.array(values[_COMPUTE]), np.array(values[_SIZE])
    return make(params, flops / (6 * params), values['loss'], flops)
  return make(
    values['params'], values['tokens'], values['loss'], values.get('flops')
  )


def _columns(path, columns: list[str]) -> list[str]:
  """Returns the names of the columns to read."""
  if {_SIZE, _COMPUTE, 'loss'} <= set(columns):
    return [_SIZE, _COMPUTE, 'loss']
  missing = [name for name in COLUMNS[:3] if name not in columns]
  if missing:
    raise ValueError(
      f'--points={path}: got the columns {expect.shown(columns)}, expected'
      f' also {", ".join(missing)} (or {_SIZE}, {_COMPUTE}, loss)'
    )
  return [name for name in COLUMNS if name in columns]


def _number(path, row, line: int, name: str) -> float:
  text = row[name]
  try:
    value = float(text)
  except (TypeError, ValueError):
    value = math.nan
  if not (0 < value < math.inf):
    raise ValueError(
      f'--points={path}, line {line}: got {name} = {text!r}, expected a'
      ' positive number; correct the line or leave it out'
    )
  return value


def write(path: str | os.PathLike, points: Points) -> None:
  """Writes a CSV file that `read` reads."""
  lines = [','.join(COLUMNS)]
  columns = points.params, points.tokens, points.losses, points.flops
  for row in zip(*columns, strict=True):
    lines.append(','.join(repr(float(value)) for value in row))
  atomic.write_text(pathlib.Path(path), '\n'.join(lines) + '\n')


def without_highest(points: Points, count: int) -> Points:
  """Returns the points without the `count` models of highest loss."""
  if count >= len(points):
    raise ValueError(
      f'--drop_highest: got {count}, expected less than the {len(points)}'
      ' points of the file'
    )
  kept = np.sort(np.argsort(points.losses, kind='stable')[: -count or None])
  return points.at(kept)
