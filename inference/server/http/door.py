"""The door: how the server gets its connections, and what probes are told.

    door = Door(listening, adopt=...)
    door.start()
    door.tell(response, headers)      # by the event loop, all the time
    await door.close()

Every token of every stream passes the event loop. Behind hundreds of clients a
probe would wait for several of its turns, hundreds of milliseconds, and a
supervisor would restart a server that is only busy. A thread would wait too,
for Python's lock. So a process accepts connections and answers probes, see
`doorkeeper`. If it ends, the event loop accepts connections itself.
"""

import asyncio
from collections.abc import Callable, Sequence
import contextlib
import http
import logging
import os
import socket
import subprocess
import sys

from fastapi import responses

from inference.server.http import doorkeeper

_LOG = logging.getLogger('uvicorn.error')
_MOST_TAKEN = 32  # connections, in one turn of the event loop
_END_SECONDS = 5.0


class Door:
  """Hands the connections of sockets to an event loop."""

  def __init__(
    self,
    listening: Sequence[socket.socket],
    *,
    adopt: Callable[[socket.socket], None],
  ):
    """Takes sockets that listen; `close` closes them.

    Args:
      listening: the sockets.
      adopt: takes a connection, in the event loop.
    """
    self._listening, self._adopt = listening, adopt
    self._keeper: subprocess.Popen | None = None
    self._socket: socket.socket | None = None
    self._is_closed = False

  @property
  def pid(self) -> int | None:
    """Id of the process that accepts connections; None: this one does."""
    return self._keeper.pid if self._socket and self._keeper else None

  def start(self, *, has_keeper: bool) -> None:
    """Starts to accept connections, within the event loop.

    Args:
      has_keeper: whether a process accepts them, where there can be one.
    """
    self._loop = asyncio.get_running_loop()
    for each in self._listening:
      each.setblocking(False)
    if has_keeper and sys.platform == 'linux':
      self._start_keeper()
    else:
      self._accept_here()

  def tell(
    self,
    response: responses.Response,
    headers: Sequence[tuple[bytes, bytes]],
  ) -> None:
    """Tells what probes are answered.

    Args:
      response: the answer to GET /health.
      headers: headers of all answers of the server.
    """
    if self._socket is None:
      return
    status = response.status_code
    told = doorkeeper.message(
      status,
      http.HTTPStatus(status).phrase,
      [*headers, *response.raw_headers],
      bytes(response.body),
    )
    with contextlib.suppress(OSError):  # `_take` finds out whether it has ended
      self._socket.send(told)

  async def close(self) -> None:
    """Stops listening."""
    self._is_closed = True
    self._drop()
    for each in self._listening:
      self._loop.remove_reader(each)
      each.close()
    if self._keeper:
      with contextlib.suppress(subprocess.TimeoutExpired):
        await asyncio.to_thread(self._keeper.wait, _END_SECONDS)
      self._keeper.kill()
      await asyncio.to_thread(self._keeper.wait)

  def _start_keeper(self) -> None:
    # Every message is whole, and when some hundred connections wait to be
    # taken, the kernel takes no more.
    self._socket, other = socket.socketpair(
      socket.AF_UNIX, socket.SOCK_SEQPACKET
    )
    self._socket.setblocking(False)
    files = [each.fileno() for each in (other, *self._listening)]
    self._keeper = subprocess.Popen(
      # It needs neither packages nor variables, and starts at once.
      [sys.executable, '-I', '-S', doorkeeper.__file__, *map(str, files)],
      pass_fds=files,
      stdin=subprocess.DEVNULL,
      # Linux shares the cores between sessions first: it gets one when it needs
      # one. Ctrl-C in a terminal is for the server.
      start_new_session=True,
    )
    other.close()
    self._loop.add_reader(self._socket, self._take)

  def _take(self) -> None:
    assert self._socket
    for _ in range(_MOST_TAKEN):
      try:
        data, files, *_ = socket.recv_fds(self._socket, 16, 1)
      except BlockingIOError:
        return
      except OSError:
        data, files = b'', []
      if not data:
        self._lose()
        return
      # Without a file, this process may open no more: the client is cut off.
      for each in files:
        self._take_file(each)

  def _take_file(self, file: int) -> None:
    try:
      connection = socket.socket(fileno=file)
    except OSError:
      os.close(file)
      return
    connection.setblocking(False)
    self._adopt(connection)

  def _lose(self) -> None:
    self._drop()
    if not self._is_closed:
      _LOG.error(
        'the process that accepts connections has ended; the event loop accepts'
        ' them, and probes wait for it'
      )
      self._accept_here()

  def _drop(self) -> None:
    if self._socket:
      self._loop.remove_reader(self._socket)
      self._socket.close()
      self._socket = None

  def _accept_here(self) -> None:
    for each in self._listening:
      self._loop.add_reader(each, self._accept, each)

  def _accept(self, listening: socket.socket) -> None:
    """Accepts several connections per turn; uvloop would accept one.

    Behind a hundred clients that come and go, a probe would wait for a hundred
    turns.
    """
    for _ in range(_MOST_TAKEN):
      try:
        connection, _ = listening.accept()
      except OSError:
        return  # none is left, or it has gone, or no file is free
      self._adopt(connection)
