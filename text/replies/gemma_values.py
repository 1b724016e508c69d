"""Values in the calls of Gemma: JSON with bare keys and its own quotes.

{city:<escape>Paris<escape>,days:[1,2],near:{sea:true}}
"""

import json
import re
from typing import Any

_KEY = re.compile(r'\s*([^\s:{}\[\],]+)\s*:')
_BARE = re.compile(r'\s*([^\s:{}\[\],]+)\s*')
_MOST_DEPTH = 64


class _Broken(ValueError):
  pass


def read(text: str, quote: str) -> Any:
  """Returns the value of a text; None: it is broken.

  Args:
    text: all of it must be the value.
    quote: stands before and after a string.
  """
  try:
    value, end = _value(text, 0, quote, _MOST_DEPTH)
  except _Broken:
    return None
  return None if text[end:].strip() else value


def _value(text: str, at: int, quote: str, depth: int) -> tuple[Any, int]:
  at = _after_space(text, at)
  if not depth:
    raise _Broken
  if text.startswith(quote, at):
    return _string(text, at, quote)
  if text.startswith('{', at):
    return _object(text, at + 1, quote, depth - 1)
  if text.startswith('[', at):
    return _list(text, at + 1, quote, depth - 1)
  bare = _BARE.match(text, at)
  if not bare:
    raise _Broken
  try:
    return json.loads(bare.group(1)), bare.end()
  except ValueError:
    raise _Broken from None


def _string(text: str, at: int, quote: str) -> tuple[str, int]:
  start = at + len(quote)
  end = text.find(quote, start)
  if end < 0:
    raise _Broken
  return text[start:end], end + len(quote)


def _object(text: str, at: int, quote: str, depth: int) -> tuple[dict, int]:
  found: dict[str, Any] = {}
  while not text.startswith('}', at := _after_space(text, at)):
    if found:
      at = _after(text, at, ',')
    if text.startswith(quote, at):
      name, at = _string(text, at, quote)
      at = _after(text, at, ':')
    elif key := _KEY.match(text, at):
      name, at = key.group(1), key.end()
    else:
      raise _Broken
    found[name], at = _value(text, at, quote, depth)
  return found, at + 1


def _list(text: str, at: int, quote: str, depth: int) -> tuple[list, int]:
  found: list[Any] = []
  while not text.startswith(']', at := _after_space(text, at)):
    if found:
      at = _after(text, at, ',')
    value, at = _value(text, at, quote, depth)
    found.append(value)
  return found, at + 1


def _after(text: str, at: int, sign: str) -> int:
  at = _after_space(text, at)
  if not text.startswith(sign, at):
    raise _Broken
  return _after_space(text, at + len(sign))


def _after_space(text: str, at: int) -> int:
  while at < len(text) and text[at].isspace():
    at += 1
  return at
