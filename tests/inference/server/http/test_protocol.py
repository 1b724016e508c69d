"""Connections: slow, silent, too many, or unclear about their requests."""

import contextlib
import gc
import json
import socket
import threading
import time

import h11
import httpx2
import pytest

from inference.server.http import protocol
from tests.helpers.serving import servers

_GET = b'GET /health HTTP/1.1\r\nhost: a\r\n\r\n'
_POST = b'POST /v1/completions HTTP/1.1\r\nhost: a\r\n'
_JSON = b'content-type: application/json\r\n'


@pytest.fixture(scope='module')
def impatient(generator):
  """A server with short times."""
  with servers.running(
    generator,
    head_seconds=0.3,
    body_seconds=0.6,
    idle_seconds=0.3,
    write_seconds=0.3,
  ) as served:
    yield served


def _connected(url, **options):
  host, _, port = url.removeprefix('http://').partition(':')
  client = socket.socket()
  client.settimeout(20)
  for option, value in options.items():
    client.setsockopt(socket.SOL_SOCKET, getattr(socket, option), value)
  client.connect((host, int(port)))
  return client


def _rest(client):
  """Returns what arrives until the server closes the connection."""
  parts = []
  with contextlib.suppress(ConnectionResetError):
    while part := client.recv(65536):
      parts.append(part)
  return b''.join(parts)


@pytest.mark.parametrize(
  ('sent', 'answer'),
  [
    (b'', b''),
    (b'G', b''),
    (_GET[:-2], b''),
    (_POST + b'content-length: 5\r\n', b''),
    (_POST + _JSON + b'content-length: 5\r\n\r\n{', b'HTTP/1.1 408 '),
    (_POST + _JSON + b'transfer-encoding: chunked\r\n\r\n5', b'HTTP/1.1 408 '),
    (_GET, b'HTTP/1.1 200 '),
    (_GET + b'GET', b'HTTP/1.1 200 '),  # a second head that does not end
    # Nobody reads this body: its route does not exist.
    (
      b'POST /x HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\n{',
      b'HTTP/1.1 4',
    ),
  ],
)
def test_half_a_request_is_not_waited_for(impatient, sent, answer):
  with _connected(impatient.url) as client:
    client.sendall(sent)
    assert _rest(client)[: len(answer) or None] == answer


@pytest.mark.parametrize(
  'head', [b'', _POST + _JSON + b'content-length: 900\r\n\r\n']
)
def test_bytes_that_drip_do_not_buy_time(impatient, head):
  with _connected(impatient.url) as client:
    client.sendall(head)
    servers.until(lambda: _is_refused(client, b'G'))


def _is_refused(client, data):
  try:
    client.sendall(data)
  except OSError:  # reset, or a broken pipe
    return True
  return False


@pytest.mark.slow
def test_a_client_that_stops_reading_loses_its_request(impatient):
  """The answer is larger than the buffers of the system."""
  prompt = 'x' * 10**6
  body = json.dumps({'prompt': prompt}).encode()
  with _connected(impatient.url, SO_RCVBUF=4096) as client:
    head = b'POST /tokenize HTTP/1.1\r\nhost: a\r\n' + _JSON
    for _ in range(4):
      with contextlib.suppress(OSError):
        client.sendall(head + b'content-length: %d\r\n\r\n' % len(body) + body)
    time.sleep(2.0)
    answer = _rest(client)
  assert len(answer) < 4 * 10**6  # an answer has "1,120,120,..." and is larger
  assert not answer.endswith(b'}')


def test_a_client_that_reads_slowly_gets_all(impatient):
  body = json.dumps({'prompt': 'x' * 10**5}).encode()
  with _connected(impatient.url, SO_RCVBUF=4096) as client:
    client.sendall(
      b'POST /tokenize HTTP/1.1\r\nhost: a\r\nconnection: close\r\n'
      + _JSON
      + b'content-length: %d\r\n\r\n' % len(body)
      + body
    )
    parts = []
    while part := client.recv(8192):
      parts.append(part)
      time.sleep(0.005)
  assert b''.join(parts).endswith(b'}')


