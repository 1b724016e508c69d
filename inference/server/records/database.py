"""The server's records: one SQLite file, written by one thread.

    records = Database(path, tables=[ledger.TABLES, ...])
    row_id = await records.run(insert, row)        # insert(connection, row)

A work that has returned is on disk: the file has a write-ahead log, which is
synced at every commit. Works that wait at the same time share a commit, since a
sync takes milliseconds. A work that raises changes nothing, and its neighbours
in the commit are kept. Other processes, such as the command that creates keys,
may open the same file.

Without a path the records are in memory, and end with the process.

Reference: sqlite.org/wal.html; sqlite.org/pragma.html#pragma_synchronous.
"""

import asyncio
from collections.abc import Callable, Iterable
from concurrent import futures
import os
import pathlib
import queue
import sqlite3
import threading
from typing import Any, TypeVar

FORMAT = 2  # of all tables; a file with a higher number is of a newer server
# The columns that a file of an earlier format lacks: (format, table, column).
_COLUMNS = ((2, 'ledger', 'accepted_tokens INTEGER NOT NULL DEFAULT 0'),)
_APPLICATION_ID = 0x32_4C_56_53  # '2LVS': `file` and we know our own files
_BUSY_SECONDS = 10.0  # a writer of another process may take this long
_MOST_TOGETHER = 256  # works that share a commit
_IN_MEMORY = ':memory:'

_Result = TypeVar('_Result')


class Database:
  """The records; functions of a connection are run on it one after another."""

  def __init__(
    self, path: str | os.PathLike | None, *, tables: Iterable[str] = ()
  ):
    """Opens or creates the file; other users of the machine cannot read it.

    Args:
      path: path of the file; None: in memory.
      tables: SQL that creates tables and indices where they are missing.

    Raises:
      ValueError: the file is no file of records, of a newer server, or cannot
        be written.
    """
    self._name = _IN_MEMORY if path is None else os.fspath(path)
    self._connection = _opened(path, tables)
    self._works: queue.SimpleQueue[
      tuple[Callable[[sqlite3.Connection], Any], futures.Future] | None
    ] = queue.SimpleQueue()
    # A daemon: a commit is whole or not there, whenever the process ends.
    self._thread = threading.Thread(
      target=self._serve, name='records', daemon=True
    )
    self._thread.start()
    self._is_closed = False

  @property
  def name(self) -> str:
    """The path, or :memory:."""
    return self._name

  @property
  def is_file(self) -> bool:
    """Whether the records outlive the process."""
    return self._name != _IN_MEMORY

  async def run(
    self,
    work: Callable[..., _Result],
    *args: Any,
  ) -> _Result:
    """Returns the result of `work(connection, *args)`, once it is on disk.

    Cancelling the caller does not undo the work.
    """
    return await asyncio.wrap_future(self.submit(work, *args))

  def submit(
    self, work: Callable[..., _Result], *args: Any
  ) -> futures.Future[_Result]:
    """Does the same for a thread; the future ends when the work is on disk."""
    if self._is_closed:
      raise RuntimeError(f'{self._name}: the records are closed')
    done: futures.Future[_Result] = futures.Future()
    # Running from the start: a future that can be cancelled would lose a work.
    done.set_running_or_notify_cancel()
    self._works.put((lambda connection: work(connection, *args), done))
    return done

  async def erase(self) -> None:
    """Removes from the disk the rows that earlier works have deleted.

    A deleted row is overwritten in the file, but its copy stays in the log
    until the log is cut.
    """
    done: futures.Future[None] = futures.Future()
    done.set_running_or_notify_cancel()
    if self._is_closed:
      raise RuntimeError(f'{self._name}: the records are closed')
    self._works.put((_cut_log, done))
    await asyncio.wrap_future(done)

  def close(self) -> None:
    """Finishes the works that wait, and closes the file."""
    if not self._is_closed:
      self._is_closed = True
      self._works.put(None)
      self._thread.join()

  def _serve(self) -> None:
    is_open = True
    while is_open:
      batch = [self._works.get()]
      while len(batch) < _MOST_TOGETHER:
        try:
          batch.append(self._works.get_nowait())
        except queue.Empty:
          break
      is_open = None not in batch
      works = [each for each in batch if each is not None]
      self._commit([each for each in works if each[0] is not _cut_log])
      self._erase([done for work, done in works if work is _cut_log])
    self._connection.close()

  def _erase(self, waiting: list[futures.Future]) -> None:
    if not waiting:
      return
    try:
      _cut_log(self._connection)
    except sqlite3.Error as error:
      for done in waiting:
        done.set_exception(error)
    else:
      for done in waiting:
        done.set_result(None)

  def _commit(self, batch) -> None:
    """Runs works in one transaction; tells each how it ended."""
    if not batch:
      return
    ended: list[tuple[futures.Future, Any, BaseException | None]] = []
    try:
      self._connection.execute('BEGIN IMMEDIATE')
      for work, done in batch:
        self._connection.execute('SAVEPOINT work')
        try:
          ended.append((done, work(self._connection), None))
        except Exception as error:
          self._connection.execute('ROLLBACK TO work')
          ended.append((done, None, error))
        self._connection.execute('RELEASE work')
      self._connection.execute('COMMIT')
    except sqlite3.Error as error:  # a full disk, a lock that stays
      if self._connection.in_transaction:
        self._connection.execute('ROLLBACK')
      ended = [(done, None, error) for _, done in batch]
    for done, result, error in ended:
      if error is None:
        done.set_result(result)
      else:
        done.set_exception(error)


