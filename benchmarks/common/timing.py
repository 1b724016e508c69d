"""Fair timing on a shared machine, and the form of results.

The sides of a comparison take turns, so that a slow minute of the machine slows
all of them. Figures are medians over rounds, and a ratio is the median of the
rounds' ratios. Every benchmark prints a table and, with `--out`, writes its
result as JSON.
"""

from collections.abc import Callable
import json
import os
import pathlib
import statistics
from typing import Any

from storage import atomic

# Runs one side once; returns the seconds taken.
Turn = Callable[[], float]


def interleave(turns: dict[str, Turn], rounds: int) -> dict[str, list[float]]:
  """Gives every side one turn per round; returns the seconds of each turn.

  Every second round has the reverse order. Otherwise the same side would always
  run with the caches and the clock speed that another side left behind.
  """
  seconds = {name: [] for name in turns}
  for i in range(rounds):
    names = list(turns)
    for name in names if i % 2 == 0 else reversed(names):
      seconds[name].append(turns[name]())
  return seconds


def median_ratio(numerator: list[float], denominator: list[float]) -> float:
  """Returns the median over rounds of numerator / denominator."""
  pairs = zip(numerator, denominator, strict=True)
  return statistics.median(a / b for a, b in pairs)


def busy_note() -> str:
  """Returns a warning if other processes use this machine's cores, or ''.

  Contention does not slow all sides equally: a side that synchronises more
  threads loses more time, so a ratio from a busy machine is biased.
  """
  cores = os.cpu_count() or 1
  load = os.getloadavg()[0]
  if load <= 0.5 * cores:
    return ''
  return (
    f'note: load average {load:.1f} on {cores} cores before the start; trust a'
    ' ratio only from an idle machine'
  )


def table(title: str, rows: list[tuple[str, ...]]) -> str:
  """Returns rows as text under a title; the first row has the column heads."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = [title]
  for row in rows:
    first, *rest = [
      cell.rjust(width) if i else cell.ljust(width)
      for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    lines.append('  ' + '  '.join([first, *rest]).rstrip())
  return '\n'.join(lines)


def write_json(path: str, result: dict[str, Any]) -> None:
  """Writes a result; replaces an existing file only by a complete one."""
  target = pathlib.Path(path).expanduser()
  target.parent.mkdir(parents=True, exist_ok=True)
  atomic.write_text(target, json.dumps(result, indent=2) + '\n')
