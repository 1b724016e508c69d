"""Who sends a request: the principal that its API key belongs to.

A file of keys has one `name:key` on each line. Fairness and the isolation of
cached prompts go by the name, which no request can choose; two keys of one name
are one principal, so that a key can be replaced while the old one is in use.
Empty lines and those that begin with # count for nothing.

Without a file there are no keys to check, and everybody is one principal, ''.
"""

import hashlib
import hmac
import os
import pathlib

from inference.server import schema

# Asked by whoever keeps the process running, and telling nothing else.
OPEN_PATHS = '/health', '/ready'

_UNKNOWN = schema.ApiError(
  401,
  'authorization: got no key that this server knows, expected the header'
  ' authorization: Bearer KEY',
  param=None,
  code='invalid_api_key',
)


class ApiKeys:
  """The keys of a file; holds digests of them alone."""

  def __init__(self, keys: dict[bytes, str]):
    """Takes principals by the SHA-256 of their keys."""
    self._principals = tuple(keys.items())

  def principal(self, key: str) -> str | None:
    """Returns who has that key, None for nobody; takes as long for any."""
    digest = _digest(key)
    found = None
    for known, name in self._principals:
      # No early end: time is to tell neither a part of a key nor its place.
      if hmac.compare_digest(digest, known):
        found = name
    return found


def read(path: str | os.PathLike) -> ApiKeys:
  """Reads a file of keys.

  Raises:
    FileNotFoundError: there is none.
    ValueError: it holds no key, or a line is none; keys are not repeated.
  """
  keys: dict[bytes, str] = {}
  if not (path := pathlib.Path(path)).is_file():
    raise FileNotFoundError(
      f'--api_keys: got {path}, no such file; expected one of lines name:key'
    )
  for number, line in enumerate(path.read_text('utf-8').splitlines(), 1):
    line = line.strip()
    if not line or line.startswith('#'):
      continue
    name, _, key = (part.strip() for part in line.partition(':'))
    if not (name and key and key.isascii() and key.isprintable()):
      raise ValueError(
        f'{path}:{number}: got a line that is not name:key, expected a name and'
        ' a key of printable ASCII; put # in front of a remark'
      )
    if keys.setdefault(_digest(key), name) != name:
      raise ValueError(
        f'{path}:{number}: got the key of {keys[_digest(key)]!r} for {name!r}'
        ' too, expected one owner; make another key'
      )
  if not keys:
    raise ValueError(
      f'{path}: got no key, expected at least one line name:key; leave'
      ' --api_keys out to serve without keys'
    )
  return ApiKeys(keys)


class Authentication:
  """ASGI middleware: puts the principal into a request's state, or refuses.

  Before anything of the body is read.
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
