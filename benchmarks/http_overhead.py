"""The time that HTTP adds to the engine, for clients that stream.

    python -m benchmarks.http_overhead --model=runs/quickstart/frozen

`--sequences` requests of `--tokens` new tokens each are answered by an engine
in this process, and by serve.py over streams on loopback; both take turns. The
result is the time of a round over HTTP divided by the time of the bare engine,
a median over rounds. With --in_process a second server, whose engine is in the
process of the server, takes turns with both; its ratio is printed beside.
Server, clients and engine share the cores of this machine: on a machine with
few cores, the clients' time is part of the result.

A column counts the events of a stream per token: a stream gets the tokens of a
dispatch together (`--engine.stream_seconds`).
"""

import asyncio
import contextlib
import json
import time
from typing import Any

from absl import app, flags

from benchmarks.common import entry, server_process, timing
from checks import path_flags
from hardware import host_memory

GOAL = 1.15
_NAME = 'model'


def engine_fields(num_sequences: int) -> dict[str, Any]:
  """Returns the fields of the EngineConfig of both sides."""
  return {'max_sequences': num_sequences}


class Bare:
  """The engine alone."""

  def __init__(self, model: str, num_sequences: int, num_tokens: int):
    """Loads the model; the other defaults of the engine are serve.py's."""
    from inference import generate
    from inference.engine import engine_config
    from inference.sampling import settings

    config = engine_config.EngineConfig(**engine_fields(num_sequences))
    self._generator = generate.load(model, config)
    self._prompts = _prompts(num_sequences)
    self._settings = settings.Settings(
      max_tokens=num_tokens, ignore_eos=True, temperature=1.0
    )

  def __call__(self) -> float:
    """Returns the seconds of a round."""
    start = time.perf_counter()
    num_tokens = 0
    for _, update in self._generator.updates(self._prompts, self._settings):
      num_tokens += len(update.token_ids)
    seconds = time.perf_counter() - start
    _check(num_tokens, len(self._prompts) * (self._settings.max_tokens or 0))
    return seconds


class Http:
  """Clients of a server, which keep their connections."""

  def __init__(self, port: int, num_sequences: int, num_tokens: int):
    """Prepares the requests."""
    self._port, self._num_tokens = port, num_tokens
    self._requests = [
      _request(prompt, num_tokens) for prompt in _prompts(num_sequences)
    ]
    self.events_per_token = 0.0

  def __call__(self) -> float:
    """Returns the seconds of a round, from the first byte sent to the last."""
    return asyncio.run(self._round())

  async def _round(self) -> float:
    connections = [
      await asyncio.open_connection('127.0.0.1', self._port, limit=2**26)
      for _ in self._requests
    ]
    start = time.perf_counter()
    found = await asyncio.gather(
      *(
        _stream(*each, request)
        for each, request in zip(connections, self._requests, strict=True)
      )
    )
    seconds = time.perf_counter() - start
    for _, writer in connections:
      writer.close()
    asked = len(self._requests) * self._num_tokens
    _check(sum(usage['completion_tokens'] for _, usage in found), asked)
    self.events_per_token = sum(num for num, _ in found) / asked
    return seconds


async def _stream(reader, writer, request: bytes) -> tuple[int, dict[str, Any]]:
  """Returns the number of events with text, and the usage of the last."""
  writer.write(request)
  body = await reader.readuntil(b'data: [DONE]\n\n')
  events = [line for line in body.split(b'\n') if line.startswith(b'data: {')]
  usage = json.loads(events[-1].removeprefix(b'data: '))['usage']
  return len(events) - 1, usage


def _request(prompt: str, num_tokens: int) -> bytes:
  body = json.dumps(
    {
      'model': _NAME,
      'prompt': prompt,
      'max_tokens': num_tokens,
      'temperature': 1.0,
      'ignore_eos': True,
      'stream': True,
      'stream_options': {'include_usage': True},
    }
  ).encode()
  head = (
    'POST /v1/completions HTTP/1.1',
    'host: a',
    'content-type: application/json',
    f'content-length: {len(body)}',
  )
  return '\r\n'.join((*head, '', '')).encode() + body


def _prompts(num_sequences: int) -> list[str]:
  return [f'{index:03} is a number' for index in range(num_sequences)]


def _check(num_tokens: int, expected: int) -> None:
  if num_tokens != expected:
    raise ValueError(
      f'got {num_tokens} tokens, expected {expected}; the context may be too'
      ' short, lower --tokens'
    )


def measure(args: Any):
  """Yields the figures of one run."""
  asked = args.sequences, args.tokens
  bare = Bare(args.model, *asked)
  fields = engine_fields(args.sequences)
  serve_args = (
    f'--model={args.model}',
    f'--name={_NAME}',
    *(f'--engine.{name}={value}' for name, value in fields.items()),
  )
  with contextlib.ExitStack() as stack:
    sides: dict[str, Any] = {'bare': bare}
    replicas = {'http': args.replicas}
    if args.in_process:
      replicas['in_process'] = 0
    for name, num in replicas.items():
      port, _ = stack.enter_context(
        server_process.running(*serve_args, replicas=num)
      )
      sides[name] = Http(port, *asked)
    for turn in sides.values():
      turn()  # fills caches
    turns = timing.interleave(sides, args.rounds)
  num_tokens = args.sequences * args.tokens
  yield {
    'sequences': args.sequences,
    'tokens': args.tokens,
    'ratio': timing.median_ratio(turns['http'], turns['bare']),
    'ratio_in_process': timing.median_ratio(turns['in_process'], turns['bare'])
    if args.in_process
    else None,
    'replicas': args.replicas,
    'tokens_per_s': {
      name: num_tokens / sorted(found)[len(found) // 2]
      for name, found in turns.items()
    },
    'events_per_token': sides['http'].events_per_token,
    'goal': GOAL,
  }


def report(result: entry.Result) -> str:
  """Returns the figures as text."""
  verdict = 'met' if result['ratio'] <= result['goal'] else 'MISSED'
  speed = result['tokens_per_s']
  beside = ''
  if result['ratio_in_process']:
    beside = (
      '\nwith the engine in the process of the server:'
      f' {result["ratio_in_process"]:.2f}, {speed["in_process"]:,.0f} tokens/s'
    )
  return (
    f'{result["sequences"]} streams of {result["tokens"]} tokens:'
    f' bare {speed["bare"]:,.0f} tokens/s, HTTP {speed["http"]:,.0f} tokens/s,'
    f' {result["events_per_token"]:.2f} events per token\n'
    f'time over HTTP / bare: {result["ratio"]:.2f}'
    f' (goal {result["goal"]}: {verdict}){beside}'
  )


def main(argv: list[str]) -> None:
  """Measures and reports."""
  del argv
  host_memory.reuse_freed_memory(one_heap=False)  # as serve.py does
  entry.run(measure, report)


if __name__ == '__main__':
  entry.define_flags(rounds=5)
  path_flags.DEFINE_path('model', None, 'Frozen directory.', required=True)
  flags.DEFINE_integer('sequences', 32, 'Requests at the same time.', 1)
  flags.DEFINE_integer(
    'replicas', 1, 'Processes with an engine; 0: it is in the server.', 0
  )
  flags.DEFINE_bool('in_process', False, 'Also measures --replicas=0.')
  flags.DEFINE_integer('tokens', 128, 'New tokens of each.', 1)
  app.run(main)
