"""Probes of a server's health, and a control that only the machine slows."""

import asyncio
from collections.abc import Iterator
import contextlib
import multiprocessing
from multiprocessing import connection
import os
import socket
import time

_PAUSE_SECONDS = 0.05  # between two probes
_REQUEST = b'GET /health HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n'


def probe(host: str, port: int, seconds: float) -> list[float]:
  """Returns the seconds of requests to /health, each on a new connection.

  Runs in a process of its own: the clients of `abuse` would delay it.

  Raises:
    ValueError: an answer is no 200.
  """
  with contextlib.suppress(OSError):  # its process has probed before
    # Linux shares the cores between sessions: otherwise the probe would wait
    # for the clients, and its time would be theirs.
    os.setsid()
  taken: list[float] = []
  end = time.perf_counter() + seconds
  while (start := time.perf_counter()) < end:
    with socket.create_connection((host, port)) as client:
      client.sendall(_REQUEST)
      answer = client.recv(4096)
      taken.append(time.perf_counter() - start)
    if b' 200 ' not in answer:
      raise ValueError(f'/health: got {answer!r}, expected 200')
    time.sleep(_PAUSE_SECONDS)
  return taken


def answer_only(found: connection.Connection) -> None:
  """Serves 200 to every request: the control. Sends its port to `found`."""

  async def answer(reader, writer):
    await reader.readuntil(b'\r\n\r\n')
    writer.write(b'HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n')
    writer.close()

  async def serve():
    server = await asyncio.start_server(answer, '127.0.0.1', 0)
    found.send(server.sockets[0].getsockname()[1])
    await server.serve_forever()

  asyncio.run(serve())


@contextlib.contextmanager
def control() -> Iterator[int]:
  """Starts the control; yields its port."""
  spawn = multiprocessing.get_context('spawn')
  receiver, sender = spawn.Pipe(duplex=False)
  process = spawn.Process(target=answer_only, args=(sender,), daemon=True)
  process.start()
  try:
    yield receiver.recv()
  finally:
    process.terminate()
