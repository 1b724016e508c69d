"""Sweep: the fields of an experiment that a search varies, as values.

A file in `experiments/sweeps/` returns one from `get_sweep`; `sweep.py` runs it
(`studies/sweeps/`). A trial is a point: one value for each field. It is trained
with several seeds, and its value is their mean.
"""

from collections.abc import Mapping
import dataclasses
import itertools
import math
from typing import Any

from checks import expect

STRATEGIES = ('grid', 'random', 'qmc', 'tpe')
PRUNERS = ('none', 'median', 'asha', 'hyperband')
DIRECTIONS = ('minimize', 'maximize')
Scalar = bool | int | float | str


@dataclasses.dataclass(frozen=True)
class Choice:
  """One of a few values: numbers, booleans or strings."""

  values: tuple[Scalar, ...]

  def validate(self, name: str) -> None:
    """Raises ValueError for a space without points."""
    if not self.values:
      raise ValueError(
        f'parameters[{name!r}]: got an empty Choice, expected at least one'
        ' value; write them, as in Choice((1e-3, 3e-3))'
      )
    for value in self.values:
      if not isinstance(value, Scalar):
        raise ValueError(
          f'parameters[{name!r}]: got {value!r} in a Choice, expected numbers,'
          ' booleans and strings'
        )
    if len(set(self.values)) < len(self.values):
      raise ValueError(
        f'parameters[{name!r}]: got {self.values}, expected each value once'
      )

  def grid(self) -> list[Scalar]:
    """Returns the points of a grid."""
    return list(self.values)


@dataclasses.dataclass(frozen=True)
class Uniform:
  """A number between two others, both included."""

  low: float
  high: float
  points: int = 0  # number of points of a grid

  def validate(self, name: str) -> None:
    """Raises ValueError for an empty range."""
    _check_range(name, self)

  def grid(self) -> list[Scalar]:
    """Returns the points of a grid."""
    return list(_spaced(self.low, self.high, self.points))


@dataclasses.dataclass(frozen=True)
class LogUniform:
  """A positive number between two others, even in its logarithm."""

  low: float
  high: float
  points: int = 0  # number of points of a grid

  def validate(self, name: str) -> None:
    """Raises ValueError for an empty range, or one that includes 0."""
    if not self.low > 0:
      raise ValueError(
        f'parameters[{name!r}]: got low = {self.low}, expected more than 0 for'
        ' a LogUniform; raise it, or use Uniform'
      )
    _check_range(name, self)

  def grid(self) -> list[Scalar]:
    """Returns the points of a grid."""
    logs = _spaced(math.log(self.low), math.log(self.high), self.points)
    found: list[Scalar] = [math.exp(log) for log in logs]
    # Without the rounding of a logarithm, which may leave the range.
    return [self.low, *found[1:-1], self.high] if len(found) > 1 else found


@dataclasses.dataclass(frozen=True)
class Integer:
  """An integer from `low` to `high`, both included, in steps."""

  low: int
  high: int
  step: int = 1

  def validate(self, name: str) -> None:
    """Raises ValueError for an empty range."""
    for value in dataclasses.astuple(self):
      if type(value) is not int:
        raise ValueError(
          f'parameters[{name!r}]: got {value!r}, expected integers for Integer'
        )
    expect.at_least(f'parameters[{name!r}].step', self.step, 1)
    _check_range(name, self)
    expect.multiple_of(
      f'parameters[{name!r}]: high - low',
      self.high - self.low,
      'step',
      self.step,
    )

  def grid(self) -> list[Scalar]:
    """Returns the points of a grid: all integers."""
    return list(range(self.low, self.high + 1, self.step))


Space = Choice | Uniform | LogUniform | Integer


def _check_range(name: str, space: Any) -> None:
  if not (
    math.isfinite(space.low)
    and math.isfinite(space.high)
    and space.low < space.high
  ):
    raise ValueError(
      f'parameters[{name!r}]: got low = {space.low} and high = {space.high},'
      ' expected two finite numbers, low below high'
    )
  expect.at_least(
    f'parameters[{name!r}].points', getattr(space, 'points', 0), 0
  )


