"""Connections: slow, silent, too many, or unclear about their requests."""

import contextlib
import json
import socket
import threading
import time

import httpx2
import pytest

from tests.helpers import servers

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
