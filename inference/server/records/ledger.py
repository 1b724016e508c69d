"""The ledger: a row for each request that the engine took, with its cost.

    entry = ledger.reserve(about, reserved)      # admission
    entry.open()                                 # the engine has taken it
    await entry.settle(used, outcome)            # durable: then the last bytes
    entry.release()                              # or: the engine refused it

An entry is a state machine: reserved, then open, then settled; or released,
without a row. Every other step is a bug, and raises. A row is written twice: as
open, without waiting, and as settled. Both writes go through one thread in
order, and share commits with the writes of other requests.

A process that is killed leaves open rows. The next start settles them as
`orphaned` without tokens or price: the counts have died with the engine, and no
client got the end of its answer. A lock keeps a second server off the file,
whose open requests would look like orphans.

Rows have counts and times, and no text of prompts or outputs. For a request
with an Idempotency-Key, a row has a digest of the key and the body: requests
with equal digests cost together as much as the most expensive of them.
"""

import asyncio
import contextlib
import dataclasses
import logging
import pathlib
import sqlite3
import time
from typing import Any
import uuid

import prometheus_client

from frozen import manifest as manifest_lib
from inference.requests import prices
from inference.server.records import database
from storage import locks

NANOS = prices.NANOS
TABLES = """
CREATE TABLE IF NOT EXISTS ledger (
  id TEXT PRIMARY KEY,
  request_id TEXT NOT NULL,
  idempotency TEXT NOT NULL,
  key_id TEXT NOT NULL,
  principal TEXT NOT NULL,
  model TEXT NOT NULL,
  weights_digest TEXT NOT NULL,
  opened_at REAL NOT NULL,
  reserved_tokens INTEGER NOT NULL,
  reserved_nanos INTEGER NOT NULL,
  outcome TEXT,
  settled_at REAL,
  prompt_tokens INTEGER NOT NULL DEFAULT 0,
  cached_tokens INTEGER NOT NULL DEFAULT 0,
  completion_tokens INTEGER NOT NULL DEFAULT 0,
  accepted_tokens INTEGER NOT NULL DEFAULT 0,
  rejected_tokens INTEGER NOT NULL DEFAULT 0,
  prefill_tokens INTEGER NOT NULL DEFAULT 0,
  decode_tokens INTEGER NOT NULL DEFAULT 0,
  preemptions INTEGER NOT NULL DEFAULT 0,
  flops REAL NOT NULL DEFAULT 0,
  kv_byte_seconds REAL NOT NULL DEFAULT 0,
  queue_ms REAL NOT NULL DEFAULT 0,
  prefill_ms REAL NOT NULL DEFAULT 0,
  decode_ms REAL NOT NULL DEFAULT 0,
  price_nanos INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX IF NOT EXISTS ledger_open ON ledger (id) WHERE outcome IS NULL;
CREATE INDEX IF NOT EXISTS ledger_request ON ledger (request_id);
CREATE INDEX IF NOT EXISTS ledger_idempotency ON ledger (idempotency)
  WHERE idempotency != '';
CREATE TABLE IF NOT EXISTS models (
  weights_digest TEXT PRIMARY KEY,
  name TEXT NOT NULL,
  training_flops REAL NOT NULL,
  train_seconds REAL NOT NULL,
  served_at REAL NOT NULL
);
"""

# Outcomes. FINISHED: the engine made the whole answer; the client may not have
# read it.
FINISHED, CANCELLED, ERROR, STOPPED, ORPHANED = OUTCOMES = (
  'finished',
  'cancelled',
  'error',
  'stopped',
  'orphaned',
)
REMEMBERED_SECONDS = 24 * 3600  # later, the same Idempotency-Key counts as new

_LOG = logging.getLogger('uvicorn.error')


@dataclasses.dataclass(frozen=True, kw_only=True)
class About:
  """The facts about a request at its admission."""

  request_id: str
  idempotency: str  # digest, or ''
  key_id: str
  principal: str
  model: str
  weights_digest: str
  reserved_tokens: int  # prompts, and the most of the completions
  reserved_nanos: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Used:
  """The usage of a request, by the counts of the engine."""

  prompt_tokens: int = 0  # each prompt once, however many completions it has
  cached_tokens: int = 0  # part of the prompt tokens
  completion_tokens: int = 0
  accepted_tokens: int = 0  # drafts that became tokens of completions
  rejected_tokens: int = 0  # drafts that were computed in vain
  prefill_tokens: int = 0
  decode_tokens: int = 0
  preemptions: int = 0
  flops: float = 0.0
  kv_byte_seconds: float = 0.0
  queue_ms: float = 0.0  # of the sequence with most, like the next two
  prefill_ms: float = 0.0
  decode_ms: float = 0.0
  price_nanos: int = 0


class Entry:
  """One request in the ledger; used in the event loop only."""

  def __init__(self, ledger: 'Ledger', about: About):
    self._ledger, self.about = ledger, about
    self.state = 'reserved'
    self._head: dict[str, Any] = {
      'id': uuid.uuid4().hex,
      **dataclasses.asdict(about),
      'opened_at': time.time(),
    }

  def open(self) -> asyncio.Future[None]:
    """Writes the row of the open request."""
    self._step('open', before=('reserved',))
    return self._ledger.write(_insert, self._head)

  def settle(self, used: Used, outcome: str) -> asyncio.Future[int]:
    """Writes the usage; the result is the price in nanos, once durable."""
    self._step('settled', before=('reserved', 'open'))
    row = {
      **self._head,
      **dataclasses.asdict(used),
      'outcome': outcome,
      'settled_at': time.time(),
    }
    written = self._ledger.write(_settle, row)
    written.add_done_callback(lambda done: self._ledger.note(done, outcome))
    return written

  def release(self) -> None:
    """Ends a reservation without any use."""
    self._step('released', before=('reserved',))
    self._ledger.metrics.open.dec()

  def _step(self, state: str, *, before: tuple[str, ...]) -> None:
    if self.state not in before:
      raise RuntimeError(
        f'request {self.about.request_id}: got {state} after {self.state},'
        f' expected it after {" or ".join(before)}; report this as a bug'
      )
    self.state = state