def _cut_log(connection: sqlite3.Connection) -> None:
  # Outside of a transaction: it copies the log into the file, and empties it.
  connection.execute('PRAGMA wal_checkpoint(TRUNCATE)')


def _opened(
  path: str | os.PathLike | None, tables: Iterable[str]
) -> sqlite3.Connection:
  fix = 'a file that this server made, or a path where it can make one'
  if path is None:
    connection = _connected(_IN_MEMORY)
  else:
    if not os.fspath(path).strip():
      raise ValueError(f'records: got an empty path, expected {fix}')
    try:
      # SQLite would make it readable by every user of the machine. Its log
      # files get the mode of the file.
      os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
      connection = _connected(pathlib.Path(path))
    except (OSError, sqlite3.Error) as error:
      raise ValueError(
        f'records: got {os.fspath(path)}, which cannot be opened ({error}),'
        f' expected {fix}'
      ) from error
  try:
    _prepare(connection, tables)
  except (ValueError, sqlite3.Error) as error:
    connection.close()
    raise ValueError(
      f'records: got {os.fspath(path or _IN_MEMORY)}: {error}, expected {fix}'
    ) from error
  return connection


def _connected(path: str | pathlib.Path) -> sqlite3.Connection:
  return sqlite3.connect(
    path,
    timeout=_BUSY_SECONDS,
    isolation_level=None,  # transactions are ours
    check_same_thread=False,  # opened here, then used by the thread alone
  )


def _prepare(connection: sqlite3.Connection, tables: Iterable[str]) -> None:
  connection.row_factory = sqlite3.Row
  (application,) = connection.execute('PRAGMA application_id').fetchone()
  (version,) = connection.execute('PRAGMA user_version').fetchone()
  (num_tables,) = connection.execute(
    'SELECT count(*) FROM sqlite_master'
  ).fetchone()
  if num_tables and application != _APPLICATION_ID:
    raise ValueError('a database of another program')
  if version > FORMAT:
    raise ValueError(
      f'records of format {version}, of a newer server than this one, which'
      f' knows format {FORMAT}'
    )
  connection.execute('PRAGMA journal_mode = WAL')
  connection.execute('PRAGMA synchronous = FULL')
  connection.execute('PRAGMA foreign_keys = ON')
  connection.execute('PRAGMA secure_delete = ON')
  _upgrade(connection)
  for sql in tables:
    connection.executescript(sql)


def _upgrade(connection: sqlite3.Connection) -> None:
  """Makes a new file, or one of an earlier format, one of this format.

  All tables are upgraded, whichever the caller uses: the number is of the file.
  Another process may upgrade it at the same time.
  """
  connection.execute('BEGIN IMMEDIATE')
  (version,) = connection.execute('PRAGMA user_version').fetchone()
  for since, table, column in _COLUMNS:
    found = connection.execute(f'PRAGMA table_info({table})').fetchall()
    if version < since and found:
      connection.execute(f'ALTER TABLE {table} ADD COLUMN {column}')
  connection.execute(f'PRAGMA application_id = {_APPLICATION_ID}')
  connection.execute(f'PRAGMA user_version = {FORMAT}')
  connection.execute('COMMIT')
