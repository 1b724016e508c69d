"""Keys: the sender of a request, and the sender's limits.

Keys come from two places: the records, which `python -m inference.server.keys`
writes, and the file of --api_keys. The server holds only their SHA-256 digests.
The keys of the records are random and long, so that a plain hash resists
guessing.

The server asks for keys as soon as one was ever made: after the last key is
revoked it refuses all clients, instead of answering all.
"""

import asyncio
import dataclasses
import hashlib
import hmac
import ipaddress
import logging
import math
import secrets
import sqlite3
import time
from typing import Protocol

from checks import expect
from inference.server.records import database

TABLES = """
CREATE TABLE IF NOT EXISTS keys (
  id TEXT PRIMARY KEY,
  name TEXT NOT NULL,
  digest BLOB NOT NULL UNIQUE,
  is_admin INTEGER NOT NULL,
  allows_feedback INTEGER NOT NULL,
  requests_per_minute INTEGER,
  tokens_per_minute INTEGER,
  max_concurrent INTEGER,
  budget REAL,
  weight REAL NOT NULL,
  created_at REAL NOT NULL,
  revoked_at REAL
);
"""

_LOG = logging.getLogger('uvicorn.error')
_LOOK_SECONDS = 0.5  # a change in the records counts after at most this time
_KEY_BYTES = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Key:
  """The record of a key; the text of the key itself is not kept.

  None means no limit.

  Raises:
    ValueError: a value is out of range.
  """

  id: str  # names the key in lists and in the ledger; no secret
  name: str  # the principal: each has its share and its cached prompts
  is_admin: bool = False  # may use the routes below /admin
  allows_feedback: bool = False  # its ratings of answers may be stored
  requests_per_minute: int | None = None
  tokens_per_minute: int | None = None  # of prompts and completions
  max_concurrent: int | None = None  # requests that are open at once
  budget: float | None = None  # money, in the currency of the prices
  weight: float = 1.0  # share of the engine, relative to other principals

  def __post_init__(self):
    if not self.name.strip() or not self.name.isprintable():
      raise ValueError(
        f'name: got {expect.shown(self.name)}, expected printable text; it'
        ' says whom the key belongs to'
      )
    for name in ('requests_per_minute', 'tokens_per_minute', 'max_concurrent'):
      if (value := getattr(self, name)) is not None:
        expect.at_least(name, value, 1, 'leave it out for no limit')
    if self.budget is not None and not 0 <= self.budget < math.inf:
      raise ValueError(
        f'budget: got {self.budget}, expected a finite amount, at least 0;'
        ' leave it out for no limit'
      )
    if not 0 < self.weight < math.inf:
      raise ValueError(
        f'weight: got {self.weight}, expected a finite number above 0'
      )


_FIELDS = tuple(field.name for field in dataclasses.fields(Key))


def create(connection: sqlite3.Connection, **fields) -> tuple[Key, str]:
  """Stores a new key; returns its record and its text, which is not kept.

  Args:
    connection: connection to the records, in a transaction.
    **fields: the fields of `Key` except the id.
  """
  key = Key(id=f'key_{secrets.token_hex(6)}', **fields)
  # Scanners for leaked secrets know this prefix.
  text = f'sk-{secrets.token_urlsafe(_KEY_BYTES)}'
  row = dataclasses.asdict(key)
  row.update(digest=digest(text), created_at=time.time())
  connection.execute(
    f'INSERT INTO keys ({", ".join(row)}) VALUES ({", ".join("?" * len(row))})',
    tuple(row.values()),
  )
  return key, text


def change(connection: sqlite3.Connection, key_id: str, **fields) -> Key:
  """Changes limits or permissions of a key; returns its new record.

  Args:
    connection: connection to the records, in a transaction.
    key_id: id of the key.
    **fields: the fields of `Key` that change.

  Raises:
    ValueError: there is no such key, it is revoked, or a value is out of range.
  """
  row = connection.execute(
    'SELECT * FROM keys WHERE id = ? AND revoked_at IS NULL', (key_id,)
  ).fetchone()
  if row is None:
    raise _unknown(key_id)
  changed = dataclasses.replace(of_row(row), **fields)
  columns = ', '.join(f'{name} = ?' for name in fields)
  connection.execute(
    f'UPDATE keys SET {columns} WHERE id = ?', (*fields.values(), key_id)
  )
  return changed


