"""The doorkeeper: a process that accepts connections, and answers /health.

    python -I inference/server/http/doorkeeper.py FD LISTENING...

The server starts it, see `door`, and holds the other end of the socket FD. The
server sends the answer to GET /health on it, several times per second; a
connection goes back the other way, as a file descriptor. A first request that
is exactly a GET /health is answered here. All other connections go to the
server, and no byte of theirs is read before.

A server that hangs must not look healthy: after `_STALL_SECONDS` without a
message, probes go to the server too, and wait as every request does. Nothing
but the standard library is imported: the process takes 10 MB.
"""

from collections.abc import Sequence
import contextlib
import json
import re
import selectors
import socket
import sys
import time
import uuid

MOST_BYTES = 8192  # of a message
_STALL_SECONDS = 2.0
_MOST_WATCHED = 64  # connections that may bring a probe
_MOST_ACCEPTED = 32  # between two looks at the others
# A client that has connected sends its request at once. Others may wait for
# long, and the server has the limits for them.
_FIRST_SECONDS = 0.05
_IDLE_SECONDS = 5.0  # after an answer
_PAUSE_SECONDS = 0.1  # when no file is free
_MOST_HEAD = 2048  # bytes
_HEAD = re.compile(
  rb"GET /health HTTP/1\.1\r\n((?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t -~]*\r\n)*)"
  rb'\r\n'
)
_BODY_OR_MORE = {b'transfer-encoding', b'upgrade', b'expect'}


def message(
  status: int, reason: str, headers: Sequence[tuple[bytes, bytes]], body: bytes
) -> bytes:
  """Returns the message with the answer to a probe."""
  lines = [f'HTTP/1.1 {status} {reason}']
  lines += [f'{name.decode()}: {value.decode()}' for name, value in headers]
  return json.dumps({'lines': lines, 'body': body.decode()}).encode()


def closes_after(head: bytes) -> bool | None:
  """Returns whether a probe's connection ends with its answer.

  Args:
    head: the bytes that have arrived.

  Returns:
    None if they are not one whole GET /health without a body. The server then
    decides what they are.
  """
  match = _HEAD.fullmatch(head)
  if match is None:
    return None
  pairs = [line.split(b':', 1) for line in match[1].lower().splitlines()]
  headers = {name: value.strip() for name, value in pairs}
  is_clear = len(headers) == len(pairs) and b'host' in headers
  is_clear &= headers.get(b'content-length', b'0') == b'0'
  if not is_clear or headers.keys() & _BODY_OR_MORE:
    return None
  wish = headers.get(b'connection', b'keep-alive')
  return {b'close': True, b'keep-alive': False}.get(wish)


