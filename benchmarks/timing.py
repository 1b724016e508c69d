"""Fair timing on a machine that other things happen on.

Two sides that are compared take turns, A B A B, so that a slow minute of the
machine falls on both; the figures are medians over rounds, and a ratio is the
median of the rounds' ratios. Every benchmark prints a table and, with `--out`,
writes what it measured as JSON.
"""

from collections.abc import Callable
import json
import os
import pathlib
import statistics
from typing import Any

from storage import atomic

# Runs once and returns the seconds it took.
Turn = Callable[[], float]


def interleave(turns: dict[str, Turn], rounds: int) -> dict[str, list[float]]:
  """Gives every side one turn per round; returns seconds per side.

  The order is reversed in every other round: whoever goes second would else
  always find the caches and the clock speed that the first left behind.
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
  """Returns a warning if others are using this machine's cores, or ''.

  Contention does not fall evenly: whoever synchronises more threads loses more
  to it, so a ratio measured on a busy machine flatters one of the sides.
  """
  cores = os.cpu_count() or 1
  load = os.getloadavg()[0]
  if load <= 0.5 * cores:
    return ''
  return (
    f'note: load average {load:.1f} on {cores} cores before the start; measure'
    ' again on an idle machine before believing a ratio'
  )


def table(title: str, rows: list[tuple[str, ...]]) -> str:
  """Formats rows under a title; the first row holds the column heads."""
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
  """Writes a result; an existing file is replaced only by a whole one."""
  target = pathlib.Path(path).expanduser()
  target.parent.mkdir(parents=True, exist_ok=True)
  atomic.write_text(target, json.dumps(result, indent=2) + '\n')
