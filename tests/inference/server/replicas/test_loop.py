"""A version whose replicas load one after the other, fail and come back."""

import asyncio
import dataclasses
import types

import pytest

from inference.engine import engine_config
from inference.server import engine_thread
from inference.server.replicas import (
  loop as loop_lib,
  place as place_lib,
  remote_engine,
  values,
)
from tests.helpers import tiny_models

_FACTS = values.Facts(
  capacity=64,
  numerics={},
  products='',
  adapter_rank=0,
  memory=None,  # pyright: ignore
  device={'platform': 'cpu'},
)


class _Replica:
  """Notes the versions that it is to load, and why it is to end."""

  def __init__(self, index):
    self.index, self.link, self.loads, self.failures = index, self, 0, []

  def send(self, message):
    self.loads += message[0] == 'load'

  def note_ready(self):
    pass

  def fail(self, why):
    self.failures.append(why)


class _Fleet:
  def __init__(self):
    self.replicas = [_Replica(0), _Replica(1)]

  def join(self, loop):
    loop.number = 7
    for each in self.replicas:
      loop.attach(each)

  def leave(self, number):
    pass


def _run(monkeypatch, test):
  engine = types.SimpleNamespace(
    model_config=tiny_models.llama_like(), learn=lambda _: None
  )
  made = types.SimpleNamespace(engine=engine)
  monkeypatch.setattr(remote_engine, 'generator', lambda *_: made)
  fleet, told = _Fleet(), []
  load = values.Load(
    version='a', directory='', config=engine_config.EngineConfig()
  )
  loop = loop_lib.ReplicaLoop(
    fleet, load, on_load_failure=lambda: told.append(True)
  )

  async def main():
    loop.start()
    while not loop._places:
      await asyncio.sleep(0.001)
    await test(loop, *fleet.replicas, told)

  asyncio.run(asyncio.wait_for(main(), 20))


async def _ready(loop, replica):
  loop.obey(replica, ('ready', _FACTS))
  while loop._places[replica.index].state != place_lib.READY:
    await asyncio.sleep(0.001)


def test_the_second_replica_loads_once_the_first_is_ready(monkeypatch):
  async def test(loop, first, second, _):
    assert (first.loads, second.loads) == (1, 0)
    assert (loop.state, loop.is_loading) == (engine_thread.LOADING, True)
    await _ready(loop, first)
    assert (first.loads, second.loads) == (1, 1)
    assert loop.state == engine_thread.READY
    assert loop.device() == {'platform': 'cpu'}
    # It dies, and comes back; the other one still loads.
    loop.detach(first)
    assert loop.state == engine_thread.LOADING
    loop.attach(first)
    assert first.loads == 2
    await _ready(loop, second)
    assert loop.state == engine_thread.READY

  _run(monkeypatch, test)


def test_if_the_first_dies_while_it_loads_the_second_loads(monkeypatch):
  async def test(loop, first, second, told):
    loop.detach(first)
    assert second.loads == 1
    loop.attach(first)
    assert first.loads == 1  # it waits in its turn
    await _ready(loop, second)
    assert first.loads == 2
    assert told == []

  _run(monkeypatch, test)


def test_a_directory_that_no_replica_can_load_fails(monkeypatch):
  damaged = 'not_loaded', 'ValueError', 'params: got a damaged file'

  async def test(loop, first, second, told):
    loop.obey(first, damaged)
    assert loop.state == engine_thread.FAILED
    with pytest.raises(ValueError, match='damaged file'):
      raise loop.failure
    assert told == [True]
    with pytest.raises(engine_thread.Failed):
      await loop.submit([])

  async def later(loop, first, second, told):
    await _ready(loop, first)
    loop.obey(second, damaged)
    assert loop.state == engine_thread.READY  # the first one answers
    assert 'damaged file' in second.failures[0]
    assert told == []
    loop.give_up()
    assert loop.state == engine_thread.FAILED

  _run(monkeypatch, test)
  _run(monkeypatch, later)


def test_a_replica_on_another_platform_is_ended(monkeypatch):
  """It sees no GPU, so that JAX would compute on the CPU without a word."""
  on_gpu = dataclasses.replace(_FACTS, device={'platform': 'gpu'})

  async def test(loop, first, second, _):
    loop.obey(first, ('ready', on_gpu))
    while loop.state != engine_thread.READY:
      await asyncio.sleep(0.001)
    loop.obey(second, ('ready', _FACTS))
    while not second.failures:
      await asyncio.sleep(0.001)
    assert second.failures == [
      'got a device of platform cpu, expected gpu as in other replicas; lower'
      ' --replicas, or give each the same devices'
    ]
    assert loop._places[second.index].state != place_lib.READY

  _run(monkeypatch, test)
