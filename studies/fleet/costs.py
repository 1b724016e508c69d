"""The seconds of an engine's step: by a plan's roofline, or as measured.

A table says what a step of the scheduler costs; `replica` drives the scheduler
with it.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
from typing import NamedTuple, Protocol

import numpy as np

from inference.planning import plan as plan_lib
from inference.scheduling import spans
from models import flops


class Costs(Protocol):
  """What steps cost."""

  def seconds(self, step: spans.Step) -> float:
    """Returns the seconds of the device for a step."""
    ...

  def host(self, step: spans.Step) -> float:
    """Returns the seconds of the host for planning and sending a step."""
    ...


class Kind(NamedTuple):
  """What the time of a step depends on, where contexts are short."""

  num_decodes: int  # as the program is compiled
  num_chunks: int
  decode_steps: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roofline:
  """The least seconds of a device, divided by the share that is reached.

  Weights are read once per step and by each of its decode steps; keys and
  values as often as a token attends to them. A chunk reads them once.
  """

  plan: plan_lib.Plan
  efficiency: float  # share of the bound that steps reach, in (0, 1]
  host_seconds: float = 0.0  # per dispatch

  def __post_init__(self):
    if not 0 < self.efficiency <= 1:
      raise ValueError(
        f'--efficiency: got {self.efficiency}, expected a share of the bound,'
        ' above 0 and at most 1'
      )

  def seconds(self, step: spans.Step) -> float:
    """Returns the seconds of a step."""
    num_steps = max((each.length for each in step.decodes), default=1)
    chunk_tokens = sum(each.length for each in step.chunks)
    per_token, per_key = self._flops
    total = 0.0
    for turn in range(num_steps):
      decodes = [each for each in step.decodes if each.length > turn]
      keys = sum(each.start + turn + 1 for each in decodes)
      reads = keys
      tokens = len(decodes)
      if not turn:
        tokens += chunk_tokens
        reads += sum(each.start + each.length for each in step.chunks)
        # Each token of a chunk attends to those before it.
        keys += sum(
          each.length * (each.start + (each.length + 1) / 2)
          for each in step.chunks
        )
      total += max(
        (self._weights(tokens) + reads * self.plan.kv_bytes_per_token)
        / self.plan.peaks.bytes_per_s,
        (tokens * per_token + keys * per_key)
        / self.plan.peaks.flops_per_s[self.plan.dtype],
        self._links(tokens),
      )
    return total / self.efficiency

  def host(self, step: spans.Step) -> float:
    """Returns the seconds of the host for planning and sending a step."""
    del step
    return self.host_seconds

  @functools.cached_property
  def _flops(self) -> tuple[float, float]:
    """The FLOPs of a token, and per key that it attends to."""
    first = flops.forward_flops_per_token(self.plan.part, 0)
    return first, flops.forward_flops_per_token(self.plan.part, 1) - first

  @functools.cached_property
  def _found(self) -> dict[int, float]:
    return {}

  def _weights(self, tokens: int) -> float:
    """Returns the bytes of weights that a step of so many tokens reads."""
    if tokens not in self._found:
      self._found[tokens] = self.plan.step_bytes(tokens, 0)
    return self._found[tokens]

  def _links(self, tokens: int) -> float:
    rate = self.plan.peaks.link_bytes_per_s
    return self.plan.sent_bytes(tokens) / rate if rate else 0.0


class Call(NamedTuple):
  """One call of an engine's `step`, and its seconds."""

  sent: spans.Step | None  # planned and sent to the device
  landed: Kind | None  # whose tokens were taken
  seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
  """Seconds of an engine that was measured.

  Of each shape, seconds are a line over the decode steps of a dispatch. The
  host adds its own, and some for each sequence that gets a slot.
  """

  shapes: Sequence[tuple[int, int]]  # compiled: (decodes, chunks)
  lines: Mapping[tuple[int, int], tuple[float, float]]  # of 1 step, of others
  host_seconds: float
  seat_seconds: float
  most_steps: int  # decode steps of the longest dispatch

  def seconds(self, step: spans.Step) -> float:
    """Returns the seconds of the device for a step."""
    kind = kind_of(step, self.shapes)
    first, later = self.lines.get(kind[:2]) or self._nearest(kind)
    return first + later * (kind.decode_steps - 1)

  def host(self, step: spans.Step) -> float:
    """Returns the seconds of the host for planning and sending a step."""
    return self.host_seconds + self.seat_seconds * len(step.seated)

  def _nearest(self, kind: Kind) -> tuple[float, float]:
    """Returns the line of the measured shape that is most alike."""

    def distance(shape: tuple[int, int]) -> tuple[int, int]:
      return abs(shape[1] - kind.num_chunks), abs(shape[0] - kind.num_decodes)

    return self.lines[min(self.lines, key=distance)]


def kind_of(step: spans.Step, shapes: Sequence[tuple[int, int]]) -> Kind:
  """Returns the kind of a step: the smallest shape that holds it."""
  decodes, chunks = len(step.decodes), len(step.chunks)
  shape = min(
    (each for each in shapes if each[0] >= decodes and each[1] >= chunks),
    key=lambda each: (sum(each), each),
  )
  return Kind(*shape, max((each.length for each in step.decodes), default=1))


def fitted(
  calls: Sequence[Call], shapes: Sequence[tuple[int, int]]
) -> Measured:
  """Returns the costs that explain calls best, by least squares.

  Raises:
    ValueError: no call took tokens.
  """
  seen = sorted({each.landed[:2] for each in calls if each.landed})
  if not seen:
    raise ValueError('costs: got no measured step, expected at least one')
  rows = np.zeros((len(calls), 2 + 2 * len(seen)))
  for row, each in zip(rows, calls, strict=True):
    if each.sent is not None:
      row[:2] = 1, len(each.sent.seated)
    if each.landed:
      place = 2 + 2 * seen.index(each.landed[:2])
      row[place : place + 2] = 1, each.landed.decode_steps - 1
  seconds = np.array([each.seconds for each in calls])
  found = _not_negative(rows, seconds)
  host, seat, *lines = found.tolist()
  return Measured(
    shapes=shapes,
    lines=dict(
      zip(seen, zip(lines[::2], lines[1::2], strict=True), strict=True)
    ),
    host_seconds=host,
    seat_seconds=seat,
    most_steps=max(each.landed.decode_steps for each in calls if each.landed),
  )


def _not_negative(rows: np.ndarray, seconds: np.ndarray) -> np.ndarray:
  """Returns least squares without a term below 0, which noise would make."""
  used = np.ones(rows.shape[1], bool)
  while True:
    found = np.zeros(rows.shape[1])
    found[used] = np.linalg.lstsq(rows[:, used], seconds, rcond=None)[0]
    if (found >= 0).all():
      return found
    used &= found >= 0