class Metrics:
  """The metrics of the ledger, for Prometheus."""

  def __init__(self):
    self.registry = prometheus_client.CollectorRegistry()
    self.open = prometheus_client.Gauge(
      'ledger_reservations_open',
      'Requests that have reserved tokens and are not settled.',
      registry=self.registry,
    )
    self.rows = prometheus_client.Counter(
      'ledger_rows',
      'Requests that were settled.',
      ['outcome'],
      registry=self.registry,
    )
    self.failures = prometheus_client.Counter(
      'ledger_failures',
      'Writes that failed; their requests were not answered to the end.',
      registry=self.registry,
    )
    self.refused = prometheus_client.Counter(
      'limit_refused',
      'Requests refused by a limit of their key.',
      ['kind'],
      registry=self.registry,
    )

  def text(self) -> bytes:
    """Returns all metrics in the text format of Prometheus."""
    return prometheus_client.generate_latest(self.registry)


class Ledger:
  """The ledger of one server; belongs to one event loop."""

  def __init__(self, records: database.Database):
    """Takes the lock, and settles rows that a killed process has left open.

    Args:
      records: opened with `TABLES`.

    Raises:
      ValueError: another server uses the file.
    """
    self._records, self.metrics = records, Metrics()
    self.is_failing = False  # the last write has failed
    self._lock = contextlib.ExitStack()
    if records.is_file:
      self._lock.enter_context(_locked(records.name))
    num = records.submit(_settle_orphans).result()
    self.metrics.rows.labels(ORPHANED).inc(num)
    if num:
      _LOG.warning(
        '%s: settled %d requests that a killed server had left open',
        records.name,
        num,
      )

  def close(self) -> None:
    """Lets another server use the file, after the records are closed."""
    self._lock.close()

  def reserve(self, about: About) -> Entry:
    """Begins the entry of a request."""
    self.metrics.open.inc()
    return Entry(self, about)

  def spent(self) -> dict[str, int]:
    """Returns the nanos that each key has spent, by its id."""
    return self._records.submit(_spent).result()

  def note_model(
    self, name: str, digest: str, origin: manifest_lib.Provenance
  ) -> None:
    """Keeps the cost of training a model, to compare the cost of its use."""
    self._records.submit(_insert_model, name, digest, origin)

  def write(self, work, row: dict[str, Any]) -> asyncio.Future[Any]:
    """Runs a work; its failure is logged, since callers may not await it."""
    written = asyncio.wrap_future(self._records.submit(work, row))
    written.add_done_callback(self._check)
    return written

  def note(self, done: asyncio.Future, outcome: str) -> None:
    """Counts a reservation as settled."""
    self.metrics.open.dec()
    if not done.exception():
      self.metrics.rows.labels(outcome).inc()

  def _check(self, done: asyncio.Future) -> None:
    error = done.exception()
    self.is_failing = error is not None
    if error:
      self.metrics.failures.inc()
      _LOG.error('%s: the ledger is not written', self._records.name)


@contextlib.contextmanager
def _locked(path: str):
  try:
    with locks.held(pathlib.Path(f'{path}-server'), path, _LOG.warning):
      yield
  except locks.InUseError:
    raise ValueError(
      f'--records: got {path}, which another server uses, expected a file of'
      ' its own for each server; stop that server or name another file'
    ) from None


def _insert(connection: sqlite3.Connection, row: dict[str, Any]) -> None:
  names = ', '.join(row)
  places = ', '.join(f':{name}' for name in row)
  connection.execute(
    f'INSERT OR REPLACE INTO ledger ({names}) VALUES ({places})', row
  )


def _settle(connection: sqlite3.Connection, row: dict[str, Any]) -> int:
  """Writes the final row, in place of the open one; returns its price."""
  price = row['price_nanos']
  if row['idempotency']:
    (paid,) = connection.execute(
      'SELECT coalesce(sum(price_nanos), 0) FROM ledger'
      ' WHERE idempotency = ? AND id != ? AND settled_at >= ?',
      (row['idempotency'], row['id'], time.time() - REMEMBERED_SECONDS),
    ).fetchone()
    price = max(price - paid, 0)
  _insert(connection, {**row, 'price_nanos': price})
  return price


def _settle_orphans(connection: sqlite3.Connection) -> int:
  return connection.execute(
    'UPDATE ledger SET outcome = ?, settled_at = ? WHERE outcome IS NULL',
    (ORPHANED, time.time()),
  ).rowcount


def _spent(connection: sqlite3.Connection) -> dict[str, int]:
  found = connection.execute(
    'SELECT key_id, sum(price_nanos) FROM ledger GROUP BY key_id'
  )
  return dict(map(tuple, found.fetchall()))


def _insert_model(
  connection: sqlite3.Connection,
  name: str,
  digest: str,
  origin: manifest_lib.Provenance,
) -> None:
  connection.execute(
    'INSERT OR IGNORE INTO models VALUES (?, ?, ?, ?, ?)',
    (
      digest,
      name,
      origin.training_flops,
      origin.train_seconds,
      time.time(),
    ),
  )
