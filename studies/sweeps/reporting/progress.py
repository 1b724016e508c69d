"""The terminal of a sweep: all trials while they run, and the table at the end.

Counts and values come from the storage, so that the trials of other processes
are shown too; the step of a running trial is known only in its own process.
"""

import collections
from collections.abc import Iterator
import contextlib
import math
import time

import rich.console
import rich.live
import rich.table
import rich.text

from studies.sweeps import store as store_lib
from studies.sweeps.reporting import results as results_lib

_SECONDS = 2.0  # between two reads of the storage
_MOST_ROWS = 20  # of the live table
_FILE_WIDTH = 240  # characters of the last table, where it goes into a file


class Progress:
  """Shows the trials of a sweep; on a terminal, live."""

  def __init__(self, console: rich.console.Console, store: store_lib.Store):
    self._console = console
    self._store = store
    self._steps: dict[int, str] = {}  # by point
    self._rows: list[store_lib.Row] = []
    self._asked_at = -math.inf
    self._told: set[int] = set()  # numbers of finished trials

  @contextlib.contextmanager
  def shown(self) -> Iterator[None]:
    """Shows the table while the block runs."""
    self._refresh()
    self._told = {r.number for r in self._rows if _is_finished(r)}
    if not self._console.is_terminal:
      yield
      self.tell_finished()
      return
    with rich.live.Live(
      get_renderable=self._table,
      console=self._console,
      refresh_per_second=1,
      transient=True,
    ):
      yield

  def update(self, point: int, seed: int | None, step: int) -> None:
    """Notes where a trial of this process is."""
    which = 'step' if seed is None else f'seed {seed}, to step'
    self._steps[point] = f'{which} {step}'
    if not self._console.is_terminal:
      self.tell_finished()

  def tell_finished(self) -> None:
    """Prints a line for each trial that has finished since the last call."""
    self._refresh()
    for row in self._rows:
      if _is_finished(row) and row.number not in self._told:
        self._told.add(row.number)
        self.say(
          f'trial {row.point}: {results_lib.written(row.params)}: {row.state}'
          f' {results_lib.value_text(row)}'
          + (f' ({row.note})' if row.note else '')
        )

  def say(self, text: str) -> None:
    """Prints a line that stays."""
    self._console.print(text, highlight=False, markup=False, soft_wrap=True)

  def _refresh(self) -> None:
    if time.monotonic() - self._asked_at >= _SECONDS or not (
      self._console.is_terminal
    ):
      self._rows = self._store.rows()
      self._asked_at = time.monotonic()

  def _table(self) -> rich.console.Group:
    self._refresh()
    rows, sweep = self._rows, self._store.sweep
    counts = collections.Counter(row.state for row in rows)
    states = ', '.join(f'{n} {state}' for state, n in counts.items())
    table = rich.table.Table(box=None, pad_edge=False)
    for name in ('trial', 'state', *sweep.parameters, sweep.metric, 'at'):
      table.add_column(name)
    active = [row for row in rows if row.state == 'running']
    others = [row for row in rows if _is_finished(row)]
    for row in [*active, *reversed(others)][:_MOST_ROWS]:
      last = max(row.intermediate, default=None)
      value = (
        results_lib.figure(row.intermediate[last])
        if row.value is None and last is not None
        else results_lib.value_text(row)
      )
      place = self._steps.get(row.point) if row in active else None
      table.add_row(
        str(row.point),
        row.state,
        *(results_lib.short(row.params.get(n, '')) for n in sweep.parameters),
        value,
        place or row.note,
      )
    return rich.console.Group(
      rich.text.Text(f'{sweep.name}: {states} of {sweep.count()} trials'), table
    )


def _is_finished(row: store_lib.Row) -> bool:
  return row.state in store_lib.FINISHED


def show_results(
  results: results_lib.Results, console: rich.console.Console
) -> None:
  """Prints the table of all trials and the summary."""
  sweep = results.sweep
  table = rich.table.Table(box=None, pad_edge=False)
  for name in ('trial', 'state', *sweep.parameters, f'{sweep.metric}, 95 %'):
    table.add_column(name)
  table.add_column('note')
  for row in results_lib.ranked(results):
    table.add_row(
      str(row.point),
      row.state,
      *(results_lib.short(row.params.get(n, '')) for n in sweep.parameters),
      results_lib.value_text(row),
      row.note,
    )
  # A file has no width: nothing is wrapped there.
  console.print(table, width=None if console.is_terminal else _FILE_WIDTH)
  for line in results_lib.summary(results):
    console.print(line, highlight=False, markup=False, soft_wrap=True)
