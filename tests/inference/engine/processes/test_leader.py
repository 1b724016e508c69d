"""The sockets of process 0: other clients, answers, losses."""

import contextlib
import queue
import socket
import threading

import jax
import pytest

from inference.engine import engine_config
from inference.engine.processes import leader as leader_lib
from parallel import frames, processes


class _Published:
  def __init__(self):
    self._texts = queue.Queue()
    self._text = None

  def publish(self, name, text):
    assert name == 'engine'
    self._texts.put(text)

  def text(self):
    self._text = self._text or self._texts.get(timeout=10)
    return self._text

  def published(self, name, *, timeout_s):
    del name, timeout_s
    return self.text()


class _World:
  """Two processes that are none: the follower is this test."""

  def __init__(self):
    self.published, self.losses = _Published(), queue.Queue()

  @contextlib.contextmanager
  def leader(self, **options):
    """Yields the leader, and the end of its connection to process 1."""
    made = queue.Queue()
    thread = threading.Thread(
      target=lambda: made.put(
        leader_lib.Leader(on_loss=self.losses.put, **options)
      )
    )
    thread.start()
    host, port, _ = self.published.text().split()
    # A connection without the secret is closed.
    with socket.create_connection((host, int(port))) as other:
      other.sendall(leader_lib._GREETING.pack(b'x' * 64, 1))
      assert other.recv(1) == b''
    with leader_lib.connect() as connection:
      leader = made.get(timeout=10)
      yield leader, connection
      with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    thread.join()
    for each in leader._watching:
      each.join()


@pytest.fixture
def world(monkeypatch):
  world = _World()
  for name, value in {
    'count': lambda: 2,
    'index': lambda: 1,
    'coordinator_host': lambda: '127.0.0.1',
    'publish': world.published.publish,
    'published': world.published.published,
  }.items():
    monkeypatch.setattr(processes, name, value)
  return world


def _received(connection):
  return frames.read(connection.makefile('rb'))


def test_calls_arrive_in_order_and_answers_come_back(world):
  with world.leader() as (leader, connection):
    received = _received(connection)
    leader.tell('seat', 3, 'row')
    number = leader.ask('load', 'engine')
    assert next(received) == [('seat', 3, 'row')]
    assert next(received) == [('load', number, 'engine')]
    for answer in ((leader_lib.HEARTBEAT, ''), (number, '')):
      connection.sendall(frames.packed([answer]))
    leader.wait(number)
    number = leader.ask('load', 'other')
    connection.sendall(frames.packed([(number, 'got X, expected Y')]))
    with pytest.raises(ValueError, match='^process 1: got X, expected Y$'):
      leader.wait(number)


def test_a_process_that_ends_is_a_loss_to_all_who_wait(world):
  with world.leader() as (leader, connection):
    number = leader.ask('load')
    connection.shutdown(socket.SHUT_RDWR)
    assert world.losses.get(timeout=10).startswith(
      'process 1: got its end (its connection is closed), expected it to'
      ' compute as long as process 0; see its own messages, and start all'
    )
    with pytest.raises(leader_lib.Lost, match='process 1: got its end'):
      leader.wait(number)
  assert world.losses.empty()  # it is told once


def test_a_process_without_a_heartbeat_is_lost(world):
  with world.leader(heartbeat_timeout_s=0.3):
    assert 'it has sent no heartbeat in time' in world.losses.get(timeout=10)


def test_the_end_of_the_leader_is_no_loss(world, monkeypatch):
  shut = []
  monkeypatch.setattr('jax.distributed.shutdown', lambda: shut.append(True))
  with world.leader() as (leader, connection):
    ending = threading.Thread(target=leader.end)
    ending.start()
    assert next(_received(connection)) == [('end', False)]
    connection.shutdown(socket.SHUT_RDWR)
    ending.join(10)
  assert shut == [True]
  assert world.losses.empty()


def test_a_process_that_never_connects_is_named(world, monkeypatch):
  monkeypatch.setattr(leader_lib, '_JOIN_SECONDS', 0.1)
  with pytest.raises(
    leader_lib.Lost, match='process 1: got no connection to process 0 in 0 s'
  ):
    leader_lib.Leader()


def test_an_engine_that_leaves_devices_out_is_refused(world):
  """A process without a device of the mesh could not take part."""
  with world.leader() as (leader, _):
    config = engine_config.EngineConfig(tensor=8)
    assert leader.devices_of(config) == jax.devices()
    with pytest.raises(
      ValueError, match='got 1, which takes 1 devices, expected 8, the number'
    ):
      leader.devices_of(engine_config.EngineConfig())
