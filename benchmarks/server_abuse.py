"""Health of a server whose clients stream while others abuse it.

    python -m benchmarks.server_abuse --model=runs/quickstart/frozen

Starts serve.py on a free loopback port. `--clients` clients stream completions
for `--seconds`. Meanwhile the abuses of `ABUSES` run, each with a fixed number
of clients: bodies that are too large, hostile or never complete, heads that
never end, clients that stop reading or leave, requests that could be read in
two ways, heads and chunks that take long to parse. Reports the latency of
/health under load and before, the memory of the server, the statuses, and the
goals. Fails if any answer is a 5xx, if a stream does not end, if a request is
left open or holds pages, or if the ledger has other tokens than the engine.

The clients share the cores of this machine with the server. So a control is
probed at the same time: another process that only answers 200. Its latency is
due to the load of the machine; the server causes the rest.
"""

import asyncio
import collections
from collections.abc import Awaitable, Callable
from concurrent import futures
import contextlib
import dataclasses
import json
import multiprocessing
import pathlib
import re
import socket
import sqlite3
import statistics
import struct
import tempfile
from typing import Any

from absl import app, flags

from benchmarks.common import entry, health_probe, server_process
from checks import path_flags

_NAME = 'abused'  # of the model in requests
_PROBE_SECONDS = 0.05
_TYPE = 'content-type: application/json'
# The goals of a run.
_MOST_ADDED_MS = 100.0  # of the p99 of /health, above idle
_MOST_PROBES_TO_IDLE = 600
# Metrics: open requests and used pages, and the tokens of all answers.
_HELD = 'running', 'waiting', 'kv_pages_used', 'ledger_reservations_open'
_SAMPLED = 'sampled_tokens_total'
_MOST_GROWTH = 1.02  # of memory, from a quarter of the run to its end


@dataclasses.dataclass
class Target:
  """A server, and the counts of its answers."""

  host: str
  port: int
  model: str = _NAME
  deadline: float = 0.0  # of the event loop's clock
  statuses: dict[str, collections.Counter[int]] = dataclasses.field(
    default_factory=lambda: collections.defaultdict(collections.Counter)
  )
  num_cut: int = 0  # streams without [DONE]

  def body(self, **fields: Any) -> bytes:
    """Returns the body of a completions request."""
    return _json({'model': self.model, 'prompt': 'a', **fields})

  @property
  def is_over(self) -> bool:
    """Whether the time of the run has passed."""
    return asyncio.get_running_loop().time() > self.deadline

  @contextlib.asynccontextmanager
  async def connection(self):
    """Opens a connection; yields its reader and writer."""
    reader, writer = await asyncio.open_connection(
      self.host, self.port, limit=2**20
    )
    try:
      yield reader, writer
    finally:
      writer.transport.abort()

  async def ask(self, who: str, head: str, body: bytes = b'') -> bytes:
    """Sends a request and returns its answer; counts the status."""
    async with self.connection() as (reader, writer):
      writer.write(_head(head, body) + body)
      with contextlib.suppress(OSError):
        await writer.drain()
      answer = b''
      with contextlib.suppress(OSError):
        answer = await reader.read(-1)
    self.count(who, answer)
    return answer

  def count(self, who: str, answer: bytes) -> None:
    """Counts the status of an answer, if there is one."""
    if found := re.match(rb'HTTP/1.1 (\d+)', answer):
      self.statuses[who][int(found[1])] += 1


def _json(value: Any) -> bytes:
  return json.dumps(value, separators=(',', ':')).encode()


def _head(line: str, body: bytes) -> bytes:
  rows = (line, 'host: a', _TYPE, 'connection: close')
  return '\r\n'.join((*rows, f'content-length: {len(body)}', '', '')).encode()


_COMPLETE = 'POST /v1/completions HTTP/1.1'


async def _stream(target: Target) -> None:
  body = target.body(stream=True, max_tokens=32, ignore_eos=True)
  answer = await target.ask('stream', _COMPLETE, body)
  if b' 200 ' in answer[:20] and b'[DONE]' not in answer:
    target.num_cut += 1


