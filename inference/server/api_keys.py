"""API keys: each key belongs to a principal, the sender of a request.

A file of keys has one `name:key` per line; the name is the principal. Fairness
and the isolation of cached prompts go by the principal, which a request cannot
choose. Two keys with one name belong to one principal, so that a key can be
replaced while the old one is in use. Empty lines, and lines that begin with #,
are ignored.

Without a file no key is checked, and all requests have the principal ''.
"""

import hashlib
import hmac
import os
import pathlib

from inference.server import schema

# Probes of the process manager need no key; the answers reveal only the state.
OPEN_PATHS = '/health', '/ready'

_UNKNOWN = schema.ApiError(
  401,
  'authorization: got no key that this server knows, expected the header'
  ' authorization: Bearer KEY',
  param=None,
  code='invalid_api_key',
)


class ApiKeys:
  """The keys of a file, of which only digests are held."""

  def __init__(self, keys: dict[bytes, str]):
    """Takes the principals, by the SHA-256 of their keys."""
    self._principals = tuple(keys.items())

  def principal(self, key: str) -> str | None:
    """Returns the principal of a key, or None; in the same time for any key."""
    digest = _digest(key)
    found = None
    for known, name in self._principals:
      # No early exit: the time must not reveal a part of a key, or its line.
      if hmac.compare_digest(digest, known):
        found = name
    return found


def read(path: str | os.PathLike) -> ApiKeys:
  """Returns the keys of a file.

  Raises:
    FileNotFoundError: there is no file.
    ValueError: the file holds no key, or a line is wrong. The error does not
      repeat the key.
  """
  keys: dict[bytes, str] = {}
  if not (path := pathlib.Path(path)).is_file():
    raise FileNotFoundError(
      f'--api_keys: got {path}, which does not exist, expected a file of lines'
      ' name:key'
    )
  for number, line in enumerate(path.read_text('utf-8').splitlines(), 1):
    line = line.strip()
    if not line or line.startswith('#'):
      continue
    name, _, key = (part.strip() for part in line.partition(':'))
    if not (name and key and key.isascii() and key.isprintable()):
      raise ValueError(
        f'{path}:{number}: got a line that is not name:key, expected a name and'
        ' a key of printable ASCII; put # in front of a comment'
      )
    if keys.setdefault(_digest(key), name) != name:
      raise ValueError(
        f'{path}:{number}: got the key of {keys[_digest(key)]!r} for {name!r}'
        ' too, expected one name per key; make another key'
      )
  if not keys:
    raise ValueError(
      f'{path}: got no key, expected at least one line name:key; leave'
      ' --api_keys out to serve without keys'
    )
  return ApiKeys(keys)


class Authentication:
  """ASGI middleware: sets `state.principal` of a request, or answers 401.

  It acts before any part of the body is read.
  """

  def __init__(self, app, keys: ApiKeys | None):
    self._app, self._keys = app, keys

  async def __call__(self, scope, receive, send):
    if scope['type'] == 'http':
      principal: str | None = ''
      if self._keys and scope['path'] not in OPEN_PATHS:
        principal = self._keys.principal(_bearer(scope['headers']))
      if principal is None:
        await _UNKNOWN.response()(scope, receive, send)
        return
      scope.setdefault('state', {})['principal'] = principal
    await self._app(scope, receive, send)


def _bearer(headers) -> str:
  for name, value in headers:
    if name == b'authorization':
      scheme, _, key = value.decode('latin-1').partition(' ')
      return key.strip() if scheme.lower() == 'bearer' else ''
  return ''


def _digest(key: str) -> bytes:
  return hashlib.sha256(key.encode()).digest()
