"""The replicas of a server: their processes, started again when they die.

A process that hangs, by its heartbeat (`parallel.pulse`), is killed. A process
that has died starts again at once. If it dies again soon, the next
one waits for 1, 2, 4 seconds and so on, to a minute. A replica that has died
`_MOST_DEATHS` times in a row before it was ready is given up; if all are, the
server has failed.
"""

import asyncio
from collections.abc import Mapping, Sequence
import dataclasses
import logging
import time
from typing import Any

from inference.engine import engine_config
from inference.server.replicas import (
  devices,
  link as link_lib,
  loop as loop_lib,
  values,
)
from inference.server.versions import memory
from parallel import processes

_LOG = logging.getLogger('uvicorn.error')
_MOST_DEATHS = 6  # before it was ready
_LONGEST_WAIT = 60.0  # seconds until the next start
_STEADY_SECONDS = 5.0  # of answering, after which a death is not a repeated one


class Replica:
  """A process with the engines of all versions."""

  def __init__(
    self, fleet: 'Fleet', setup: values.Setup, environment: Mapping[str, str]
  ):
    self.index = int(setup.name.split()[-1])
    self.link: link_lib.Link | None = None
    self.is_given_up = False
    self._fleet, self._setup, self._environment = fleet, setup, environment
    self._num_deaths = self._num_unready = 0  # in a row
    self._ready_at: float | None = None

  def start(self) -> None:
    """Starts the process, and loads all versions."""
    if self._fleet.is_over:
      return
    self._ready_at = None
    self.link = link_lib.Link(
      self._setup,
      self._environment,
      on_message=self._obey,
      on_death=self._died,
    )
    self.link.start()
    self._watch(self.link)
    for loop in self._fleet.loops():
      loop.attach(self)

  def _watch(self, link: link_lib.Link) -> None:
    """Kills a process that hangs: it is replaced as one that dies."""
    if link is not self.link or self._fleet.is_over:
      return
    if why := link.pulse.check(time.monotonic()):
      self.fail(f'{why}; it is killed')
      return
    asyncio.get_running_loop().call_later(
      link.pulse.interval_s, self._watch, link
    )

  def note_ready(self) -> None:
    """Notes that it answers requests to a version."""
    self._ready_at = self._ready_at or time.monotonic()

  def fail(self, why: str) -> None:
    """Ends the process, to start another one."""
    _LOG.error('replica %d: %s', self.index, why)
    if self.link:
      self.link.kill()

  def _obey(self, message: Sequence[Any]) -> None:
    kind, number, *args = message
    if loop := self._fleet.loop(number):
      loop.obey(self, (kind, *args))

  def _died(self, link: link_lib.Link, how: str) -> None:
    del link
    self.link = None
    ready_at, now = self._ready_at, time.monotonic()
    if ready_at is not None and now - ready_at > _STEADY_SECONDS:
      self._num_deaths = 0
    self._num_deaths += 1
    self._num_unready = 0 if ready_at else self._num_unready + 1
    self.is_given_up = self._num_unready >= _MOST_DEATHS
    wait = min(2.0 ** (self._num_deaths - 2), _LONGEST_WAIT)
    wait = 0.0 if self._num_deaths == 1 else wait
    _LOG.error(
      'replica %d has ended with %s; %s',
      self.index,
      how,
      'it is given up'
      if self.is_given_up
      else f'another process starts in {wait:.0f} s',
    )
    for loop in self._fleet.loops():
      loop.detach(self)
    if not self.is_given_up:
      asyncio.get_running_loop().call_later(wait, self.start)
    self._fleet.check()


class Fleet:
  """All replicas; belongs to one event loop."""

  def __init__(
    self,
    num_replicas: int,
    *,
    num_devices: int = 1,
    environment: Mapping[str, str],
    compilation_cache: str | None = None,
    audit_threshold: float = 0.0,
    heartbeat_timeout_s: float = processes.DEFAULT_HEARTBEAT_S,
    cluster: processes.Cluster | None = None,
  ):
    """Starts no process yet.

    Args:
      num_replicas: at least one.
      num_devices: of each.
      environment: of the server; a replica's has its devices in addition.
      compilation_cache: directory of compiled programs; None: there is none.
      audit_threshold: see ServerConfig.
      heartbeat_timeout_s: seconds without a heartbeat, after which a replica is
        killed and another one started.
      cluster: the processes that share the engine of the only replica; None: it
        has its devices alone.

    Raises:
      ValueError: there are too few devices.
    """
    self._replicas = [
      Replica(
        self,
        values.Setup(
          name=f'replica {index}',
          compilation_cache=compilation_cache,
          audit_threshold=audit_threshold,
          heartbeat_timeout_s=heartbeat_timeout_s,
          cluster=cluster,
        ),
        {
          **environment,
          **devices.environment(
            index,
            num_replicas=num_replicas,
            num_devices=num_devices,
            inherited=environment,
            num_gpus=devices.num_gpus(),
          ),
        },
      )
      for index in range(num_replicas)
    ]
    self.is_over = False
    self._loops: dict[int, loop_lib.ReplicaLoop] = {}
    self._num_joined = 0
    self._event_loop: asyncio.AbstractEventLoop | None = None

  @property
  def num_replicas(self) -> int:
    """The number of replicas."""
    return len(self._replicas)

  def pids(self) -> list[int | None]:
    """Returns the ids of the processes; None: there is none now."""
    return [each.link.pid if each.link else None for each in self._replicas]

  def loops(self) -> list[loop_lib.ReplicaLoop]:
    """Returns the versions."""
    return list(self._loops.values())

  def loop(self, number: int) -> loop_lib.ReplicaLoop | None:
    """Returns the version of a number, None if it has left."""
    return self._loops.get(number)

  def join(self, loop: loop_lib.ReplicaLoop) -> int:
    """Adds a version; returns its number. Starts replicas if it must."""
    number, self._num_joined = self._num_joined, self._num_joined + 1
    self._loops[number] = loop
    loop.number = number
    if self._event_loop is None:
      self._event_loop = asyncio.get_running_loop()
      for each in self._replicas:
        each.start()
    else:
      for each in self._replicas:
        if each.link:
          loop.attach(each)
    return number

  def leave(self, number: int) -> None:
    """Removes a version."""
    self._loops.pop(number, None)

  async def close(self) -> None:
    """Ends all processes."""
    self.is_over = True
    await asyncio.gather(
      *(each.link.close() for each in self._replicas if each.link)
    )

  def check(self) -> None:
    """Fails all versions if no replica is left."""
    if all(each.is_given_up for each in self._replicas):
      for loop in self.loops():
        loop.give_up()

  def plan(
    self, directory: str, config: engine_config.EngineConfig
  ) -> memory.Plan | None:
    """Returns the memory plan of a version; not in the event loop.

    Replicas on a CPU share its memory, so the plan is of all of them. None: no
    replica lives that could tell.

    Raises:
      ValueError: the config does not suit the model.
    """
    links = [each.link for each in self._replicas if each.link]
    if not links or self._event_loop is None:
      return None
    asked = asyncio.run_coroutine_threadsafe(
      links[0].call('plan', directory, config), self._event_loop
    )
    try:
      plan, platform = asked.result()
    except link_lib.Died:
      return None
    num = len(self._replicas) if platform == 'cpu' else 1
    return dataclasses.replace(
      plan,
      weights=num * plan.weights,
      kv_cache=num * plan.kv_cache,
      sampling=num * plan.sampling,
      adapters=num * plan.adapters,
    )
