"""API keys: the file of --api_keys, and the check of every request.

Each key belongs to a principal, the sender of a request. A file of keys has one
`name:key` per line; the name is the principal. Fairness and the isolation of
cached prompts go by the principal, which a request cannot choose. Two keys with
one name belong to one principal, so that a key can be replaced while the old
one is in use. Empty lines, and lines that begin with #, are ignored.

The file is read again when it changes, or after SIGHUP. If it is then wrong or
missing, the keys that were read before stay valid, and the log says so.

Keys with limits, and keys of administrators, are in the records: see
`access.keys`. A server without any key checks none, and all requests have the
principal ''.
"""

from collections.abc import Collection
import hmac
import logging
import math
import os
import pathlib
import stat
import time

from checks import expect
from inference.server.access import keys as keys_lib
from inference.server.api import errors

# Probes of the process manager need no key; the answers reveal only the state.
OPEN_PATHS = '/health', '/ready'

_LOG = logging.getLogger('uvicorn.error')
_LOOK_SECONDS = 1.0  # a change of the file counts after at most this time

# Routes of administrators change the served models, so they always need an
# admin key.
_ADMIN = '/admin'

_NOT_ADMIN = errors.ApiError(
  403,
  'authorization: got the key of a user, expected a key of an admin; make one'
  ' with `python -m inference.server.keys create --role=admin`',
  param=None,
  code='insufficient_permissions',
)
_UNKNOWN = errors.ApiError(
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
    """Returns the principal of a key, or None; takes equal time for any key."""
    digest = keys_lib.digest(key)
    found = None
    for known, name in self._principals:
      # No early exit: the time must not reveal a part of a key, or its line.
      if hmac.compare_digest(digest, known):
        found = name
    return found


class KeysFile:
  """The keys of a file that may change."""

  def __init__(self, path: str | os.PathLike):
    """Reads the file; `read` says which errors it raises."""
    self._path, self._stamp = path, _stamp(path)
    self._keys = read(path)
    self._looked = time.monotonic()

  def principal(self, key: str) -> str | None:
    """Returns the principal of a key, or None."""
    if time.monotonic() >= self._looked + _LOOK_SECONDS:
      self._look()
    return self._keys.principal(key)

  def expire(self) -> None:
    """Makes the next look-up read the file again."""
    self._stamp, self._looked = None, -math.inf

  def _look(self) -> None:
    self._looked = time.monotonic()
    stamp = _stamp(self._path)
    if stamp == self._stamp:
      return
    self._stamp = stamp
    try:
      self._keys = read(self._path)
      _LOG.info('%s: read again', self._path)
    except (ValueError, OSError) as error:
      _LOG.error('%s; the keys that were read before stay valid', error)


def read(path: str | os.PathLike) -> ApiKeys:
  """Returns the keys of a file.

  Raises:
    FileNotFoundError: there is no file.
    ValueError: the file cannot be read, holds no key, or a line is wrong. The
      error does not repeat the key.
  """
  keys: dict[bytes, str] = {}
  for number, line in enumerate(_text(path).splitlines(), 1):
    line = line.strip()
    if not line or line.startswith('#'):
      continue
    name, _, key = (part.strip() for part in line.partition(':'))
    is_shown = (name + key).isprintable()
    if not (name and key and key.isascii() and is_shown):
      raise ValueError(
        f'{path}:{number}: got a line that is not name:key, expected a'
        ' printable name and a key of printable ASCII; put # in front of a'
        ' comment'
      )
    if (other := keys.setdefault(keys_lib.digest(key), name)) != name:
      raise ValueError(
        f'{path}:{number}: got the key of {expect.shown(other)} for'
        f' {expect.shown(name)} too, expected one name per key; make another'
        ' key'
      )
  if not keys:
    raise ValueError(
      f'{path}: got no key, expected at least one line name:key; leave'
      ' --api_keys out to serve without keys'
    )
  return ApiKeys(keys)


def _text(path: str | os.PathLike) -> str:
  """Returns the content of a file of keys; warns if others can read it.

  An empty path comes from an unset shell variable. It is refused: without keys
  the server would answer every client.
  """
  fix = 'a file of lines name:key; leave --api_keys out to serve without keys'
  if not os.fspath(path).strip():
    raise ValueError(f'--api_keys: got an empty path, expected {fix}')
  path = pathlib.Path(path)
  if not path.exists():
    raise FileNotFoundError(
      f'--api_keys: got {path}, which does not exist, expected {fix}'
    )
  if not path.is_file():
    raise ValueError(
      f'--api_keys: got {path}, which is no regular file, expected {fix}'
    )
  try:
    if path.stat().st_mode & (stat.S_IROTH | stat.S_IWOTH):
      _LOG.warning(
        '%s: every user of this machine can read or write the keys; chmod 600',
        path,
      )
    return path.read_text('utf-8-sig')
  except UnicodeDecodeError as error:
    raise ValueError(
      f'--api_keys: got {path}, which is not UTF-8 at byte {error.start},'
      f' expected {fix}'
    ) from None
  except OSError as error:
    raise ValueError(
      f'--api_keys: got {path}, which cannot be read ({error.strerror}),'
      f' expected {fix}'
    ) from None


def _stamp(path: str | os.PathLike) -> tuple[int, ...] | None:
  try:
    found = os.stat(path)
  except OSError:
    return None
  return found.st_mtime_ns, found.st_size, found.st_ino


class Authentication:
  """ASGI middleware: sets the state of a request, or answers 401 or 403.

  `state.key` is the `keys.Key`, None without keys. `state.principal` is its
  name. The check comes before any part of the body is read.
  """

  def __init__(
    self,
    app,
    keyring: keys_lib.Keyring,
    open_paths: Collection[str] = OPEN_PATHS,
  ):
    self._app, self._keyring, self._open = app, keyring, open_paths

  async def __call__(self, scope, receive, send):
    if scope['type'] == 'http':
      key = None
      if scope['path'] not in self._open:
        is_admin = f'{scope["path"]}/'.startswith(f'{_ADMIN}/')
        key = await self._keyring.find(_bearer(scope['headers']))
        refusal = None
        if key is None and (self._keyring.has_keys or is_admin):
          refusal = _UNKNOWN
        elif key and is_admin and not key.is_admin:
          refusal = _NOT_ADMIN
        if refusal:
          await refusal.response()(scope, receive, send)
          return
      state = scope.setdefault('state', {})
      state['principal'], state['key'] = key.name if key else '', key
    await self._app(scope, receive, send)


def _bearer(headers) -> str:
  for name, value in headers:
    if name == b'authorization':
      scheme, _, key = value.decode('latin-1').partition(' ')
      return key.strip() if scheme.lower() == 'bearer' else ''
  return ''
