"""The state of the sequences of an engine and of their pages, for metrics."""

from collections.abc import Collection
import dataclasses

from inference.scheduling import page_tables


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gauges:
  """The state of a SequenceManager; the last two values only grow."""

  num_running: int
  num_waiting: int
  pages_used: int
  pages_idle: int
  pages_free: int
  tokens_held: int  # in the used pages; the tokens of a shared page count once
  prefix_tokens_looked_up: int
  prefix_tokens_found: int


def of(
  tables: page_tables.PageTables,
  sequences: Collection[page_tables.Sequence],
  *,
  num_running: int,
  num_waiting: int,
) -> Gauges:
  """Returns the gauges of the pages, and of running and waiting sequences."""
  allocator, cache = tables.allocator, tables.cache
  return Gauges(
    num_running=num_running,
    num_waiting=num_waiting,
    pages_used=allocator.num_used,
    pages_idle=allocator.num_idle,
    pages_free=allocator.num_free,
    tokens_held=tables.num_tokens_held(sequences),
    prefix_tokens_looked_up=cache.num_tokens_looked_up,
    prefix_tokens_found=cache.num_tokens_found,
  )