# Made once: the clients share the cores with the server.
_LARGE = b'x' * 2**23
_LONG = 'x' * 10**6
_WORDS = _json({'prompt': 'word ' * 2 * 10**5})
_UNREAD = _json({'prompt': _LONG})
_HOSTILE = (
  b'"prompt":[' + b'1.5,' * 2 * 10**5 + b'1]',
  b'"prompt":[' + b'[],' * 3 * 10**5 + b'1]',
  b'"prompt":"a","stop":[' + b'"a",' * 10**5 + b'1]',
  b'"prompt":' + b'[' * 10**6,
  b'"prompt":"a","logit_bias":{' + b'"1":1,' * 10**5 + b'"1":1}',
)
_HEADERS = b''.join(b'x%d: y\r\n' % i for i in range(10**4))
_CHUNKS = b'1\r\nx\r\n' * 10**5
_PIPELINED = b'GET /v1/models HTTP/1.1\r\nhost: a\r\n\r\n' * 1000


async def _large_body(target: Target) -> None:
  await target.ask('large body', _COMPLETE, _LARGE)


async def _long_prompt(target: Target) -> None:
  await target.ask('long prompt', _COMPLETE, target.body(prompt=_LONG))


async def _long_text(target: Target) -> None:
  await target.ask('long text', 'POST /tokenize HTTP/1.1', _WORDS)


async def _hostile_json(target: Target) -> None:
  for fields in _HOSTILE:
    body = b'{"model":"%s",%s}' % (target.model.encode(), fields)
    await target.ask('hostile JSON', _COMPLETE, body)


async def _half(target: Target, sent: bytes) -> None:
  async with target.connection() as (reader, writer):
    writer.write(sent)
    with contextlib.suppress(OSError):
      await reader.read(-1)


async def _half_head(target: Target) -> None:
  await _half(target, b'POST /v1/completions HTTP/1.1\r\nhost: a\r\n')


async def _half_body(target: Target) -> None:
  await _half(target, _head(_COMPLETE, b'x' * 1000) + b'{')


async def _stalled_reader(target: Target) -> None:
  async with target.connection() as (reader, writer):
    writer.write(_head('POST /tokenize HTTP/1.1', _UNREAD) + _UNREAD)
    await reader.read(1)
    writer.transport.pause_reading()  # pyright: ignore[reportAttributeAccessIssue]
    while not target.is_over:
      await asyncio.sleep(1)


async def _leaver(target: Target) -> None:
  body = target.body(stream=True, max_tokens=200, ignore_eos=True)
  async with target.connection() as (reader, writer):
    writer.write(_head(_COMPLETE, body) + body)
    target.count('leaver', await reader.read(12))


async def _smuggler(target: Target) -> None:
  async with target.connection() as (reader, writer):
    head = f'{_COMPLETE}\r\nhost: a\r\ncontent-length: 3\r\n'
    behind = 'transfer-encoding: chunked\r\n\r\n0\r\n\r\nGET /health HTTP/1.1'
    writer.write((head + behind + '\r\nhost: a\r\n\r\n').encode())
    answer = b''
    with contextlib.suppress(OSError):
      answer = await reader.read(-1)
    target.count('smuggler', answer)
    if answer.count(b'HTTP/1.1 ') > 1:
      raise ValueError(f'smuggled: {answer[:500]!r}')


async def _bytes(target: Target, who: str, sent: bytes) -> None:
  """Sends bytes that take long to parse, and reads until it is stopped."""
  async with target.connection() as (reader, writer):
    writer.write(sent)
    with contextlib.suppress(OSError):
      target.count(who, await reader.read(-1))


async def _many_headers(target: Target) -> None:
  head = b'GET /v1/models HTTP/1.1\r\nhost: a\r\n'
  await _bytes(target, 'many headers', head + _HEADERS + b'\r\n')


async def _short_chunks(target: Target) -> None:
  head = f'{_COMPLETE}\r\nhost: a\r\n{_TYPE}\r\ntransfer-encoding: chunked'
  await _bytes(target, 'short chunks', f'{head}\r\n\r\n'.encode() + _CHUNKS)


async def _pipelined(target: Target) -> None:
  end = b'GET /v1/models HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n'
  await _bytes(target, 'pipelined', _PIPELINED + end)