class Doorkeeper:
  """Accepts connections until the server ends."""

  def __init__(self, server: socket.socket, listening: Sequence[socket.socket]):
    """Takes the socket to the server, and sockets that listen."""
    self._server, self._listening = server, listening
    self._selector = selectors.DefaultSelector()
    self._lines: list[str] = []
    self._body, self._told_at = b'', float('-inf')
    # When each connection is watched no more, and whether it was answered.
    self._until: dict[socket.socket, float] = {}
    self._is_answered: set[socket.socket] = set()
    # A connection that the server had no room for; none is accepted meanwhile.
    self._held: list[socket.socket] = []
    self._accepts_from = 0.0
    self._is_accepting = False

  def work(self) -> None:
    """Returns when the server has ended."""
    self._selector.register(self._server, selectors.EVENT_READ)
    for each in (self._server, *self._listening):
      each.setblocking(False)
    while True:
      now = time.monotonic()
      self._accept_or_not(not self._held and self._accepts_from <= now)
      for key, mask in self._selector.select(self._seconds_left(now)):
        found = key.fileobj
        assert isinstance(found, socket.socket)
        if found is self._server:
          if not self._obey(mask):
            return
        elif found in self._until:
          self._look(found)
        else:
          self._accept(found)
      self._end_watching(time.monotonic())

  def _obey(self, mask: int) -> bool:
    """Takes messages of the server; returns False if it has ended."""
    if mask & selectors.EVENT_WRITE:
      self._selector.modify(self._server, selectors.EVENT_READ)
      held, self._held = self._held, []
      for each in held:
        self._hand_over(each)
    if mask & selectors.EVENT_READ:
      try:
        data = self._server.recv(MOST_BYTES)
      except BlockingIOError:
        return True
      except OSError:
        data = b''
      if not data:
        return False
      told = json.loads(data)
      self._lines, self._body = told['lines'], told['body'].encode()
      self._told_at = time.monotonic()
    return True

  def _seconds_left(self, now: float) -> float | None:
    """Returns the seconds until a time is over; None: no end."""
    ends = [*self._until.values()]
    if now < self._accepts_from:
      ends.append(self._accepts_from)
    return max(min(ends) - now, 0.0) if ends else None

  def _accept_or_not(self, is_accepting: bool) -> None:
    if is_accepting == self._is_accepting:
      return
    self._is_accepting = is_accepting
    for each in self._listening:
      if is_accepting:
        self._selector.register(each, selectors.EVENT_READ)
      else:
        self._selector.unregister(each)

  def _accept(self, listening: socket.socket) -> None:
    for _ in range(_MOST_ACCEPTED):
      if self._held:
        return
      try:
        connection, _ = listening.accept()
      except (BlockingIOError, ConnectionError):
        return  # none is left, or it has gone
      except OSError:  # no file is free; the client waits in the kernel
        self._accepts_from = time.monotonic() + _PAUSE_SECONDS
        return
      connection.setblocking(False)
      self._look(connection)

  def _look(self, connection: socket.socket) -> None:
    """Answers a probe, waits for one, or hands the connection over."""
    try:
      head = connection.recv(_MOST_HEAD, socket.MSG_PEEK)
    except BlockingIOError:
      self._watch(connection, _FIRST_SECONDS)
      return
    except OSError:
      head = b''
    is_told = time.monotonic() - self._told_at < _STALL_SECONDS
    closes = closes_after(head) if is_told else None
    if closes is None:
      self._hand_over(connection)
      return
    answer = self._answer(closes=closes)
    try:
      connection.recv(len(head))
      is_sent = connection.send(answer) == len(answer)
    except OSError:
      is_sent = False
    if closes or not is_sent:
      self._forget(connection)
      connection.close()
    else:
      self._is_answered.add(connection)
      self._watch(connection, _IDLE_SECONDS)

  def _answer(self, *, closes: bool) -> bytes:
    lines = [*self._lines, f'x-request-id: req_{uuid.uuid4().hex}']
    if closes:
      lines.append('connection: close')
    return '\r\n'.join([*lines, '', '']).encode() + self._body

  def _watch(self, connection: socket.socket, seconds: float) -> None:
    """Waits for a request."""
    if connection not in self._until:
      if len(self._until) >= _MOST_WATCHED:
        self._hand_over(connection)
        return
      self._selector.register(connection, selectors.EVENT_READ)
    self._until[connection] = time.monotonic() + seconds

  def _end_watching(self, now: float) -> None:
    for connection, until in list(self._until.items()):
      if until > now:
        continue
      if connection in self._is_answered:
        self._forget(connection)
        connection.close()
      else:
        self._hand_over(connection)

  def _hand_over(self, connection: socket.socket) -> None:
    self._forget(connection)
    try:
      socket.send_fds(self._server, [b'.'], [connection.fileno()])
    except BlockingIOError:  # the server has many to take already
      self._held.append(connection)
      both = selectors.EVENT_READ | selectors.EVENT_WRITE
      self._selector.modify(self._server, both)
      return
    except OSError:
      pass  # it has ended: `_obey` finds out
    connection.close()

  def _forget(self, connection: socket.socket) -> None:
    if connection in self._until:
      self._selector.unregister(connection)
      del self._until[connection]
      self._is_answered.discard(connection)


def main(argv: Sequence[str]) -> None:
  """Works for the server that has started this process."""
  server, *listening = (socket.socket(fileno=int(each)) for each in argv[1:])
  with contextlib.suppress(KeyboardInterrupt):
    Doorkeeper(server, listening).work()


if __name__ == '__main__':
  main(sys.argv)
