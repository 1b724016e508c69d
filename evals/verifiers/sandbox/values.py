"""Values between two confined processes: plain data, and references.

    size of 4 bytes, JSON text

A number, a text, None and containers of them are copied. The value of any other
type stays where it is, and a number refers to it. So nothing that one process
defines, such as a comparison that is always true, ever runs in the other one.
"""

from collections.abc import Callable
import json
import os
import struct
from typing import Any

MOST_BYTES = 1 << 24  # most bytes of a message

_SEQUENCES = {'list': list, 'tuple': tuple, 'set': set, 'frozenset': frozenset}


def encode(value: Any, refer: Callable[[Any], int], depth: int = 0) -> Any:
  """Returns a value as JSON values.

  Args:
    refer: gives the number of a value that is not plain.

  Raises:
    ValueError: the value is nested too deeply.
  """
  if depth > 100:
    raise ValueError('got a value of more than 100 levels')
  if value is None or isinstance(value, bool | str):
    return value
  if isinstance(value, int | float):
    return value
  if isinstance(value, complex):
    return {'complex': [value.real, value.imag]}
  if isinstance(value, bytes):
    return {'bytes': value.hex()}
  if isinstance(value, dict):
    pairs = [
      [encode(each, refer, depth + 1) for each in pair]
      for pair in value.items()
    ]
    return {'dict': pairs}
  for name, kind in _SEQUENCES.items():
    if isinstance(value, kind):
      return {name: [encode(each, refer, depth + 1) for each in value]}
  return {'reference': refer(value)}


def decode(value: Any, follow: Callable[[int], Any]) -> Any:
  """Returns the value of JSON values that a stranger may have written.

  Args:
    follow: gives the value of a number.

  Raises:
    ValueError: `encode` cannot have made them.
  """
  if not isinstance(value, dict | list):
    return value
  try:
    ((kind, inner),) = dict(value).items()
    if kind == 'dict':
      return {decode(k, follow): decode(v, follow) for k, v in inner}
    if kind in _SEQUENCES:
      return _SEQUENCES[kind](decode(each, follow) for each in inner)
    if kind == 'complex':
      return complex(*inner)
    if kind == 'bytes':
      return bytes.fromhex(inner)
    if kind == 'reference':
      return follow(int(inner))
  except (AttributeError, TypeError, LookupError, RecursionError) as error:
    raise ValueError(f'got no value: {error}') from None
  raise ValueError(f'got a value of kind {kind!r}')


def send(pipe: int, message: Any) -> None:
  """Writes a message to a pipe."""
  text = json.dumps(message).encode()
  data = memoryview(struct.pack('>I', len(text)) + text)
  while data:
    data = data[os.write(pipe, data) :]


def receive(pipe: int) -> Any:
  """Reads a message from a pipe.

  Raises:
    EOFError: the other end is closed.
    ValueError: the bytes are no message.
  """
  (size,) = struct.unpack('>I', _read(pipe, 4))
  if size > MOST_BYTES:
    raise ValueError(f'got a message of {size} bytes')
  return json.loads(_read(pipe, size))


def _read(pipe: int, size: int) -> bytes:
  parts = []
  while size:
    part = os.read(pipe, min(size, 1 << 20))
    if not part:
      raise EOFError
    parts.append(part)
    size -= len(part)
  return b''.join(parts)