def _spaced(low: float, high: float, num: int) -> list[float]:
  if num == 1:
    return [(low + high) / 2]
  return [low + (high - low) * i / (num - 1) for i in range(num)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
  """A search over fields of an experiment."""

  name: str  # of the study in the storage
  # The space of each field, by its dotted name: optimizer.peak_lr.
  parameters: Mapping[str, Space]
  # grid: all combinations. random: independent draws. qmc: a scrambled Sobol
  # sequence, which leaves smaller gaps. tpe: proposes points like the better
  # ones so far (Bergstra et al. 2011, Algorithms for Hyper-Parameter
  # Optimization).
  strategy: str = 'grid'
  # Ends trials that are behind the others at an evaluation. median: below the
  # median. asha: outside the best 1/`reduction` at evaluations 1, reduction,
  # reduction^2, ... (Li et al., arXiv:1810.05934). hyperband: several of these
  # with different first evaluations (Li et al., arXiv:1603.06560).
  pruner: str = 'none'
  reduction: int = 3  # for asha and hyperband
  # A value of the evaluations in metrics.jsonl (loss, bits_per_byte, accuracy,
  # TASK/SCORE, reward), taken at the last step; or a speed (tokens_per_s), as
  # the median over the run. --metric overrides it.
  metric: str = 'loss'
  direction: str = 'minimize'  # minimize | maximize
  num_trials: int = 0  # 0 for a grid, which has a trial for each of its points
  num_seeds: int = 3  # of each trial: config.seed, config.seed + 1, ...
  sampler_seed: int = 0  # for random, qmc and tpe
  # Trials that a process claims at a time, to run them together. 0: as many as
  # fit; for tpe and with a pruner 8, since both learn from earlier trials.
  trials_at_once: int = 0

  def validate(self) -> None:
    """Raises ValueError for values that no search can use."""
    for name, allowed in (
      ('strategy', STRATEGIES),
      ('pruner', PRUNERS),
      ('direction', DIRECTIONS),
    ):
      value = getattr(self, name)
      fix = expect.meant(value, allowed).removeprefix('; ')
      expect.one_of(name, value, allowed, fix)
    if not self.name or not self.parameters:
      raise ValueError(
        f'sweep: got name = {self.name!r} and {len(self.parameters)}'
        ' parameters, expected a name and at least one parameter'
      )
    for name, space in self.parameters.items():
      if not isinstance(space, Space):
        raise ValueError(
          f'parameters[{name!r}]: got {space!r}, expected Choice, Uniform,'
          ' LogUniform or Integer'
        )
      space.validate(name)
    expect.at_least('num_seeds', self.num_seeds, 1)
    expect.at_least('num_trials', self.num_trials, 0)
    expect.at_least('trials_at_once', self.trials_at_once, 0)
    expect.at_least('reduction', self.reduction, 2)
    if 'seed' in self.parameters and self.num_seeds > 1:
      raise ValueError(
        f'num_seeds: got {self.num_seeds} with seed among the parameters,'
        ' expected 1; take seed out: every trial has several'
      )
    self._check_count()

  def _check_count(self) -> None:
    if self.strategy != 'grid':
      expect.at_least(
        'num_trials',
        self.num_trials,
        1,
        f'strategy {self.strategy} has no end of its own',
      )
      return
    for name, space in self.parameters.items():
      if not space.grid():
        raise ValueError(
          f'parameters[{name!r}]: got a grid without points, expected some; set'
          f' {type(space).__name__}(..., points=5), or another strategy'
        )
    if self.num_trials not in (0, len(self.grid())):
      raise ValueError(
        f'num_trials: got {self.num_trials} with strategy grid, expected 0 or'
        f' its number of points, {len(self.grid())}'
      )

  def grid(self) -> list[dict[str, Scalar]]:
    """Returns all combinations of the points of the parameters."""
    spaces = [space.grid() for space in self.parameters.values()]
    return [
      dict(zip(self.parameters, values, strict=True))
      for values in itertools.product(*spaces)
    ]

  def count(self) -> int:
    """Returns the number of trials."""
    return len(self.grid()) if self.strategy == 'grid' else self.num_trials

  def to_dict(self) -> dict[str, Any]:
    """Returns the sweep as JSON values."""
    fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    fields['parameters'] = {
      name: {'kind': type(space).__name__} | dataclasses.asdict(space)
      for name, space in self.parameters.items()
    }
    return fields