def test_answers_that_nobody_reads_have_a_limit_together(served, monkeypatch):
  """The client that has not read for longest loses its answer."""
  unread = []
  free = protocol._Protocol._free_unread

  def free_all_but_one(self):
    unread.append(self.transport.get_write_buffer_size())
    # The system holds a part of an answer, of a size that only it knows.
    monkeypatch.setattr(protocol, '_MOST_UNREAD', 1.2 * unread[0])
    free(self)

  monkeypatch.setattr(protocol._Protocol, '_free_unread', free_all_but_one)
  body = json.dumps({'prompt': 'x' * 10**6}).encode()  # its answer has 4 MB
  head = b'POST /tokenize HTTP/1.1\r\nhost: a\r\n' + _JSON
  with (
    _connected(served.url, SO_RCVBUF=4096) as first,
    _connected(served.url, SO_RCVBUF=4096) as second,
  ):
    for client in (first, second):
      client.sendall(head + b'content-length: %d\r\n\r\n' % len(body) + body)
      assert client.recv(10)
    assert not _rest(first).endswith(b'}')
    second.sendall(_GET.replace(b'\r\n\r\n', b'\r\nconnection: close\r\n\r\n'))
    assert _rest(second).count(b'HTTP/1.1 200') == 1  # of /health


@pytest.mark.slow
@pytest.mark.parametrize('path', [b'/nowhere', b'/tokenize'])
def test_a_long_body_that_is_refused_is_read_in_turns(
  generator, served, monkeypatch, path
):
  """Reading at full speed, the event loop would serve nobody else."""
  head = b'POST %s HTTP/1.1\r\nhost: a\r\n' % path + _JSON
  head += b'content-length: 100000000\r\n\r\n'
  with monkeypatch.context() as patched, servers.running(generator) as other:
    patched.setattr(protocol, '_DRAIN_SECONDS', 60.0)
    with _connected(other.url, SO_SNDBUF=2**16) as client:
      client.sendall(head)
      client.settimeout(1.0)
      num = 0
      with contextlib.suppress(OSError):  # also a time-out
        while num < 10**8:
          num += client.send(bytes(2**16))
  assert num < 3 * 10**7  # the buffers of the system
  with _connected(served.url) as client:
    client.sendall(head)
    client.sendall(bytes(10**8))  # with the usual turns it is read
    assert client.recv(9) == b'HTTP/1.1 '


def test_many_connections_are_accepted_in_one_turn(served, monkeypatch):
  """Else a probe behind a hundred clients would wait for a hundred turns."""
  made, turns = [], []
  make = protocol._Protocol.connection_made

  def connection_made(self, transport):
    made.append(len(turns))
    make(self, transport)

  monkeypatch.setattr(protocol._Protocol, 'connection_made', connection_made)
  loop = served.engine_loop._event_loop
  may_go, num = threading.Event(), 60

  def turn():
    turns.append(1)
    if len(made) < num and len(turns) < 10_000:
      loop.call_soon(turn)

  loop.call_soon_threadsafe(may_go.wait)
  with contextlib.ExitStack() as stack:
    for _ in range(num):
      stack.enter_context(_connected(served.url))
    loop.call_soon_threadsafe(turn)
    may_go.set()
    servers.until(lambda: len(made) == num)
  assert made[-1] - made[0] < num / 3


