"""Stored responses: input and output of requests that asked to be stored.

A response belongs to the principal that made it; for any other it does not
exist. It is kept for a number of days. Beyond a number of bytes, a principal's
oldest responses make room for new ones. Deleted rows are overwritten on disk.

A response that continues another one keeps its own items only. The items before
it stay in the earlier responses, so that a deleted item is not kept elsewhere.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
import contextlib
import json
import logging
import sqlite3
import time
from typing import Any, NamedTuple

from inference.server.records import database

TABLES = """
CREATE TABLE IF NOT EXISTS responses (
  id TEXT PRIMARY KEY,
  principal TEXT NOT NULL,
  created REAL NOT NULL,  -- seconds since 1970
  previous TEXT,          -- id of the response that this one continues
  input TEXT NOT NULL,    -- JSON: its own items
  response TEXT NOT NULL, -- JSON: the answer, with the items of the output
  size INTEGER NOT NULL   -- bytes of both
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS responses_by_age
  ON responses (principal, created);
"""
_DAY_SECONDS, _EXPIRY_SECONDS = 86400.0, 3600.0
_LOG = logging.getLogger('uvicorn.error')
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(',', ':'))


class Missing(LookupError):
  """There is no such response, or it is another principal's."""


class TooLong(ValueError):
  """A conversation has more bytes than any prompt."""


class Row(NamedTuple):
  """A response as it is kept, in JSON."""

  input: str  # its own items
  response: str

  @classmethod
  def of(cls, response: dict[str, Any], items: list[dict[str, Any]]) -> 'Row':
    """Returns the row of a finished response."""
    return cls(*(_ENCODER.encode(each) for each in (items, response)))

  @property
  def size(self) -> int:
    """Bytes of both."""
    return sum(len(each.encode()) for each in self)


def items(rows: Sequence[Row]) -> list[dict[str, Any]]:
  """Returns the items of a conversation, the oldest first."""
  return [
    item
    for row in reversed(rows)
    for item in (*json.loads(row.input), *json.loads(row.response)['output'])
  ]


class Store:
  """The stored responses of a server."""

  def __init__(
    self, records: database.Database, *, days: float, most_bytes: int
  ):
    """Takes the file.

    Args:
      records: opened with `TABLES`.
      days: days that a response is kept; 0: no response is kept.
      most_bytes: the most bytes of one principal's responses.
    """
    self._records, self._days, self._most = records, days, most_bytes

  @property
  def is_kept(self) -> bool:
    """Whether responses are kept at all."""
    return self._days > 0

  async def put(
    self, principal: str, response_id: str, row: Row, previous: str | None
  ) -> None:
    """Keeps a finished response; durable on return.

    Args:
      principal: owner of the response.
      response_id: id of the response.
      row: the response in JSON.
      previous: id of the response that it continues.
    """
    fields = response_id, principal, time.time(), previous, *row, row.size
    if await self._records.run(_put, fields, self._oldest, self._most):
      await self._records.erase()

  async def get(self, principal: str, response_id: str) -> Row:
    """Returns a response.

    Raises:
      Missing: the principal has no such response.
    """
    (row,) = await self._records.run(
      _read, principal, response_id, self._oldest, None
    )
    return row

  async def conversation(
    self, principal: str, response_id: str, *, most_bytes: int
  ) -> list[Row]:
    """Returns a response and all that it continues, the newest first.

    Raises:
      Missing: the principal has no such response, or one before it is deleted.
      TooLong: together they have more bytes than `most_bytes`.
    """
    return await self._records.run(
      _read, principal, response_id, self._oldest, most_bytes
    )

  async def delete(self, principal: str, response_id: str) -> None:
    """Deletes a response, so that no byte of it stays on disk.

    Raises:
      Missing: the principal has no such response.
    """
    await self._records.run(_delete, principal, response_id, self._oldest)
    await self._records.erase()

  async def expire(self) -> None:
    """Deletes the responses that are too old."""
    if await self._records.run(_expire, self._oldest):
      await self._records.erase()

  @contextlib.asynccontextmanager
  async def expiring(self) -> AsyncGenerator[None]:
    """Deletes responses as they become too old, within the context."""

    async def work() -> None:
      while True:
        try:
          await self.expire()
        except sqlite3.Error as error:  # a full disk, a lock that stays
          _LOG.error('responses that are too old are kept', exc_info=error)
        await asyncio.sleep(_EXPIRY_SECONDS)

    task = asyncio.create_task(work())
    try:
      yield
    finally:
      task.cancel()
      await asyncio.wait([task])

  @property
  def _oldest(self) -> float:
    return time.time() - self._days * _DAY_SECONDS


def _put(
  connection: sqlite3.Connection, fields: tuple, oldest: float, most: int
) -> int:
  """Returns how many rows made room."""
  num_before = connection.total_changes
  connection.execute('DELETE FROM responses WHERE created < ?', (oldest,))
  _, principal, *_, size = fields
  connection.execute(
    # The newest responses that fit beside the new one stay.
    """DELETE FROM responses WHERE id IN (
      SELECT id FROM (
        SELECT id, SUM(size) OVER (ORDER BY created DESC, id) AS total
        FROM responses WHERE principal = ?
      ) WHERE total > ?
    )""",
    (principal, most - size),
  )
  num_gone = connection.total_changes - num_before
  connection.execute(
    'INSERT INTO responses VALUES (?, ?, ?, ?, ?, ?, ?)', fields
  )
  return num_gone


def _read(
  connection: sqlite3.Connection,
  principal: str,
  response_id: str,
  oldest: float,
  most_bytes: int | None,
) -> list[Row]:
  """Returns a response; with `most_bytes`, the ones before it, too."""
  found: list[Row] = []
  wanted: str | None = response_id
  while wanted is not None:
    row = connection.execute(
      'SELECT * FROM responses WHERE id = ? AND principal = ? AND created >= ?',
      (wanted, principal, oldest),
    ).fetchone()
    if row is None:
      raise Missing(wanted)
    found.append(Row(row['input'], row['response']))
    if most_bytes is None:
      return found
    if (most_bytes := most_bytes - row['size']) < 0:
      raise TooLong(response_id)
    wanted = row['previous']
  return found


def _delete(
  connection: sqlite3.Connection,
  principal: str,
  response_id: str,
  oldest: float,
) -> None:
  num = connection.execute(
    'DELETE FROM responses WHERE id = ? AND principal = ? AND created >= ?',
    (response_id, principal, oldest),
  ).rowcount
  if not num:
    raise Missing(response_id)


def _expire(connection: sqlite3.Connection, oldest: float) -> int:
  return connection.execute(
    'DELETE FROM responses WHERE created < ?', (oldest,)
  ).rowcount
