"""A version on one replica, and the metrics of all of them."""

from collections.abc import Sequence
from typing import Any, Protocol

import prometheus_client

from inference.server.replicas import (
  link as link_lib,
  placement,
  submission as submission_lib,
  values,
)

# WAITING: another replica compiles the programs first.
WAITING, LOADING, READY, LOST = 'waiting', 'loading', 'ready', 'lost'


class Replica(Protocol):
  """A process with engines, as `fleet.Replica` has it."""

  index: int

  @property
  def link(self) -> link_lib.Link | None:
    """The link to its process; None while there is none."""
    ...

  def note_ready(self) -> None:
    """Notes that it answers requests."""
    ...

  def fail(self, why: str) -> None:
    """Ends the process, to start another one."""
    ...


class Place:
  """A version on one replica."""

  def __init__(self, replica: Replica):
    self.replica, self.state = replica, WAITING
    self.facts: values.Facts | None = None
    self.known = placement.Known(0)
    self.open: dict[int, submission_lib.Submission] = {}
    self.num_open = self.num_served = 0
    self.families: list[Any] = []  # its metrics, when last asked

  def send(self, *message: Any) -> None:
    """Sends a message, if the process lives."""
    if self.replica.link:
      self.replica.link.send(message)

  async def call(self, name: str, *args: Any) -> Any:
    """Returns the answer to a call; see `Link.call`."""
    if self.replica.link is None:
      raise link_lib.Died('the replica has ended')
    return await self.replica.link.call(name, *args)


class Stored:
  """Metrics of another process, as a registry."""

  def __init__(self, families: list[Any]):
    self._families = families

  def collect(self) -> list[Any]:
    """Returns the families."""
    return self._families


class Metrics:
  """The server's own counts of the replicas of a version."""

  def __init__(self):
    self.registry = prometheus_client.CollectorRegistry()
    self.ready = prometheus_client.Gauge(
      'replica_ready',
      'Whether the replica answers requests.',
      ['replica'],
      registry=self.registry,
    )

    def counter(name: str, text: str, labels: Sequence[str]):
      return prometheus_client.Counter(
        name, text, labels, registry=self.registry
      )

    self.deaths = counter(
      'replica_deaths', 'Processes of the replica that ended.', ['replica']
    )
    self.placed = counter(
      'replica_submissions',
      'Submissions sent to the replica: it knew their prefix, or not.',
      ['replica', 'prefix'],
    )
    self.moved = counter(
      'replica_moved_submissions',
      'Submissions that went to another replica when one died.',
      [],
    )
