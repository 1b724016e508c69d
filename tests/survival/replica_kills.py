"""Kills replicas under load, again and again, and audits the ledger.

    python -m tests.survival.replica_kills --kills=50

One server with two replicas answers all the time, with the clients of
`server_kills`. A kill ends a random replica; the next one follows once both
answer again. Every whole answer must arrive, every stream must end with [DONE],
and the ledger must have one row for each with the counts that its client saw.
Streams that a kill has met half-way end with an error event, and have a row
with that outcome.
"""

from collections.abc import Sequence
import os
import pathlib
import random
import signal
import sys
import tempfile
import time

from absl import app, flags, logging
import httpx2
from prometheus_client import parser

from benchmarks.common import server_process
from tests.survival import server_kills

_NUM_REPLICAS = 2
_READY_SECONDS = 300


def _num_ready(arena: server_kills.Arena) -> int:
  answer = httpx2.get(
    f'{arena.url}/metrics', headers={'authorization': f'Bearer {arena.key}'}
  )
  return sum(
    int(sample.value)
    for family in parser.text_string_to_metric_families(answer.text)
    for sample in family.samples
    if sample.name == 'replica_ready'
  )


def _wait_until_ready(arena: server_kills.Arena) -> None:
  deadline = time.monotonic() + _READY_SECONDS
  while _num_ready(arena) < _NUM_REPLICAS:
    if time.monotonic() > deadline:
      raise AssertionError(f'got no {_NUM_REPLICAS} replicas, expected them')
    time.sleep(0.1)


def run(directory: pathlib.Path, count: int, *, seed: int = 0, tell=print):
  """Kills a replica so often; returns what the clients saw, and the faults."""
  arena = server_kills.Arena(directory)
  told, rng = server_kills.Told(), random.Random(seed)
  running = arena.start(f'--replicas={_NUM_REPLICAS}')
  try:
    _wait_until_ready(arena)
    clients = server_kills.Clients(arena, told, rng)
    for number in range(count):
      time.sleep(rng.uniform(0.05, 3.0))
      os.kill(rng.choice(server_process.children(running.pid)), signal.SIGKILL)
      time.sleep(0.5)
      _wait_until_ready(arena)
      tell(f'{number}: {len(told.answered)} answered, {len(told.broken)} broke')
    clients.stop()
    replicas = server_process.children(running.pid)
    running.send_signal(signal.SIGTERM)
    running.wait(60)
  finally:
    running.kill()
  faults = server_kills.audit(arena.records, told)
  faults += [f'{pid} is left' for pid in replicas if _lives(pid)]
  faults += [f'{name} was cut off' for name, _ in told.cut_off]
  return told, faults


def _lives(pid: int) -> bool:
  return pathlib.Path(f'/proc/{pid}').exists()


def main(argv: Sequence[str]) -> int:
  """Runs the kills and prints the tally; returns 1 if anything is wrong."""
  del argv
  logging.set_verbosity(logging.ERROR)  # the clients log every request
  count, began = flags.FLAGS.kills, time.monotonic()
  with tempfile.TemporaryDirectory() as directory:
    told, faults = run(pathlib.Path(directory), count, seed=flags.FLAGS.seed)
  for text in faults:
    print(f'failed: {text[:1000]}', file=sys.stderr)
  print(
    f'{count} kills: {len(told.answered)} answers to the end,'
    f' {len(told.broken)} streams ended with an error, {told.num_left} clients'
    f' left, {len(faults)} faults; {time.monotonic() - began:.0f} s'
  )
  return 1 if faults else 0


if __name__ == '__main__':
  flags.DEFINE_integer('kills', 50, 'How often to kill one.', lower_bound=1)
  flags.DEFINE_integer('seed', 0, 'Of the moments.')
  app.run(main)
