"""Kills or stops replicas under load, again and again, and audits the ledger.

    python -m tests.survival.replica_kills --kills=50
    python -m tests.survival.replica_kills --kills=50 --processes=2

One server with two replicas, or with one replica over several processes,
answers all the time, with the clients of `server_kills`. Each time a random
process that has devices is killed, or stopped, so that it hangs. The next one
follows once all answer again. Every whole answer must arrive, every stream must
end with [DONE], and the ledger must have one row for each with the counts that
its client saw. Streams that a kill has met half-way end with an error event,
and have a row with that outcome. After a signal to the server, all processes
end by themselves.
"""

from collections.abc import Sequence
import os
import pathlib
import random
import signal
import socket
import subprocess
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
# Long beside the pauses of a busy machine, short beside the test.
_HEARTBEAT_SECONDS = 8
KILL, STOP = signal.SIGKILL, signal.SIGSTOP


def _metric(arena: server_kills.Arena, name: str) -> int:
  answer = httpx2.get(
    f'{arena.url}/metrics', headers={'authorization': f'Bearer {arena.key}'}
  )
  return sum(
    int(sample.value)
    for family in parser.text_string_to_metric_families(answer.text)
    for sample in family.samples
    if sample.name == name
  )


def _wait(arena: server_kills.Arena, name: str, least: int) -> None:
  deadline = time.monotonic() + _READY_SECONDS
  while (found := _metric(arena, name)) < least:
    if time.monotonic() > deadline:
      raise AssertionError(f'{name}: got {found}, expected at least {least}')
    time.sleep(0.1)


def _flags(num_processes: int) -> list[list[str]]:
  """Returns the flags of the server, and of each process that follows it."""
  heartbeat = f'--heartbeat_timeout_s={_HEARTBEAT_SECONDS}'
  if num_processes == 1:
    return [[heartbeat, f'--replicas={_NUM_REPLICAS}']]
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  return [
    [
      heartbeat,
      f'--engine.tensor={num_processes}',
      f'--coordinator=127.0.0.1:{port}',
      f'--num_processes={num_processes}',
      f'--process_id={index}',
    ]
    for index in range(num_processes)
  ]


def run(
  directory: pathlib.Path,
  count: int,
  *,
  num_processes: int = 1,
  signals: Sequence[int] = (KILL, STOP),
  seed: int = 0,
  tell=print,
):
  """Kills or stops a process so often.

  Args:
    directory: of model and records.
    count: how often.
    num_processes: of the only replica; 1: there are two replicas.
    signals: each in turn.
    seed: of the moments, and of the process that gets the signal.
    tell: receives a line for each kill.

  Returns:
    What the clients saw, and the faults.
  """
  arena = server_kills.Arena(directory)
  told, rng = server_kills.Told(), random.Random(seed)
  of_server, *of_others = _flags(num_processes)
  num_replicas = _NUM_REPLICAS if num_processes == 1 else 1
  running = [arena.launch(*each) for each in of_others]
  try:
    running.append(arena.start(*of_server))
    _wait(arena, 'replica_ready', num_replicas)
    clients = server_kills.Clients(arena, told, rng, waits=num_replicas == 1)
    for number in range(count):
      time.sleep(rng.uniform(0.05, 3.0))
      os.kill(
        rng.choice(_with_devices(running)), signals[number % len(signals)]
      )
      _wait(arena, 'replica_deaths_total', number + 1)
      _wait(arena, 'replica_ready', num_replicas)
      tell(f'{number}: {len(told.answered)} answered, {len(told.broken)} broke')
    clients.stop()
    replicas = _with_devices(running)
    running[-1].send_signal(signal.SIGTERM)
    codes = [each.wait(60) for each in running]
  finally:
    for each in running:
      each.kill()
  faults = server_kills.audit(arena.records, told)
  faults += [f'{pid} is left' for pid in replicas if _lives(pid)]
  faults += [f'{name} was cut off' for name, _ in told.cut_off]
  faults += [f'got exit code {code}, expected 0' for code in codes if code]
  return told, faults


def _with_devices(running: Sequence[subprocess.Popen]) -> list[int]:
  """Returns the processes that the started ones keep, without doorkeepers."""
  return [
    child
    for each in running
    for child in server_process.children(each.pid)
    if b'doorkeeper' not in pathlib.Path(f'/proc/{child}/cmdline').read_bytes()
  ]


def _lives(pid: int) -> bool:
  return pathlib.Path(f'/proc/{pid}').exists()


def main(argv: Sequence[str]) -> int:
  """Runs the kills and prints the tally; returns 1 if anything is wrong."""
  del argv
  logging.set_verbosity(logging.ERROR)  # the clients log every request
  count, began = flags.FLAGS.kills, time.monotonic()
  with tempfile.TemporaryDirectory() as directory:
    told, faults = run(
      pathlib.Path(directory),
      count,
      num_processes=flags.FLAGS.processes,
      seed=flags.FLAGS.seed,
    )
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
  flags.DEFINE_integer(
    'processes',
    1,
    'Processes of the only replica; 1: two replicas.',
    lower_bound=1,
  )
  flags.DEFINE_integer('seed', 0, 'Of the moments.')
  app.run(main)