async def _silent(target: Target) -> None:
  await _half(target, b'')


async def _reset(target: Target) -> None:
  """Asks for much, and resets the connection in the middle of a stream."""
  body = target.body(stream=True, max_tokens=200, n=16)
  async with target.connection() as (reader, writer):
    writer.write(_head(_COMPLETE, body) + body)
    target.count('reset', await reader.read(2000))
    own = writer.get_extra_info('socket')
    own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))


# The number of clients that commit each abuse at once, and the abuse.
ABUSES: dict[str, tuple[int, Callable[[Target], Awaitable[None]]]] = {
  'large body': (4, _large_body),
  'long prompt': (4, _long_prompt),
  'long text': (2, _long_text),
  'hostile JSON': (2, _hostile_json),
  'half head': (200, _half_head),
  'half body': (200, _half_body),
  'stalled reader': (8, _stalled_reader),
  'leaver': (8, _leaver),
  'smuggler': (4, _smuggler),
  'many headers': (2, _many_headers),
  'short chunks': (2, _short_chunks),
  'pipelined': (1, _pipelined),
  'silent': (200, _silent),
  'reset': (2, _reset),
}


async def _repeated(
  target: Target, do: Callable[[Target], Awaitable[None]]
) -> None:
  while not target.is_over:
    with contextlib.suppress(OSError):
      await do(target)
    await asyncio.sleep(0.01)


def _memory_mib(pid: int) -> float:
  """Returns the memory of a server and of its replicas."""
  found = 0
  for each in (pid, *server_process.children(pid)):
    status = pathlib.Path(f'/proc/{each}/status').read_text(encoding='utf-8')
    found += sum(map(int, re.findall(r'VmRSS:\s+(\d+) kB', status)))
  return found / 1024


async def abuse(
  target: Target, *, pid: int, num_clients: int, seconds: float
) -> dict[str, Any]:
  """Returns the figures of a run.

  Raises:
    ValueError: an answer was a 5xx, a stream did not end, or a request was
      read in two ways.
  """
  loop = asyncio.get_running_loop()
  spawn = multiprocessing.get_context('spawn')
  with (
    futures.ProcessPoolExecutor(2, spawn) as probers,
    health_probe.control() as other,
  ):
    where, control = (target.host, target.port), ('127.0.0.1', other)

    def probed(where: tuple[str, int], seconds: float):
      return loop.run_in_executor(probers, health_probe.probe, *where, seconds)

    both = [probed(each, 1.0) for each in (where, control)]
    await asyncio.gather(*both)  # imports
    idle = await probed(where, seconds / 8)
    target.deadline = loop.time() + seconds
    clients = [
      asyncio.create_task(_repeated(target, do))
      for num, do in ((num_clients, _stream), *ABUSES.values())
      for _ in range(num)
    ]
    both = [probed(each, seconds) for each in (where, control)]
    # The first quarter fills caches, and brings the threads and buffers.
    await asyncio.sleep(seconds / 4)
    before = _memory_mib(pid)
    health, control = await asyncio.gather(*both)
  after = _memory_mib(pid)
  # Clients that still wait for the server are cancelled; the others have ended.
  _, late = await asyncio.wait(clients, timeout=seconds)
  for client in late:
    client.cancel()
  for client in clients:
    if client not in late and (error := client.exception()):
      raise error
  failed = {
    who: dict(counts)
    for who, counts in target.statuses.items()
    if any(status >= 500 for status in counts)
  }
  if failed or target.num_cut:
    raise ValueError(f'got {failed}, and {target.num_cut} streams cut off')
  return {
    'clients': num_clients,
    'seconds': seconds,
    'health_idle_ms': _percentiles(idle),
    'health_ms': _percentiles(health),
    'control_ms': _percentiles(control),
    'memory_mib': {'after_a_quarter': before, 'at_the_end': after},
    'statuses': {who: dict(each) for who, each in target.statuses.items()},
  }


def _percentiles(seconds: list[float]) -> dict[str, float]:
  cuts = statistics.quantiles([1000 * each for each in seconds], n=100)
  return {'p50': cuts[49], 'p99': cuts[98], 'max': 1000 * max(seconds)}


