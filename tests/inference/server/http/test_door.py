"""A process accepts connections, and answers probes for the event loop."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading
import time

from fastapi import responses
import httpx2
import pytest

from inference.server.http import door as door_lib, doorkeeper
from tests.helpers.serving import servers

pytestmark = pytest.mark.skipif(
  sys.platform != 'linux', reason='the door is a process on Linux only'
)
_PROBE = b'GET /health HTTP/1.1\r\nhost: a\r\n\r\n'
_OTHER = b'GET /other HTTP/1.1\r\nhost: a\r\n\r\n'


class _Opened:
  """A door, and an event loop in a thread that answers `here` to everything."""

  def __init__(self):
    self.response = responses.JSONResponse({'status': 'ok'})
    self.listening = socket.create_server(('127.0.0.1', 0))
    self.address = self.listening.getsockname()
    self.door = door_lib.Door([self.listening], adopt=self._adopt)
    self.is_over, self.is_told = threading.Event(), threading.Event()

  async def run(self):
    self.loop = asyncio.get_running_loop()
    self.door.start(has_keeper=True)
    while not self.is_over.is_set():
      self.door.tell(self.response, [(b'server', b'test')])
      self.is_told.set()
      await asyncio.sleep(0.02)
    await self.door.close()

  def _adopt(self, connection):
    self.tasks = [*getattr(self, 'tasks', []), self._answered(connection)]
    self.tasks[-1] = self.loop.create_task(self.tasks[-1])

  async def _answered(self, connection):
    reader, writer = await asyncio.open_connection(sock=connection)
    with contextlib.suppress(asyncio.IncompleteReadError, OSError):
      await reader.readuntil(b'\r\n\r\n')
      writer.write(b'here')
    writer.close()

  @contextlib.contextmanager
  def blocked(self):
    """Keeps the event loop from turning."""
    is_blocked, is_free = threading.Event(), threading.Event()

    def block():
      is_blocked.set()
      is_free.wait(30)

    self.loop.call_soon_threadsafe(block)
    assert is_blocked.wait(30)
    try:
      yield
    finally:
      is_free.set()

  def connect(self, timeout=30.0):
    return socket.create_connection(self.address, timeout=timeout)

  def asked(self, request, timeout=30.0):
    with self.connect(timeout) as client:
      client.sendall(request)
      return client.recv(4096)


@pytest.fixture
def opened():
  found = _Opened()
  thread = threading.Thread(target=lambda: asyncio.run(found.run()))
  thread.start()
  assert found.is_told.wait(30)
  servers.until(lambda: b' 200 ' in found.asked(_PROBE))
  try:
    yield found
  finally:
    found.is_over.set()
    thread.join()
  with pytest.raises(ConnectionRefusedError):
    found.connect()


def test_a_probe_does_not_wait_for_the_event_loop(opened):
  with opened.blocked(), opened.connect() as other:
    other.sendall(_OTHER)
    answer = opened.asked(_PROBE)
    other.settimeout(0.1)
    with pytest.raises(TimeoutError):
      other.recv(10)
  head, body = answer.split(b'\r\n\r\n')
  lines = head.split(b'\r\n')
  assert lines[0] == b'HTTP/1.1 200 OK'
  assert b'server: test' in lines
  assert b'content-length: 15' in lines
  assert b'x-request-id: req_' in head
  assert body == b'{"status":"ok"}'
  assert opened.asked(_OTHER) == b'here'


def test_the_answer_follows_the_state_of_the_server(opened):
  opened.response = responses.JSONResponse({'status': 'failed'}, 503)
  servers.until(lambda: b' 503 Service Unavailable' in opened.asked(_PROBE))


@pytest.mark.slow
def test_an_event_loop_that_hangs_does_not_look_healthy(opened):
  with opened.blocked():
    time.sleep(doorkeeper._STALL_SECONDS + 0.2)
    with opened.connect(0.3) as client:
      client.sendall(_PROBE)
      with pytest.raises(TimeoutError):
        client.recv(10)
  assert opened.asked(_PROBE)


def test_a_connection_is_kept_for_further_probes_and_requests(opened):
  with opened.connect() as client:
    for _ in range(3):
      client.sendall(_PROBE)
      assert client.recv(4096).startswith(b'HTTP/1.1 200')
    client.sendall(_OTHER)
    assert client.recv(10) == b'here'
  closing = _PROBE.replace(b'host: a', b'host: a\r\nConnection: Close')
  with opened.connect() as client:
    client.sendall(closing)
    answer = client.recv(4096)
    assert b'\r\nconnection: close\r\n' in answer
    assert client.recv(10) == b''


def test_a_client_that_waits_before_its_request_is_answered(opened):
  with opened.connect() as client:
    time.sleep(2 * doorkeeper._FIRST_SECONDS)
    client.sendall(_OTHER)
    assert client.recv(10) == b'here'


@pytest.mark.slow
def test_more_connections_than_are_taken_at_once_all_get_an_answer(opened):
  with contextlib.ExitStack() as stack:
    with opened.blocked():
      clients = [stack.enter_context(opened.connect()) for _ in range(300)]
      for each in clients:
        each.sendall(_OTHER)
    assert {each.recv(10) for each in clients} == {b'here'}


@pytest.mark.parametrize(
  ('head', 'closes'),
  [
    (_PROBE, False),
    (b'GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n', True),
    (b'GET /health HTTP/1.1\r\nhost: a\r\nContent-Length: 0\r\n\r\n', False),
    # What follows belongs to others to decide.
    (b'', None),
    (_PROBE[:-2], None),
    (_PROBE + b'GET', None),
    (_OTHER, None),
    (b'GET /health?a HTTP/1.1\r\nhost: a\r\n\r\n', None),
    (b'GET /health HTTP/1.0\r\nhost: a\r\n\r\n', None),
    (b'HEAD /health HTTP/1.1\r\nhost: a\r\n\r\n', None),
    (b'GET /health HTTP/1.1\r\n\r\n', None),
    (b'GET /health HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n', None),
    (b'GET /health HTTP/1.1\r\nhost: a\r\n b\r\n\r\n', None),
    (b'GET /health HTTP/1.1\r\nhost: a\r\nx : b\r\n\r\n', None),
    (b'GET /health HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\n\r\n', None),
    (b'GET /health HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\n\r\n', None),
    (
      b'GET /health HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n',
      None,
    ),
  ],
)
def test_only_a_plain_probe_is_answered_at_the_door(head, closes):
  assert doorkeeper.closes_after(head) is closes


def test_the_event_loop_accepts_when_the_process_has_ended(opened, caplog):
  pid = opened.door.pid
  os.kill(pid, signal.SIGKILL)
  servers.until(lambda: opened.door.pid is None)
  assert opened.asked(_PROBE) == opened.asked(_OTHER) == b'here'
  assert 'the process that accepts connections has ended' in caplog.text


def test_the_process_ends_with_its_server():
  own, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
  with own, other, socket.create_server(('127.0.0.1', 0)) as listening:
    keeper = doorkeeper.Doorkeeper(other, [listening])
    thread = threading.Thread(target=keeper.work)
    thread.start()
    own.shutdown(socket.SHUT_RDWR)
    thread.join(timeout=30)
    assert not thread.is_alive()
    keeper._selector.close()


def test_the_door_and_the_route_answer_alike(generator):
  with servers.running(generator, has_door=True) as served:
    pid = served.app.state.listener._door.pid
    assert pid is not None
    with httpx2.Client(base_url=served.url) as client:
      servers.until(lambda: client.get('/health').status_code == 200)
      door = client.get('/health')
      route = client.get('/health?')
      assert client.get('/ready').status_code == 200  # kept, and handed over
    assert door.json() == route.json() == {'status': 'ok'}
    assert door.headers.keys() == route.headers.keys()
  with pytest.raises(ProcessLookupError):
    os.kill(pid, 0)
