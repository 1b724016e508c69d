"""The port of measurements: input and result of a claim's function."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import pathlib

from evals import claims as claims_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
  """The inputs of a measurement."""

  seeds: Sequence[int]  # empty for a claim without seeds
  # Keeps the runs of the measurement; the next start resumes them.
  workdir: pathlib.Path
  inputs: Mapping[str, str]  # paths of the files that the claim names


class Stopped(Exception):
  """A signal stopped a run; the same command resumes it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interval:
  """A value with an interval of its own, at 95 %, such as of a bootstrap."""

  value: float
  low: float
  high: float


# One number is an exact value. A sequence has one number per seed; its mean
# counts.
Value = float | Interval | Sequence[float]
# The measured value of each quantity of the claim, by its name.
Measured = Mapping[str, Value]
Measure = Callable[[claims_lib.Claim, Setting], Measured]