@pytest.mark.parametrize(
  'request_bytes',
  [
    _POST + b'content-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n',
    _POST + b'transfer-encoding: chunked\r\ncontent-length: 3\r\n\r\n0\r\n\r\n',
    _POST + b'content-length: 3\r\ncontent-length: 4\r\n\r\nabc',
    _POST + b'content-length: 3, 4\r\n\r\nabc',
    _POST + b'content-length: +3\r\n\r\nabc',
    _POST + b'content-length: -3\r\n\r\nabc',
    _POST + b'content-length: 0x3\r\n\r\nabc',
    _POST + b'transfer-encoding: chunked, chunked\r\n\r\n0\r\n\r\n',
    _POST + b'transfer-encoding: identity\r\n\r\n',
    _POST + b'transfer-encoding : chunked\r\n\r\n0\r\n\r\n',
    _POST + _JSON + b'transfer-encoding: chunked\r\n\r\n-1\r\n',
    _POST + _JSON + b'transfer-encoding: chunked\r\n\r\n0x1\r\na\r\n0\r\n\r\n',
    _POST + _JSON + b'transfer-encoding: chunked\r\n\r\n1\r\naXX0\r\n\r\n',
    _POST + _JSON + b'transfer-encoding: chunked\r\n\r\n' + b'f' * 21 + b'\r\n',
    _POST.replace(b'1.1', b'1.0')
    + b'transfer-encoding: chunked\r\n\r\n0\r\n\r\n',
    _POST + b'host: b\r\n\r\n',
    b'GET /health HTTP/1.1\r\n\r\n',  # no host
    b'GET /health HTTP/2.0\r\nhost: a\r\n\r\n',
    b'GET /caf\xc3\xa9 HTTP/1.1\r\nhost: a\r\n\r\n',
    b'\x16\x03\x01\x02\x00\x01',  # TLS
    b'GET /health HTTP/1.1\r\nhost: a\r\nx: ' + b'y' * 100_000,
  ],
)
def test_bytes_behind_an_unclear_request_are_no_request(
  served, request_bytes, caplog
):
  with _connected(served.url) as client:
    client.sendall(request_bytes + _GET)
    answer = _rest(client)
  assert answer.startswith(b'HTTP/1.1 400 ')
  assert answer.count(b'HTTP/1.1 ') == 1
  assert b'"error"' in answer
  assert 'Traceback' not in caplog.text


@pytest.mark.parametrize(
  ('size', 'num', 'status'),
  [
    (1, 200, b'200'),
    (1, 100_000, b'400'),
    (10, 20_000, b'400'),
    (100, 2000, b'200'),
    (50_000, 8, b'200'),
  ],
)
def test_chunks_may_be_short_or_many_but_not_both(served, size, num, status):
  """Each takes the parser 25 us, however short it is."""
  rest = b'{"prompt":"' + b'x' * (size * num - 13) + b'"}'
  rest = b''.join(
    b'%x\r\n%s\r\n' % (size, rest[start : start + size])
    for start in range(0, size * num, size)
  )
  head = b'POST /tokenize HTTP/1.1\r\nhost: a\r\nconnection: close\r\n' + _JSON
  with _connected(served.url) as client:
    client.sendall(head + b'transfer-encoding: chunked\r\n\r\n')
    with contextlib.suppress(OSError):
      client.sendall(rest + b'0\r\n\r\n')
    answer = _rest(client)
  assert answer.startswith(b'HTTP/1.1 ' + status)
  assert (b'"count":%d' % (size * num - 12) in answer) == (status == b'200')


def test_others_are_served_between_the_chunks_of_a_body(served, monkeypatch):
  events = []
  next_event = protocol._Connection.next_event

  def noted(self):
    event = next_event(self)
    events.append('chunk' if isinstance(event, h11.Data) else 'other')
    return event

  monkeypatch.setattr(protocol._Connection, 'next_event', noted)
  rest = b'{"prompt":"' + b'x' * 187 + b'"}'
  rest = b''.join(b'1\r\n%c\r\n' % each for each in rest)
  loop = served.engine_loop._event_loop
  with _connected(served.url) as client:
    head = b'POST /tokenize HTTP/1.1\r\nhost: a\r\nconnection: close\r\n'
    sent = head + _JSON + b'transfer-encoding: chunked\r\n\r\n' + rest
    may_go, end = threading.Event(), threading.Event()
    loop.call_soon_threadsafe(may_go.wait)
    client.sendall(sent + b'0\r\n\r\n')

    def turn():
      events.append('turn')
      if not end.is_set():
        loop.call_soon(turn)

    loop.call_soon_threadsafe(turn)
    may_go.set()
    assert _rest(client).startswith(b'HTTP/1.1 200')
    end.set()
  parts = ' '.join(events).split('turn')
  assert max(part.count('chunk') for part in parts) <= 32
  assert sum(part.count('chunk') for part in parts) == 200


