"""The programs of process 0, each call of which the other processes repeat.

A call is sent as its verb and the values of the host. Arrays on the devices are
not among them: each process has its own part of the same ones.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import functools
import threading
from typing import Any

import numpy as np

from inference.engine import (
  adapter_table,
  device_state,
  engine_config,
  steps,
)
from inference.engine.compiled import (
  keys as keys_lib,
  late,
  pending as pending_lib,
  programs,
)
from inference.engine.drafting import making
from inference.engine.processes import leader as leader_lib
from inference.engine.spread import placement as placement_lib


class Programs(programs.Programs):
  """The compiled programs of an engine over several processes."""

  def __init__(self, leader: leader_lib.Leader, **fields: Any):
    """Compiles all programs that steps need; see `programs.Programs`.

    Args:
      leader: sends the calls.
      **fields: of `programs.Programs`.
    """
    self._leader, self._is_told = leader, False
    self._places: adapter_table.Places = fields['placement'].adapters
    # The others compile the same programs at the same time. None may be called
    # that one of them lacks.
    super().__init__(**{**fields, 'compile_all': True})
    self.masks: Any = _Masks(self.masks, leader)

  @contextlib.contextmanager
  def _told(self, verb: str, *values: Any) -> Iterator[None]:
    """Sends a call, unless it is a part of one that is sent already."""
    with self._leader.order:
      if self._is_told:
        yield
        return
      self._leader.tell(verb, *values)
      self._is_told = True
      try:
        yield
      finally:
        self._is_told = False

  def _noted(self, state: device_state.State) -> device_state.State:
    self._leader.latest = state
    return state

  def verify(self, shape, params, state, flat_I):
    with self._told('verify', shape, flat_I):
      state, pending = super().verify(shape, params, state, flat_I)
      return self._noted(state), pending

  def accept(self, state, pending, allowed_XRW=None):
    # Positions may have changed since `verify`.
    with self._told('accept', pending.flat_I, allowed_XRW):
      state, outputs = super().accept(state, pending, allowed_XRW)
      return self._noted(state), outputs

  def accept_beside(self, state, pending, allowed_XWW=None):
    _, _, spans_2XW = pending
    with self._told('accept_beside', pending.key, spans_2XW, allowed_XWW):
      state, outputs = super().accept_beside(state, pending, allowed_XWW)
      return self._noted(state), outputs

  def draft(self, compute, key, state, array):
    # It ends with the tokens of drafts, so no other program of several devices
    # runs beside it; see `Leader._gather`.
    with self._told('draft', key, state is not None, array):
      return super().draft(compute, key, state, array)

  def step(self, shape, params, state, flat_I):
    with self._told('step', shape, flat_I):
      state, outputs = super().step(shape, params, state, flat_I)
      return self._noted(state), outputs

  def forward(self, shape, params, state, flat_I):
    with self._told('forward', shape, flat_I):
      state, pending = super().forward(shape, params, state, flat_I)
      return self._noted(state), pending

  def sample(self, state, pending, allowed_RW=None):
    with self._told('sample', allowed_RW):
      state, outputs = super().sample(state, pending, allowed_RW)
      return self._noted(state), outputs

  def seat(self, state, rows):
    if not rows:
      return state
    with self._told('seat', rows):
      return self._noted(super().seat(state, rows))

  def recount(self, state, slot, ids, num_prompt_tokens):
    with self._told('recount', slot, tuple(ids), num_prompt_tokens):
      return self._noted(super().recount(state, slot, ids, num_prompt_tokens))

  def put_adapter(self, table, slot, row):
    with self._told('put_adapter', slot, row):
      return super().put_adapter(table, slot, self._places.row(row, table))

  def copy_pages(self, state, copies):
    with self._told('copy_pages', copies):
      return self._noted(super().copy_pages(state, copies))


def maker(leader: leader_lib.Leader | None) -> Callable[..., programs.Programs]:
  """Returns the class of the programs of an engine, with or without others."""
  if leader is None:
    return programs.Programs
  return functools.partial(Programs, leader)


def table(
  leader: leader_lib.Leader | None,
  config: engine_config.EngineConfig,
  params: device_state.Unread,
  dtype: Any,
  placement: placement_lib.Placement,
) -> adapter_table.AdapterTable:
  """Returns the empty table of an engine, with or without other processes."""
  if leader is None:
    return adapter_table.made(config, params, dtype, placement)
  return adapter_table.made(config, params, dtype, _Sent(placement.adapters))


@dataclasses.dataclass(frozen=True)
class _Sent:
  """The devices of a table of which every process has a part.

  The row of an adapter stays on the host until `Programs.put_adapter` sends it.
  """

  places: adapter_table.Places

  @property
  def adapters(self) -> '_Sent':
    return self

  def laid_out(self, shapes):
    return self.places.laid_out(shapes)

  def row(self, row, table):
    del table
    return row


class _Masks:
  """The programs of grammars, compiled by all processes at the same time."""

  def __init__(self, masks: late.Late, leader: leader_lib.Leader):
    self._masks, self._leader = masks, leader
    self._lock, self._is_done = threading.Lock(), False

  def compile(self) -> None:
    """Compiles the programs, unless they are; from any thread."""
    with self._lock:
      if self._is_done:
        return
      asked = self._leader.ask('masks')
      self._masks.compile()
      self._leader.wait(asked)
      self._is_done = True

  @property
  def is_compiling(self) -> bool:
    """Whether a thread of its own compiles."""
    return self._masks.is_compiling


class Repeated:
  """The calls of process 0 on the devices of another process."""

  def __init__(
    self,
    compiled: programs.Programs,
    params: device_state.Params,
    state: device_state.State,
    places: adapter_table.Places,
    table: adapter_table.AdapterTable,
    draft: making.Source | None = None,
  ):
    """Takes the programs, and what these devices have.

    Args:
      compiled: the programs.
      params: the weights.
      state: of the engine.
      places: of adapters.
      table: of adapters.
      draft: the model or the head that drafts.
    """
    self.programs, self.params, self.state = compiled, params, state
    self._places, self.adapters, self._draft = places, table, draft
    self._pending: Any = None  # of the latest `forward` or `verify`

  @property
  def arrays(self) -> Any:
    """All arrays of the engine on these devices."""
    drafting = self._draft.arrays if self._draft else ()
    return self.params, self.state, self.adapters.table, drafting

  @property
  def _all_params(self) -> device_state.Params:
    return self.adapters.beside(self.params)

  def draft(self, key: Any, has_state: bool, array: np.ndarray) -> None:
    """Repeats `Programs.draft`; waits for drafts, as process 0 does."""
    assert self._draft
    self.programs.draft(
      self._draft.compute, key, self.state if has_state else None, array
    )

  def verify(self, shape: keys_lib.Verified, flat_I: np.ndarray) -> None:
    """Repeats `Programs.verify`."""
    self.state, self._pending = self.programs.verify(
      shape, self._all_params, self.state, flat_I
    )

  def accept(self, flat_I: np.ndarray, allowed_XRW: np.ndarray | None) -> None:
    """Repeats `Programs.accept`, with the inputs as they are now."""
    pending = self._pending._replace(flat_I=flat_I)
    self.state, _ = self.programs.accept(self.state, pending, allowed_XRW)

  def accept_beside(
    self,
    key: keys_lib.Beside,
    spans_2XW: np.ndarray,
    allowed_XWW: np.ndarray | None,
  ) -> None:
    """Repeats `Programs.accept_beside`."""
    pending = pending_lib.Beside(key, self._pending, spans_2XW)
    self.state, _ = self.programs.accept_beside(
      self.state, pending, allowed_XWW
    )

  def step(self, shape: steps.Shape, flat_I: np.ndarray) -> None:
    """Repeats `Programs.step`."""
    self.state, _ = self.programs.step(
      shape, self._all_params, self.state, flat_I
    )

  def forward(self, shape: steps.Shape, flat_I: np.ndarray) -> None:
    """Repeats `Programs.forward`."""
    self.state, self._pending = self.programs.forward(
      shape, self._all_params, self.state, flat_I
    )

  def sample(self, allowed_RW: np.ndarray | None) -> None:
    """Repeats `Programs.sample`."""
    self.state, _ = self.programs.sample(self.state, self._pending, allowed_RW)

  def seat(self, rows: list[tuple[int, Any]]) -> None:
    """Repeats `Programs.seat`."""
    self.state = self.programs.seat(self.state, rows)

  def recount(
    self, slot: int, ids: tuple[int, ...], num_prompt_tokens: int
  ) -> None:
    """Repeats `Programs.recount`."""
    self.state = self.programs.recount(self.state, slot, ids, num_prompt_tokens)

  def put_adapter(self, slot: int, row: adapter_table.Table) -> None:
    """Repeats `Programs.put_adapter`."""
    table = self.adapters.table
    assert table is not None
    own = self._places.row(row, table)
    self.adapters.table = self.programs.put_adapter(table, slot, own)

  def copy_pages(self, copies: list[tuple[int, int]]) -> None:
    """Repeats `Programs.copy_pages`."""
    self.state = self.programs.copy_pages(self.state, copies)


# The calls that `Repeated` has, by the names that `Programs` sends.
VERBS = frozenset(
  {
    'verify', 'accept', 'accept_beside', 'step', 'forward', 'sample', 'seat',
    'recount', 'copy_pages', 'put_adapter', 'draft',
  }
)  # fmt: skip
