"""The load that fleets of 1, 2, 4, ... replicas carry: what to buy for a load.

    carried = sizes.carried(run, replicas=[1, 2, 4], ...)

For each number of replicas it searches the largest load, in requests per
second, whose percentiles are within the limits, up to a tenth. All fleets meet
the same bursts (`traffic`): every cycle of them has the same rates.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import json
import math
import pathlib
from typing import Any

from studies import prices as prices_lib
from studies.common import figure
from studies.fleet import fleet

STEP = 1.1  # between loads: a load is found up to this factor
_MOST_STEPS = 64  # from the first load: a factor of 446, up or down
_HEAD = (
  'replicas', 'placement', 'load', 'per replica', 'tokens/s', 'first p50',
  'first p99', 'token p99', 'cached', 'busy', 'devices', 'per hour',
  'per 1M tokens',
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Carried:
  """The largest load of a fleet within the limits."""

  num_replicas: int
  num_devices: int
  placement: str
  load: float  # requests per second; 0: none is within the limits
  found: fleet.Summary  # at that load, or at one that is too much


class Kept:
  """Simulations on the disk: a study that was ended goes on where it was."""

  def __init__(self, path: pathlib.Path, settings: Mapping[str, Any]):
    """Reads the file of results.

    Args:
      path: of the file, a line for each simulation.
      settings: of the study; simulations of others are not used.
    """
    self._path, self._settings = path, dict(settings)
    self._found: dict[str, fleet.Summary] = {}
    lines = path.read_text().splitlines() if path.exists() else []
    for line in lines:
      try:
        row = json.loads(line)
      except ValueError:
        continue  # the first, or one of a process that was killed
      if row['settings'] == self._settings:
        self._found[row['key']] = fleet.Summary(**row['found'])

  def get(self, key: str, make: Callable[[], fleet.Summary]) -> fleet.Summary:
    """Returns the simulation of a key, made if it is not there."""
    if key not in self._found:
      self._found[key] = found = make()
      row = {
        'settings': self._settings,
        'key': key,
        'found': dataclasses.asdict(found),
      }
      with self._path.open('a') as file:
        file.write('\n' + json.dumps(row))  # also ends a line that is torn
    return self._found[key]


def largest(
  run: Callable[[float], fleet.Summary],
  is_enough: Callable[[fleet.Summary], bool],
  first: float,
) -> tuple[float, fleet.Summary]:
  """Returns the largest load that is fast enough, and the speed at it.

  Args:
    run: simulates a load, in requests per second.
    is_enough: whether it is fast enough.
    first: load to begin with.
  """
  found: dict[int, fleet.Summary] = {}  # by steps from the first load

  def is_met(steps: int) -> bool:
    if steps not in found:
      found[steps] = run(first * STEP**steps)
    return is_enough(found[steps])

  # Away from the first load in growing strides, to a load on the other side.
  was_met, stride, steps = is_met(0), 1, 0
  sign = 1 if was_met else -1
  while is_met(steps) == was_met and abs(steps) < _MOST_STEPS:
    steps, stride = steps + sign * stride, 2 * stride
  low, high = sorted((steps, steps - sign * stride // 2))
  if is_met(low) == is_met(high):  # none is met, or all are
    return (first * STEP**low if was_met else 0.0), found[low]
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (middle, high) if is_met(middle) else (low, middle)
  return first * STEP**low, found[low]


def carried(
  run: Callable[[str, int, float], fleet.Summary],
  is_enough: Callable[[fleet.Summary], bool],
  *,
  replicas: Sequence[int],
  placement: str,
  tensor: int,
  first: float,
) -> list[Carried]:
  """Returns the largest load of each number of replicas.

  Args:
    run: simulates a placement, a number of replicas and a load.
    is_enough: whether a fleet is fast enough.
    replicas: numbers of them.
    placement: of requests on replicas.
    tensor: devices of a replica.
    first: load per replica to begin with.
  """
  made: list[Carried] = []
  for num in sorted(replicas):
    load, found = largest(
      lambda load, num=num: run(placement, num, load), is_enough, first * num
    )
    made.append(
      Carried(
        num_replicas=num,
        num_devices=num * tensor,
        placement=placement,
        load=load,
        found=found,
      )
    )
    if load:
      first = load / num
  return made


def table(found: Sequence[Carried], price: prices_lib.Price | None) -> str:
  """Returns the table of fleets, as Markdown."""
  lines = [_HEAD, ('---',) * len(_HEAD)]
  for each in found:
    speed = each.found
    hour = each.num_devices * price.device_hour if price else None
    lines.append(
      (
        f'{each.num_replicas}',
        each.placement,
        f'{each.load:.3g}/s' if each.load else 'none',
        f'{each.load / each.num_replicas:.3g}/s',
        f'{speed.tokens_per_s:,.0f}',
        f'{speed.to_first_p50:.3g} s',
        f'{speed.to_first_p99:.3g} s',
        f'{1000 * speed.per_token_p99:.3g} ms',
        f'{speed.cached:.0%}',
        f'{speed.busy:.0%}',
        f'{each.num_devices}',
        f'{hour:.2f} {price.currency}' if price and hour else '-',
        f'{hour / 3600 / speed.tokens_per_s * 1e6:.2f}' if hour else '-',
      )
    )
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def draw(path: str, found: Sequence[Carried]) -> None:
  """Draws the replicas that loads need, and what a replica carries.

  Args:
    path: of the SVG file.
    found: of one or several placements.
  """
  some = [each for each in found if each.load]
  names = list(dict.fromkeys(each.placement for each in some))

  def panel(
    title: str,
    labels: tuple[str, str],
    point: Callable[[Carried], tuple[float, float]],
    *,
    log_y: bool = False,
  ) -> figure.Panel:
    def line(name: str) -> figure.Line:
      points = [point(each) for each in some if each.placement == name]
      x, y = map(list, zip(*points, strict=True))
      return figure.Line(x=x, y=y, style='o-')

    # From zero, or differences within a step of the search would look large.
    highest = max(point(each)[1] for each in some)
    return figure.Panel(
      title=title,
      x_label=labels[0],
      y_label=labels[1],
      lines={name: line(name) for name in names},
      log_x=True,
      log_y=log_y,
      y_limits=None if log_y else (0.0, 1.2 * highest),
    )

  figure.save(
    path,
    [
      panel(
        'What to buy for a load',
        ('load (requests per second)', 'replicas'),
        lambda each: (each.load, each.num_replicas),
        log_y=True,
      ),
      panel(
        'What a replica carries',
        ('replicas', 'requests per second and replica'),
        lambda each: (each.num_replicas, each.load / each.num_replicas),
      ),
      panel(
        'What it finds in its cache',
        ('replicas', 'share of the prompt tokens'),
        lambda each: (each.num_replicas, each.found.cached),
      ),
    ],
    share_y=False,
  )


def counts(given: Sequence[str]) -> list[int]:
  """Returns the numbers of replicas of a flag.

  Raises:
    ValueError: one of them is no number above 0.
  """
  if not all(each.isdecimal() and int(each) > 0 for each in given):
    raise ValueError(
      f'--replicas: got {",".join(given)}, expected numbers of replicas, as'
      ' 1,2,4,8'
    )
  return sorted({int(each) for each in given})


def num_requests(load: float, seconds: float, least: int) -> int:
  """Returns the requests that a fleet is simulated with.

  Args:
    load: requests per second.
    seconds: of traffic.
    least: requests, so that a percentile of a small fleet means something.
  """
  return max(math.ceil(load * seconds), least)