@pytest.mark.parametrize('num', [100, 2500, 10_000])
def test_a_head_of_many_lines_is_refused_as_a_whole_too(served, num):
  """Not only while it is incomplete: it arrives in one read."""
  lines = b''.join(b'x%d: yyyyyyyy\r\n' % i for i in range(num))
  with _connected(served.url) as client:
    with contextlib.suppress(OSError):
      client.sendall(_GET[:-2] + b'connection: close\r\n' + lines + b'\r\n')
    answer = _rest(client)
  assert answer.startswith(b'HTTP/1.1 %d ' % (200 if num < 1000 else 400))


def test_a_connection_that_ends_is_freed_at_once(served):
  """Not only when all garbage is collected: its buffers may be large."""

  def count():
    # Not isinstance: it asks each object, and one of torch's then warns.
    return sum(type(x) is protocol._Protocol for x in gc.get_objects())

  stream = json.dumps({'prompt': 'a', **servers.GREEDY, 'stream': True})
  chunked = _JSON + b'transfer-encoding: chunked\r\n\r\n'
  length = b'content-length: %d\r\n\r\n'
  kinds = (
    b'GET /health HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n',
    _GET[:-2] + b'a: b\r\n' * 5000 + b'\r\n',
    b'\x16\x03\x01\r\n\r\n',
    _POST + chunked + b'1\r\nx\r\n' * 2000,
    _POST + _JSON + length % 10**7 + b'{',
    _POST + _JSON + length % len(stream) + stream.encode(),
  )
  gc.collect()
  gc.disable()
  try:
    servers.until(lambda: count() <= 1)  # that of the tests' own client
    for sent in kinds:
      for _ in range(3):
        with _connected(served.url) as client, contextlib.suppress(OSError):
          client.sendall(sent)
          client.recv(10)
    servers.until(lambda: count() <= 1)
  finally:
    gc.enable()


def test_clear_requests_may_follow_each_other(served):
  with _connected(served.url) as client:
    chunked = b'transfer-encoding: chunked\r\n\r\n2;a=b\r\n{}\r\n0\r\n\r\n'
    client.sendall(_POST + _JSON + chunked + _GET)
    client.sendall(_GET.replace(b'\r\n\r\n', b'\r\nconnection: close\r\n\r\n'))
    answer = _rest(client)
  assert answer.startswith(b'HTTP/1.1 400 ')
  assert answer.count(b'HTTP/1.1 200 ') == 2


def test_at_the_limit_who_waits_gives_way(generator):
  most = 5
  with servers.running(generator, max_connections=most) as served:
    silent = [_connected(served.url) for _ in range(20)]
    try:
      servers.until(lambda: _num_open(silent) <= most)
      answer = httpx2.post(
        f'{served.url}/v1/completions',
        json={'prompt': 'a', **servers.GREEDY},
        timeout=30,
      )
      assert answer.status_code == 200
    finally:
      for client in silent:
        client.close()


def _num_open(clients):
  num = 0
  for client in clients:
    client.setblocking(False)
    try:
      num += bool(client.recv(1))
    except BlockingIOError:
      num += 1
    except ConnectionResetError:
      pass
  return num


def test_at_the_limit_probes_are_answered_and_others_told(generator):
  """Every connection has a request that runs."""
  may_end = threading.Event()
  most = 2
  with (
    servers.running(generator, max_connections=most) as served,
    contextlib.ExitStack() as stack,
  ):
    inbox = served.engine_loop._inbox
    inbox.put(may_end.wait)
    body = json.dumps({'prompt': 'a', **servers.GREEDY, 'stream': True})
    for _ in range(most):
      client = stack.enter_context(_connected(served.url))
      client.sendall(
        _POST + _JSON + b'content-length: %d\r\n\r\n' % len(body)
        + body.encode()
      )  # fmt: skip
    servers.until(lambda: inbox.qsize() >= most)
    try:
      assert httpx2.get(f'{served.url}/health').status_code == 200
      answer = httpx2.get(f'{served.url}/v1/models')
      assert answer.status_code == 503
      assert answer.headers['retry-after']
      error = answer.json()['error']
      assert error['code'] == 'too_many_connections'
    finally:
      may_end.set()
