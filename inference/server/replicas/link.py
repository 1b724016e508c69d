"""The server's end of the socket of one replica, in the event loop.

    link = Link(setup, environment, on_message=..., on_death=...)
    link.start()
    link.send(('cancel', version, number))
    plan = await link.call('plan', directory, config)

Messages of one turn of the event loop are one frame. The process is a new
program, not a fork: threads and devices of the server do not survive a fork.
"""

import asyncio
from collections.abc import Callable, Mapping
import contextlib
import itertools
import os
import pathlib
import socket
import subprocess
import sys
import time
from typing import Any

from inference.server.replicas import values
from parallel import frames, pulse

_ROOT = pathlib.Path(__file__).parents[3]
_CHILD = 'inference.server.replicas.child'
_READ_BYTES = 2**18


class Died(RuntimeError):
  """The replica has ended before it answered."""


class Link:
  """A replica's process and the socket to it; belongs to one event loop."""

  def __init__(
    self,
    setup: values.Setup,
    environment: Mapping[str, str],
    *,
    on_message: Callable[[frames.Message], None],
    on_death: Callable[['Link', str], None],
  ):
    """Makes the link without starting the process.

    Args:
      setup: is told to the replica.
      environment: of its process, all variables.
      on_message: called with each message, in the event loop.
      on_death: called once the process has ended, with how, unless `close`
        was called before.
    """
    self._setup, self._environment = setup, environment
    self._on_message, self._on_death = on_message, on_death
    self._socket: socket.socket | None = None
    self._process: subprocess.Popen | None = None
    self._reader = frames.Reader()
    self._outgoing: list[frames.Message] = []
    self._unsent = bytearray()
    self._calls: dict[int, asyncio.Future] = {}
    self._numbers = itertools.count()
    self._is_closed = False
    self.pulse = pulse.Pulse(setup.heartbeat_timeout_s, time.monotonic())
    self._reaping: asyncio.Task | None = None

  @property
  def pid(self) -> int | None:
    """Id of the process."""
    return self._process.pid if self._process else None

  def start(self) -> None:
    """Starts the process."""
    own, other = socket.socketpair()
    own.setblocking(False)
    paths = [str(_ROOT), self._environment.get('PYTHONPATH', '')]
    self._process = subprocess.Popen(
      [sys.executable, '-m', _CHILD, str(other.fileno())],
      pass_fds=[other.fileno()],
      stdin=subprocess.DEVNULL,
      env={
        **self._environment,
        'PYTHONPATH': os.pathsep.join(filter(None, paths)),
      },
      # Ctrl-C in a terminal is for the server, which finishes requests first.
      start_new_session=True,
    )
    other.close()
    self._socket, self._loop = own, asyncio.get_running_loop()
    self._loop.add_reader(own, self._read)
    self.send(('setup', self._setup))

  def send(self, message: frames.Message) -> None:
    """Sends a message, in a frame with the others of this turn."""
    if self._socket is None:
      return  # it has died: `on_death` tells
    if not self._outgoing:
      self._loop.call_soon(self._flush)
    self._outgoing.append(message)

  async def call(self, name: str, *args: Any) -> Any:
    """Returns the answer of the replica to a call.

    Raises:
      ValueError: the replica raises it.
      Died: it has ended.
    """
    if self._socket is None:
      raise Died('the replica has ended')
    number = next(self._numbers)
    answer = self._calls[number] = self._loop.create_future()
    self.send(('call', number, name, args))
    try:
      return await answer
    finally:
      self._calls.pop(number, None)

  def kill(self) -> None:
    """Kills the process; `on_death` is called."""
    if self._process:
      self._process.kill()

  async def close(self) -> None:
    """Ends the process, and waits for its end."""
    self._is_closed = True
    self.send(('end',))
    self._flush()
    self._drop()
    if self._process:
      with contextlib.suppress(subprocess.TimeoutExpired):
        await asyncio.to_thread(self._process.wait, 5)
      self._process.kill()
      await asyncio.to_thread(self._process.wait)

  def _read(self) -> None:
    assert self._socket
    try:
      data = self._socket.recv(_READ_BYTES)
    except BlockingIOError:
      return
    except OSError:
      data = b''
    if not data:
      self._drop()
      self._reaping = self._loop.create_task(self._reap())
      return
    for messages in self._reader.fed(data):
      for message in messages:
        if message[0] == 'result':
          self._settle(*message[1:])
        elif message[0] == 'beat':
          self.pulse.heard(time.monotonic(), *message[1:])
        else:
          self._on_message(message)

  def _settle(self, number: int, result: Any, error: Any) -> None:
    answer = self._calls.get(number)
    if answer is None or answer.done():
      return  # nobody waits any more
    if error:
      answer.set_exception(values.error_of(error))
    else:
      answer.set_result(result)

  def _flush(self) -> None:
    if self._socket is None:
      return
    messages, self._outgoing = self._outgoing, []
    is_waiting = bool(self._unsent)
    self._unsent += frames.packed(messages)
    if not is_waiting:
      self._write()

  def _write(self) -> None:
    if self._socket is None:
      return
    try:
      num_sent = self._socket.send(self._unsent)
    except BlockingIOError:
      num_sent = 0
    except OSError:
      return  # it has died: `_read` finds out
    del self._unsent[:num_sent]
    if self._unsent:
      self._loop.add_writer(self._socket, self._write)
    else:
      self._loop.remove_writer(self._socket)

  def _drop(self) -> None:
    """Closes the socket; the replica ends by itself."""
    if self._socket is None:
      return
    self._loop.remove_reader(self._socket)
    self._loop.remove_writer(self._socket)
    self._socket.close()
    self._socket = None
    for answer in self._calls.values():
      if not answer.done():
        answer.set_exception(Died('the replica has ended'))

  async def _reap(self) -> None:
    assert self._process
    try:
      await asyncio.to_thread(self._process.wait, 1)
    except subprocess.TimeoutExpired:
      self._process.kill()  # it has closed its socket, and does not end
      await asyncio.to_thread(self._process.wait)
    if not self._is_closed:
      code = self._process.returncode
      how = f'signal {-code}' if code < 0 else f'exit code {code}'
      self._on_death(self, how)
