"""The records: durable, whole, a commit for works that wait, foreign files."""

import asyncio
from concurrent import futures
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import textwrap
import threading

import pytest

from inference.server.access import keys
from inference.server.records import database, ledger

TABLE = 'CREATE TABLE IF NOT EXISTS items (name TEXT PRIMARY KEY, num INTEGER)'


def _insert(connection, name, num=0):
  connection.execute('INSERT INTO items VALUES (?, ?)', (name, num))
  return name


def _names(connection):
  rows = connection.execute('SELECT name FROM items ORDER BY name')
  return [row['name'] for row in rows]


@pytest.fixture(params=['file', 'memory'])
def records(request, tmp_path):
  path = tmp_path / 'records.db' if request.param == 'file' else None
  records = database.Database(path, tables=[TABLE])
  yield records
  records.close()


def test_a_work_returns_its_result(records):
  async def use():
    assert await records.run(_insert, 'a') == 'a'
    return await records.run(_names)

  assert asyncio.run(use()) == ['a']


def test_a_work_that_fails_changes_nothing_and_its_neighbours_are_kept(records):
  started, go = threading.Event(), threading.Event()

  def hold(_):
    started.set()
    go.wait(10)

  def fail(connection):
    _insert(connection, 'half')
    raise KeyError('broken')

  held = records.submit(hold)
  started.wait(10)  # so that the next works share one commit
  works = [
    records.submit(_insert, 'a'),
    records.submit(fail),
    records.submit(_insert, 'a'),  # not unique
    records.submit(_insert, 'b'),
  ]
  go.set()
  futures.wait([held, *works])
  assert isinstance(works[1].exception(), KeyError)
  assert isinstance(works[2].exception(), sqlite3.IntegrityError)
  assert records.submit(_names).result() == ['a', 'b']


def test_close_finishes_the_works_that_wait(tmp_path):
  records = database.Database(tmp_path / 'r', tables=[TABLE])
  works = [records.submit(_insert, f'{i:04}') for i in range(600)]
  records.close()
  assert all(work.done() for work in works)
  with pytest.raises(RuntimeError, match='closed'):
    records.submit(_names)
  again = database.Database(tmp_path / 'r', tables=[TABLE])
  assert len(again.submit(_names).result()) == 600
  again.close()


def test_a_work_that_has_returned_survives_a_kill(tmp_path):
  path = tmp_path / 'r'
  script = f"""
    from inference.server.records import database
    records = database.Database({str(path)!r}, tables=[{TABLE!r}])
    for i in range(10_000):
      records.submit(lambda c: c.execute(
        'INSERT INTO items VALUES (?, 0)', (f'{{i:05}}',)) and None).result()
      print(i, flush=True)
  """
  with subprocess.Popen(
    [sys.executable, '-c', textwrap.dedent(script)],
    stdout=subprocess.PIPE,
    text=True,
  ) as child:
    assert child.stdout
    told = [int(child.stdout.readline()) for _ in range(20)]
    child.send_signal(signal.SIGKILL)
    told += [int(line) for line in child.stdout if line.endswith('\n')]
  records = database.Database(path, tables=[TABLE])
  found = records.submit(_names).result()
  records.close()
  assert [f'{i:05}' for i in told] == found[: len(told)]
  assert len(found) <= len(told) + 1  # the last may be on disk, and not told


def test_two_processes_write_one_file(tmp_path):
  one = database.Database(tmp_path / 'r', tables=[TABLE])
  other = database.Database(tmp_path / 'r', tables=[TABLE])
  works = [
    each.submit(_insert, f'{name}{i}')
    for i in range(50)
    for name, each in (('a', one), ('b', other))
  ]
  for work in works:
    work.result()
  assert len(one.submit(_names).result()) == 100
  one.close()
  other.close()


def test_only_the_owner_reads_the_files(tmp_path):
  before = os.umask(0)
  try:
    records = database.Database(tmp_path / 'r', tables=[TABLE])
    records.submit(_insert, 'a').result()
    for path in tmp_path.iterdir():
      assert not stat.S_IMODE(path.stat().st_mode) & 0o077, path
    records.close()
  finally:
    os.umask(before)


def _write_of_format_1(path):
  """Writes records with one row in the ledger, as the first format had it."""
  database.Database(path).close()  # our own file
  column = '  accepted_tokens INTEGER NOT NULL DEFAULT 0,\n'
  assert column in ledger.TABLES
  with sqlite3.connect(path) as connection:
    connection.executescript(ledger.TABLES.replace(column, ''))
    connection.execute('PRAGMA user_version = 1')
    connection.execute(
      'INSERT INTO ledger (id, request_id, idempotency, key_id, principal,'
      ' model, weights_digest, opened_at, reserved_tokens, reserved_nanos,'
      " rejected_tokens) VALUES ('a', 'b', '', 'c', 'd', 'e', 'f', 0, 1, 2, 3)"
    )
  connection.close()


def _drafts(path, tables=()):
  """Returns the format, and accepted and rejected tokens of the only row."""
  records = database.Database(path, tables=tables)

  def read(connection):
    (version,) = connection.execute('PRAGMA user_version').fetchone()
    (row,) = connection.execute('SELECT * FROM ledger').fetchall()
    return version, row['accepted_tokens'], row['rejected_tokens']

  found = records.submit(read).result()
  records.close()
  return found


@pytest.mark.parametrize('tables', [[ledger.TABLES], [keys.TABLES], []])
def test_a_file_of_the_format_before_is_upgraded_and_keeps_its_rows(
  tmp_path, tables
):
  path = tmp_path / 'records.db'
  _write_of_format_1(path)
  for _ in range(2):  # the second time it has the format
    assert _drafts(path, tables) == (database.FORMAT, 0, 3)


def test_several_that_open_a_file_upgrade_it_once(tmp_path):
  path = tmp_path / 'records.db'
  _write_of_format_1(path)
  with futures.ThreadPoolExecutor(4) as pool:
    found = list(pool.map(_drafts, [path] * 8))
  assert found == [(database.FORMAT, 0, 3)] * 8


def test_foreign_newer_and_damaged_files_are_refused_and_not_changed(tmp_path):
  foreign = tmp_path / 'foreign'
  with sqlite3.connect(foreign) as connection:
    connection.execute('CREATE TABLE t (x)')
  connection.close()
  newer = tmp_path / 'newer'
  database.Database(newer).close()
  with sqlite3.connect(newer) as connection:
    connection.execute(f'PRAGMA user_version = {database.FORMAT + 1}')
  connection.close()
  text = tmp_path / 'text'
  text.write_bytes(b'not a database, by far ' * 99)
  for path, reason in (
    (foreign, 'another program'),
    (newer, 'newer server'),
    (text, 'not a database'),
    (tmp_path, 'cannot be opened'),
    (tmp_path / 'no' / 'folder', 'cannot be opened'),
    ('', 'empty path'),
  ):
    before = path.read_bytes() if path and path.is_file() else b''
    with pytest.raises(ValueError, match=f'records: .*{reason}.* expected'):
      database.Database(path, tables=[TABLE])
    if before:
      assert path.read_bytes() == before
