"""Messages between two processes of one program, in frames of a socket.

    socket.sendall(frames.packed([message, ...]))
    for messages in reader.fed(data): ...

A frame holds a list of messages, so that all updates of a dispatch are one
write and one wake-up. Messages are tuples of values: a kind and its arguments.
Weights are never sent: each process reads them from their directory. Both ends
are one program and the socket is private to them, so pickle reads nothing that
a client has chosen the type of. Where a socket crosses machines, its ends know
each other by a secret before the first frame is read.
"""

from collections.abc import Iterator, Sequence
import pickle
import struct
from typing import Any, BinaryIO

Message = tuple[Any, ...]
_HEAD = struct.Struct('>Q')  # bytes of the frame behind it


def packed(messages: Sequence[Message]) -> bytes:
  """Returns the frame of messages."""
  data = pickle.dumps(messages, pickle.HIGHEST_PROTOCOL)
  return _HEAD.pack(len(data)) + data


def read(stream: BinaryIO) -> Iterator[Sequence[Message]]:
  """Yields the messages of each frame, until the other process has ended."""
  while len(head := stream.read(_HEAD.size)) == _HEAD.size:
    (size,) = _HEAD.unpack(head)
    if len(data := stream.read(size)) < size:
      return
    yield pickle.loads(data)


class Reader:
  """Cuts bytes that arrive in pieces into frames."""

  def __init__(self):
    self._data = bytearray()

  def fed(self, data: bytes) -> Iterator[Sequence[Message]]:
    """Yields the messages of each frame that is whole now."""
    self._data += data
    at = 0
    while len(self._data) >= at + _HEAD.size:
      (size,) = _HEAD.unpack_from(self._data, at)
      end = at + _HEAD.size + size
      if len(self._data) < end:
        break
      yield pickle.loads(memoryview(self._data)[at + _HEAD.size : end])
      at = end
    if at:
      self._data = self._data[at:]
