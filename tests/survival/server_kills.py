"""Kills a server under load, again and again, and audits its ledger.

    python -m tests.survival.server_kills --kills=100

Clients stream, wait for whole answers, leave, and repeat requests that a kill
has cut off, if they have an Idempotency-Key. After each kill the server starts
again on the same records. At the end every answer that a client got to its end
has one row with the same counts; no reservation is open; and requests of one
Idempotency-Key cost together what the dearest of them costs.
"""

import collections
from collections.abc import Sequence
import concurrent.futures
import dataclasses
import json
import pathlib
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import uuid

from absl import app, flags, logging
import httpx2

from inference.server import app as app_lib
from inference.server.access import keys
from inference.server.records import database, ledger
from tests.helpers import frozen_dirs, tiny_models
from tests.survival import process

_NUM_CLIENTS = 6
_START_SECONDS = 240
_ANSWER_SECONDS = 240  # an answer may wait for a replica that starts again
_ENGINE = (
  '--engine.max_sequences=4',
  '--engine.decode_shapes=4',
  '--engine.chunk_tokens=16',
  '--engine.max_chunks=1',
  '--engine.max_mixed_chunks=1',
  '--engine.page_size=8',
  '--server.price_prompt=1',
  '--server.price_cached=1',
  '--server.price_completion=2',
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answered:
  """An answer that a client got to its end."""

  request_id: str
  prompt_tokens: int
  completion_tokens: int
  is_replayed: bool


@dataclasses.dataclass(kw_only=True)
class Told:
  """What the clients have seen of all servers."""

  answered: list[Answered] = dataclasses.field(default_factory=list)
  # Requests that were cut off: Idempotency-Key and body.
  cut_off: list[tuple[str, dict]] = dataclasses.field(default_factory=list)
  # Ids of streams that ended with an error event.
  broken: list[str] = dataclasses.field(default_factory=list)
  num_left: int = 0
  unexpected: list[str] = dataclasses.field(default_factory=list)


class Arena:
  """A model, a file of records with one key, and a port."""

  def __init__(self, directory: pathlib.Path):
    self.directory, self.records = directory, directory / 'records'
    frozen_dirs.write(
      directory / 'tiny', config=frozen_dirs.config(num_layers=1)
    )
    records = database.Database(self.records, tables=app_lib.TABLES)
    _, self.key = records.submit(
      lambda connection: keys.create(connection, name='alice')
    ).result()
    records.close()
    with socket.socket() as free:
      free.bind(('127.0.0.1', 0))
      self.port = free.getsockname()[1]

  @property
  def url(self) -> str:
    """Where the server answers."""
    return f'http://127.0.0.1:{self.port}'

  def launch(self, *args: str) -> subprocess.Popen:
    """Starts a server on the records."""
    return subprocess.Popen(
      [
        sys.executable,
        'serve.py',
        f'--model={self.directory / "tiny"}',
        f'--port={self.port}',
        f'--records={self.records}',
        *_ENGINE,
        *args,
      ],
      cwd=process.ROOT,
      env=tiny_models.subprocess_env(JAX_PLATFORMS='cpu'),
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )

  def start(self, *args: str) -> subprocess.Popen:
    """Starts a server, and waits until it is ready."""
    running = self.launch(*args)
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
      if running.poll() is not None:
        raise AssertionError(f'got exit code {running.returncode} at the start')
      try:
        if httpx2.get(f'{self.url}/ready').status_code == 200:
          return running
      except httpx2.HTTPError:
        pass
      time.sleep(0.05)
    running.kill()
    raise AssertionError(f'not ready after {_START_SECONDS} s')


class Clients:
  """Clients that ask until they are stopped."""

  def __init__(
    self,
    arena: Arena,
    told: Told,
    rng: random.Random,
    *,
    waits: bool = False,
  ):
    """Starts them.

    Args:
      arena: has the server.
      told: receives what they see.
      rng: of what they ask.
      waits: whether they ask again while the server is not ready.
    """
    self._arena, self._told, self._waits = arena, told, waits
    self._is_over = threading.Event()
    self._pool = concurrent.futures.ThreadPoolExecutor(_NUM_CLIENTS)
    self._works = [
      self._pool.submit(self._ask_on, rng.random()) for _ in range(_NUM_CLIENTS)
    ]

  def stop(self) -> None:
    """Ends the clients, and raises what went wrong in them."""
    self._is_over.set()
    for work in self._works:
      work.result()
    self._pool.shutdown()

  def _ask_on(self, seed: float) -> None:
    rng = random.Random(seed)
    headers = {'authorization': f'Bearer {self._arena.key}'}
    with httpx2.Client(
      base_url=self._arena.url, headers=headers, timeout=_ANSWER_SECONDS
    ) as http:
      while not self._is_over.is_set():
        name, body = self._next(rng)
        try:
          self._ask(http, name, body, leaves=rng.random() < 0.15)
        except httpx2.HTTPError:
          if name:
            self._told.cut_off.append((name, body))
          return  # the server is gone

  def _next(self, rng: random.Random) -> tuple[str, dict]:
    if self._told.cut_off and rng.random() < 0.5:
      try:
        return self._told.cut_off.pop()
      except IndexError:
        pass  # another client has taken it
    # Without a name, who leaves cancels the request.
    return uuid.uuid4().hex if rng.random() < 0.5 else '', {
      'model': 'tiny',
      'prompt': 'x' * rng.randint(1, 20),
      'max_tokens': rng.randint(1, 30),
      'ignore_eos': True,
      'n': rng.choice((1, 1, 2)),
      'stream': rng.random() < 0.6,
    }

  def _ask(self, http, name: str, body: dict, *, leaves: bool) -> None:
    if body['stream']:
      body = {**body, 'stream_options': {'include_usage': True}}
    headers = {'idempotency-key': name} if name else {}
    with http.stream(
      'POST', '/v1/completions', json=body, headers=headers
    ) as answer:
      if answer.status_code != 200:
        text = answer.read().decode()
        if self._waits and '"code":"not_ready"' in text:
          time.sleep(0.2)
        else:
          self._told.unexpected.append(text)
        return
      if leaves and body['stream']:
        next(answer.iter_bytes())
        self._told.num_left += 1
        return
      content = answer.read()
    if body['stream']:
      *events, done, rest = content.split(b'\n\n')
      if (done, rest) != (b'data: [DONE]', b''):
        raise httpx2.ReadError('cut off')
      content = events[-1].removeprefix(b'data: ')
      if 'error' in json.loads(content):
        self._told.broken.append(answer.headers['x-request-id'])
        return
    used = json.loads(content)['usage']
    self._told.answered.append(
      Answered(
        request_id=answer.headers['x-request-id'],
        prompt_tokens=used['prompt_tokens'],
        completion_tokens=used['completion_tokens'],
        is_replayed='idempotency-replayed' in answer.headers,
      )
    )


def run(directory: pathlib.Path, count: int, *, seed: int = 0, tell=print):
  """Kills a server so often; returns what the clients saw, and the faults."""
  arena, told, rng = Arena(directory), Told(), random.Random(seed)
  for number in range(count + 1):
    running = arena.start()
    faults = audit(arena.records, told)
    if faults:
      running.kill()
      return told, faults
    clients = Clients(arena, told, rng)
    time.sleep(rng.uniform(0.05, 3.0))
    is_last = number == count
    if is_last:
      clients.stop()
    running.send_signal(signal.SIGTERM if is_last else signal.SIGKILL)
    running.wait(60)
    if not is_last:
      clients.stop()
    tell(f'{number}: {len(told.answered)} answered, {told.num_left} left')
  return told, audit(arena.records, told)


def audit(path: pathlib.Path, told: Told) -> list[str]:
  """Compares the ledger with what clients got; returns what is wrong."""
  connection = sqlite3.connect(path)
  connection.row_factory = sqlite3.Row
  rows = [dict(row) for row in connection.execute('SELECT * FROM ledger')]
  connection.close()
  faults = list(told.unexpected)
  faults += [
    f'{row["request_id"]} is open' for row in rows if row['outcome'] is None
  ]
  by_request = collections.defaultdict(list)
  for row in rows:
    by_request[row['request_id']].append(row)
  faults += [
    f'{name} has {len(found)} rows'
    for name, found in by_request.items()
    if len(found) != 1
  ]
  for each in told.answered:
    if each.is_replayed:
      continue  # the row is that of the request that was computed
    row = (
      by_request[each.request_id][0] if each.request_id in by_request else {}
    )
    got = tuple(row.get(n) for n in ('outcome', *_COUNTS))
    want = (ledger.FINISHED, each.prompt_tokens, each.completion_tokens)
    if got != want:
      faults.append(f'{each}: got the row {got}, expected {want}')
  for name in told.broken:
    outcomes = [row['outcome'] for row in by_request.get(name, [])]
    if outcomes != [ledger.ERROR]:
      faults.append(f'{name} broke off: got the rows {outcomes}')
  return faults + _double_bills(rows)


_COUNTS = 'prompt_tokens', 'completion_tokens'


def _double_bills(rows: list[dict]) -> list[str]:
  bills = collections.defaultdict(list)
  for row in rows:
    if row['outcome'] is not None and row['idempotency']:
      bills[row['idempotency']].append(row)
  return [
    f'{name[:12]} costs {sum(row["price_nanos"] for row in mine)} in'
    f' {len(mine)} rows'
    for name, mine in bills.items()
    if sum(row['price_nanos'] for row in mine)
    > max(
      1000 * row['prompt_tokens'] + 2000 * row['completion_tokens']
      for row in mine
    )
  ]


def main(argv: Sequence[str]) -> int:
  """Runs the kills and prints the tally; returns 1 if anything is wrong."""
  del argv
  logging.set_verbosity(logging.ERROR)  # the clients log every request
  count = flags.FLAGS.kills
  began = time.monotonic()
  with tempfile.TemporaryDirectory() as directory:
    told, faults = run(pathlib.Path(directory), count, seed=flags.FLAGS.seed)
  for text in faults:
    print(f'failed: {text[:1000]}', file=sys.stderr)
  num_replayed = sum(each.is_replayed for each in told.answered)
  print(
    f'{count} kills: {len(told.answered)} answers to the end ({num_replayed}'
    f' replayed), {told.num_left} clients left, {len(faults)} faults;'
    f' {time.monotonic() - began:.0f} s'
  )
  return 1 if faults else 0


if __name__ == '__main__':
  flags.DEFINE_integer('kills', 100, 'How often to kill it.', lower_bound=1)
  flags.DEFINE_integer('seed', 0, 'Of the moments.')
  app.run(main)