def report(result: entry.Result) -> str:
  """Returns the figures as text."""
  rows = [
    f'{name:17}' + '  '.join(f'{key} {value:,.1f}' for key, value in each)
    for name in ('health_idle_ms', 'health_ms', 'control_ms', 'memory_mib')
    for each in [result[name].items()]
  ]
  added = result['health_ms']['p99'] - result['health_idle_ms']['p99']
  growth = (
    result['memory_mib']['at_the_end'] / result['memory_mib']['after_a_quarter']
  )
  rows += [
    f'goal             p99 of /health at most {_MOST_ADDED_MS:.0f} ms above'
    f' idle: {added:,.1f} {_verdict(added <= _MOST_ADDED_MS)}',
    f'goal             memory at most {_MOST_GROWTH:.2f} times that after a'
    f' quarter: {growth:.3f} {_verdict(growth <= _MOST_GROWTH)}',
  ]
  rows.append(
    f'left behind      nothing; {result["tokens"]:,} completion tokens in'
    f' {result["ledger_rows"]:,} rows of the ledger, as the engine counted'
  )
  rows += [f'{who:17}{each}' for who, each in result['statuses'].items()]
  return '\n'.join(rows)


async def _settled(target: Target) -> dict[str, int]:
  """Returns the metrics of the server once it is idle.

  Raises:
    ValueError: the server does not become idle.
  """
  for _ in range(_MOST_PROBES_TO_IDLE):
    reader, writer = await asyncio.open_connection(target.host, target.port)
    writer.write(
      b'GET /metrics HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n'
    )
    text = (await reader.read()).decode()
    writer.close()
    found = {
      name: sum(
        int(float(value))
        for value in re.findall(rf'^{name}(?:{{.*}})? (\S+)$', text, re.M)
      )
      for name in (*_HELD, _SAMPLED)
    }
    if not any(found[name] for name in _HELD):
      return found
    await asyncio.sleep(_PROBE_SECONDS)
  raise ValueError(f'got {found} when all clients had left, expected zeros')


def _check_ledger(records: pathlib.Path, sampled: int) -> int:
  """Returns the number of rows of the ledger, after comparing its tokens.

  Raises:
    ValueError: the ledger has other tokens than the engine, or an open row.
  """
  with contextlib.closing(sqlite3.connect(records)) as connection:
    ((rows, tokens, num_open),) = connection.execute(
      'SELECT COUNT(*), SUM(completion_tokens), SUM(outcome IS NULL)'
      ' FROM ledger'
    )
  if tokens != sampled or num_open:
    raise ValueError(
      f'got {tokens} completion tokens and {num_open} open rows in the ledger,'
      f' expected the {sampled} of the engine and no open row'
    )
  return rows


def _verdict(is_met: bool) -> str:
  return '(met)' if is_met else '(MISSED)'


def measure(args: Any):
  """Starts a server and yields the figures of one run."""
  with (
    tempfile.TemporaryDirectory() as directory,
    server_process.running(
      f'--model={args.model}',
      f'--name={_NAME}',
      f'--records={directory}/records.db',
      replicas=args.replicas,
    ) as (port, pid),
  ):
    target = Target('127.0.0.1', port)
    figures = asyncio.run(
      abuse(target, pid=pid, num_clients=args.clients, seconds=args.seconds)
    )
    sampled = asyncio.run(_settled(target))[_SAMPLED]
    rows = _check_ledger(pathlib.Path(directory) / 'records.db', sampled)
    yield figures | {'tokens': sampled, 'ledger_rows': rows}


def main(argv: list[str]) -> None:
  """Measures and reports."""
  del argv
  entry.run(measure, report)


if __name__ == '__main__':
  path_flags.DEFINE_path('model', None, 'Frozen directory.', required=True)
  flags.DEFINE_integer('clients', 256, 'Clients that stream.', 1)
  flags.DEFINE_integer(
    'replicas', 1, 'Processes with an engine; 0: it is in the server.', 0
  )
  flags.DEFINE_float('seconds', 60, 'Seconds of abuse.', 4)
  path_flags.DEFINE_path('out', '', 'A file that gets the result as JSON.')
  app.run(main)