def revoke(connection: sqlite3.Connection, key_id: str) -> None:
  """Ends a key; its row stays, since the ledger names it.

  Raises:
    ValueError: there is no such key, or it is revoked.
  """
  found = connection.execute(
    'UPDATE keys SET revoked_at = ? WHERE id = ? AND revoked_at IS NULL',
    (time.time(), key_id),
  )
  if not found.rowcount:
    raise _unknown(key_id)


def _unknown(key_id: str) -> ValueError:
  return ValueError(
    f'id: got {expect.shown(key_id)}, expected the id of a key that is not'
    ' revoked; `list` prints them'
  )


def rows(connection: sqlite3.Connection) -> list[sqlite3.Row]:
  """Returns all keys, revoked ones too, oldest first."""
  return connection.execute('SELECT * FROM keys ORDER BY created_at').fetchall()


def of_row(row: sqlite3.Row) -> Key:
  """Returns the key of a row."""
  fields = {name: row[name] for name in _FIELDS}
  for name in ('is_admin', 'allows_feedback'):
    fields[name] = bool(fields[name])
  return Key(**fields)


def digest(text: str) -> bytes:
  """Returns the SHA-256 of a key."""
  return hashlib.sha256(text.encode()).digest()


class File(Protocol):
  """A file of keys, such as `access.api_keys` reads."""

  def principal(self, key: str) -> str | None:
    """Returns the principal of a key, or None."""
    ...


class Keyring:
  """All keys that the server knows; belongs to one event loop."""

  def __init__(self, records: database.Database, file: File | None = None):
    """Reads the keys of the records.

    Args:
      records: with the table of keys.
      file: further keys, of plain users.
    """
    self._records, self._file = records, file
    self._reading: asyncio.Task[None] | None = None
    self._take(records.submit(rows).result())

  @property
  def has_keys(self) -> bool:
    """Whether a request needs a key."""
    return self._has_stored or self._file is not None

  @property
  def stored(self) -> list[Key]:
    """The keys of the records that are not revoked."""
    return [key for _, key in self._stored]

  async def find(self, text: str) -> Key | None:
    """Returns a key, or None; the comparison takes the same time for any."""
    if time.monotonic() >= self._looked + _LOOK_SECONDS:
      # All callers now wait for one look at the records: after a quiet hour, no
      # caller may pass with a key that was revoked during that hour.
      if self._reading is None:
        self._reading = asyncio.create_task(self._look())
      await asyncio.shield(self._reading)
    mine = digest(text)
    found = None
    for other, key in self._stored:
      # No early exit: the time must not reveal a part of a key.
      if hmac.compare_digest(mine, other):
        found = key
    if found is None and self._file is not None:
      name = self._file.principal(text)
      if name is not None:
        found = Key(id=f'file:{name}', name=name)
    return found

  async def _look(self) -> None:
    try:
      self._take(await self._records.run(rows))
    except sqlite3.Error as error:
      _LOG.error('keys: %s; the keys that were read before stay valid', error)
      self._looked = time.monotonic()
    finally:
      self._reading = None

  def _take(self, found: list[sqlite3.Row]) -> None:
    self._looked = time.monotonic()
    self._has_stored = bool(found)
    self._stored = [
      (row['digest'], of_row(row)) for row in found if row['revoked_at'] is None
    ]


def check_exposure(host: str, *, has_keys: bool, is_insecure: bool) -> None:
  """Checks that a server without keys answers only its own machine.

  Raises:
    ValueError: it would answer every client that reaches the address.
  """
  if has_keys or is_insecure or is_loopback(host):
    return
  raise ValueError(
    f'--host: got {host} without any key, expected a loopback address such as'
    ' 127.0.0.1, since every client that reaches the server could use it; make'
    ' a key with `python -m inference.server.keys create --records=FILE'
    ' --name=NAME` and give --records=FILE, or give --insecure'
  )


def is_loopback(host: str) -> bool:
  """Returns whether only this machine reaches an address."""
  if host.lower() == 'localhost':
    return True
  try:
    return ipaddress.ip_address(host.strip('[]')).is_loopback
  except ValueError:
    return False  # another name: the address behind it may change
