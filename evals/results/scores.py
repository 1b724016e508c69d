"""The result of an evaluation: scores, their examples, and a file for both.

A result is saved with the value of every example, so that another result can be
compared with it example by example, now or years later.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import math
import os
import pathlib
from typing import Any

from evals.results import statistics
from storage import atomic, public_paths

FORMAT = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
  """One score and its standard error."""

  name: str
  value: float
  standard_error: float  # nan if unknown
  higher_is_better: bool
  per: str = 'example'  # the score is a mean per example | byte | token | word
  # One value per example. Their mean is `value`, or log(value) if the score is
  # an exponential. Empty if the score is no mean over examples.
  values: tuple[float, ...] = ()
  is_exponential: bool = False  # as perplexity is

  @property
  def is_share(self) -> bool:
    """Whether the score is a share of right answers, from 0 to 1."""
    return (
      bool(self.values)
      and self.per == 'example'
      and all(0 <= value <= 1 for value in self.values)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
  """Scores of the same examples."""

  name: str
  scores: tuple[Score, ...]
  num_examples: int
  example_ids: tuple[str, ...] = ()
  clusters: tuple[str, ...] | None = None  # see statistics.standard_error
  examples: tuple[Mapping[str, Any], ...] = ()  # questions and answers
  details: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  notes: tuple[str, ...] = ()  # caveats, for the reader of the scores

  def score(self, name: str) -> Score:
    """Returns the score of that name.

    Raises:
      KeyError: the group has no such score.
    """
    for score in self.scores:
      if score.name == name:
        return score
    raise KeyError(
      f'{self.name}: got {name!r}, expected one of'
      f' {", ".join(score.name for score in self.scores)}'
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
  """The result of one call of `evals.evaluate.run`."""

  task: str
  groups: tuple[Group, ...]
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  files: Mapping[str, str] = dataclasses.field(default_factory=dict)  # SHA-256

  def score(self, name: str) -> Score:
    """Returns the score of that name in the first group."""
    return self.groups[0].score(name)

  def to_json(self) -> dict[str, Any]:
    """Returns the result as JSON values; NaN and infinity become null.

    Files are named without the directories of this machine.
    """
    fields = dataclasses.asdict(self)
    kind, colon, path = self.task.partition(':')
    fields['task'] = f'{kind}{colon}{public_paths.public(path)}'
    for name in ('options', 'files'):
      fields[name] = _without_directories(fields[name])
    return _plain({'format': FORMAT, **fields})

  def save(self, path: str | os.PathLike) -> None:
    """Writes a file that `load` reads."""
    path = pathlib.Path(path)
    text = json.dumps(self.to_json(), ensure_ascii=False, allow_nan=False)
    atomic.write_text(path, text + '\n')


def _without_directories(fields: Mapping[str, Any]) -> dict[str, Any]:
  """Returns fields without directories in their names and texts."""
  found: dict[str, Any] = {}
  for name, value in fields.items():
    public = public_paths.public(name)
    if public in found:  # two files of one name
      public = f'{public} {len(found)}'
    is_path = isinstance(value, str)
    found[public] = public_paths.public(value) if is_path else value
  return found


def load(path: str | os.PathLike) -> Result:
  """Returns a saved result.

  Raises:
    FileNotFoundError: there is no file.
    ValueError: the file holds no result, or one of another format version.
  """
  path = pathlib.Path(path)
  try:
    tree = json.loads(path.read_text(encoding='utf-8'))
    version = tree['format']
    if version == FORMAT:
      del tree['format']
      groups = tuple(_group(group) for group in tree.pop('groups'))
      return Result(groups=groups, **tree)
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(
      f'{path}: got a file that cannot be read ({error!r}), expected a result'
      ' that an evaluation saved'
    ) from None
  raise ValueError(
    f'{path}: got a result of format {version!r}, expected {FORMAT}; evaluate'
    ' again with this version'
  )


def of_values(
  name: str,
  values: Sequence[float],
  *,
  higher_is_better: bool,
  clusters: Sequence[str] | None = None,
  per: str = 'example',
  is_exponential: bool = False,
) -> Score:
  """Returns the score whose value is the mean of `values`, or its exponential.

  Raises:
    ValueError: there are no values, or a value is NaN.
  """
  plain = tuple(float(value) for value in values)
  if not plain or any(math.isnan(value) for value in plain):
    raise ValueError(
      f'{name}: got {len(plain)} values,'
      f' {sum(map(math.isnan, plain))} of them NaN, expected at least one'
      ' value, and no NaN'
    )
  value = math.fsum(plain) / len(plain)
  error = statistics.standard_error(plain, clusters)
  if is_exponential:
    value = _exp(value)
    error = value * error  # to first order: d exp(x) = exp(x) dx
  return Score(
    name=name,
    value=value,
    standard_error=error,
    higher_is_better=higher_is_better,
    per=per,
    values=plain,
    is_exponential=is_exponential,
  )


def _exp(value: float) -> float:
  try:
    return math.exp(value)
  except OverflowError:
    return math.inf


def _group(tree: dict[str, Any]) -> Group:
  found = []
  for score in tree.pop('scores'):
    for name in ('value', 'standard_error'):
      if score[name] is None:
        score[name] = math.nan
    score['values'] = tuple(score['values'])
    found.append(Score(**score))
  for name in ('example_ids', 'examples', 'notes'):
    tree[name] = tuple(tree[name])
  if tree['clusters'] is not None:
    tree['clusters'] = tuple(tree['clusters'])
  return Group(scores=tuple(found), **tree)


def _plain(value: Any) -> Any:
  """Returns a value as JSON; NaN and infinity become null."""
  if isinstance(value, Mapping):
    return {str(key): _plain(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(item) for item in value]
  if hasattr(value, 'tolist'):  # an array or a number of NumPy
    return _plain(value.tolist())
  if isinstance(value, float) and not math.isfinite(value):
    return None
  if value is None or isinstance(value, str | bool | int | float):
    return value
  return str(value)
