"""The port of measurements: what a claim's function receives and returns."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import pathlib

from evals import claims as claims_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
  """What a measurement may use."""

  seeds: Sequence[int]  # empty for a claim without seeds
  # Keeps the runs of the measurement; the next one goes on from there.
  workdir: pathlib.Path
  inputs: Mapping[str, str]  # paths of the files that the claim names


class Stopped(Exception):
  """A signal stopped a run; the same command goes on with it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interval:
  """A value with an interval of its own, at 95 %, such as of a bootstrap."""

  value: float
  low: float
  high: float


# One number: exact. A sequence: one number per seed, of which the mean counts.
Value = float | Interval | Sequence[float]
# From the name of each quantity of the claim to what was measured.
Measured = Mapping[str, Value]
Measure = Callable[[claims_lib.Claim, Setting], Measured]
