"""Feedback: ratings of answers by clients, with the conversations they sent.

A row holds only the conversation that its client chose to send. There is one
row per answer and principal: later feedback replaces it. A row belongs to a
principal, who may delete it even after the key that sent it was replaced.

A deleted row is overwritten in the file. The write-ahead log may hold it until
the next checkpoint, at the latest when the server stops.

Reference: sqlite.org/pragma.html#pragma_secure_delete.
"""

from collections.abc import Iterator
import json
import sqlite3
import time
from typing import Any
import uuid

TABLES = """
CREATE TABLE IF NOT EXISTS feedback (
  id TEXT PRIMARY KEY,
  principal TEXT NOT NULL,
  key_id TEXT NOT NULL,
  request_id TEXT NOT NULL,
  created_at REAL NOT NULL,
  model TEXT NOT NULL,
  thumb TEXT,
  messages TEXT NOT NULL,
  answer TEXT NOT NULL,
  preferred TEXT,
  comment TEXT,
  UNIQUE (principal, request_id)
);
"""

MOST_ROWS = 10_000  # of a principal


class Full(Exception):
  """A principal has the largest number of rows that it may have."""


class NotTheirs(Exception):
  """The ledger has no such request of this principal."""


def add(
  connection: sqlite3.Connection, *, principal: str, key_id: str, **said: Any
) -> tuple[str, float]:
  """Stores feedback in place of any earlier one on the same answer.

  Args:
    connection: connection to the records, in a transaction.
    principal: the sender.
    key_id: the key that it was sent with, '' without keys.
    **said: the other columns except id and time; messages is a list.

  Returns:
    The id, and the time in seconds since 1970.

  Raises:
    NotTheirs: the records have a ledger, without this request.
    Full: the principal has `MOST_ROWS` rows.
  """
  _check_owner(connection, said['request_id'], principal)
  _forget(connection, 'principal = ? AND request_id = ?',
          principal, said['request_id'])  # fmt: skip
  (num,) = connection.execute(
    'SELECT count(*) FROM feedback WHERE principal = ?', (principal,)
  ).fetchone()
  if num >= MOST_ROWS:
    raise Full
  row = {
    **said,
    'id': f'fb_{uuid.uuid4().hex}',
    'principal': principal,
    'key_id': key_id,
    'created_at': time.time(),
    'messages': json.dumps(said['messages'], ensure_ascii=False),
  }
  connection.execute(
    f'INSERT INTO feedback ({", ".join(row)})'
    f' VALUES ({", ".join("?" * len(row))})',
    tuple(row.values()),
  )
  return row['id'], row['created_at']


def delete(connection: sqlite3.Connection, name: str, principal: str) -> bool:
  """Deletes feedback of a principal; returns whether it was there."""
  where = 'id = ? AND principal = ?'
  return bool(_forget(connection, where, name, principal))


def delete_all(connection: sqlite3.Connection, principal: str) -> int:
  """Deletes all feedback of a principal; returns the number of rows."""
  return _forget(connection, 'principal = ?', principal)


def rows(connection: sqlite3.Connection) -> Iterator[dict[str, Any]]:
  """Yields all feedback, oldest first, with the messages as a list."""
  found = connection.execute('SELECT * FROM feedback ORDER BY created_at, id')
  names = [column[0] for column in found.description]
  for values in found:
    row = dict(zip(names, values, strict=True))
    yield {**row, 'messages': json.loads(row['messages'])}


def _forget(connection: sqlite3.Connection, where: str, *values: str) -> int:
  connection.execute('PRAGMA secure_delete = ON')
  found = connection.execute(f'DELETE FROM feedback WHERE {where}', values)
  return found.rowcount


def _check_owner(
  connection: sqlite3.Connection, request_id: str, principal: str
) -> None:
  has_ledger = connection.execute(
    "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'ledger'"
  ).fetchone()
  if not has_ledger:
    return
  found = connection.execute(
    'SELECT 1 FROM ledger WHERE request_id = ? AND principal = ?',
    (request_id, principal),
  ).fetchone()
  if not found:
    raise NotTheirs
