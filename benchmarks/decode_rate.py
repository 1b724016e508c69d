"""Decoding through the engine at several batch sizes, beside the bandwidth.

    python -m benchmarks.decode_rate --shape=1b --batches=1,8,32
    python -m benchmarks.decode_rate --batches=8 --adapters=8 --rank=16

A model of random weights answers greedy requests that all begin together. The
rate counts the tokens after the last prompt. `bandwidth` is the share of the
device's peak rate (from its datasheet, or measured) at which each decode step
reads every weight once, and the keys and values of all sequences. `ready` is
the time in which the engine of a batch size compiles all its programs, without
a cache.

With --adapters=N, each batch size has a second side: the same requests, each
with one of N adapters of every linear layer. `adapted` is its rate, as a share
of the base's rate.

Shapes on accelerators: `1b`, the shape of Llama-3.2-1B, and `110m`, both in
bfloat16. On a CPU: `110m` in float32.
"""

from collections.abc import Iterator
import dataclasses
import statistics
import time
from typing import Any

from absl import app, flags
import jax
import jax.numpy as jnp

from benchmarks import decode_latency, train_throughput
from benchmarks.common import entry, random_model, timing
from hardware import peaks
from inference.engine import engine as engine_lib, engine_config
from inference.requests import requests
from inference.sampling import settings as settings_lib
from models import flops, model_config

PROMPT_TOKENS = 128
SHAPES = '1b', '110m'


def model_of(shape: str) -> model_config.ModelConfig:
  """Returns the model of a shape."""
  if shape == '110m':
    return decode_latency.llama_110m().model
  model = train_throughput.llama_1b(length=2048)
  return dataclasses.replace(model, scan_layers=False)


class Side:
  """An engine for one batch size."""

  def __init__(
    self,
    model: model_config.ModelConfig,
    batch_size: int,
    *,
    new_tokens: int,
    dtype: Any,
    numerics: str = 'fast',
    num_adapters: int = 0,
    rank: int = 16,
    params: Any = None,
  ):
    """Makes the engine; `ready_s` is the time this takes, without the weights.

    Without `params`, the weights are random floats.
    """
    if params is None:
      params = jax.tree.map(
        lambda leaf: leaf.astype(dtype), random_model.params(model)
      )
    jax.block_until_ready(params)
    start = time.perf_counter()
    self.engine = engine_lib.Engine(
      model,
      params,
      tokenizer=random_model.Tokenizer(model.vocab_size),
      weights_digest='',
      dtype=dtype,
      config=engine_config.EngineConfig(
        max_sequences=batch_size,
        prefix_cache=False,
        numerics=numerics,
        stream_seconds=0,
        max_adapters=num_adapters,
        max_adapter_rank=rank,
      ),
    )
    self.ready_s = time.perf_counter() - start
    self._adapters = [f'adapter {n}' for n in range(num_adapters)] or ['']
    for seed, name in enumerate(filter(None, self._adapters)):
      adapter = random_model.adapter(params, seed=seed, rank=rank)
      self.engine.adapters.load(name, adapter)
    self.batch_size, self.new_tokens = batch_size, new_tokens
    self.step_bytes = decode_bytes(
      model, batch_size, PROMPT_TOKENS + new_tokens / 2, jnp.dtype(dtype)
    )

  def tokens_per_s(self) -> float:
    """Answers the requests; returns the rate after the last prompt."""
    settings = settings_lib.Settings(
      temperature=0.0, max_tokens=self.new_tokens, ignore_eos=True
    )
    for number in range(self.batch_size):
      prompt = tuple(3 + (number + i) % 100 for i in range(PROMPT_TOKENS))
      adapter = self._adapters[number % len(self._adapters)]
      self.engine.submit(
        requests.Request(prompt_ids=prompt, settings=settings, adapter=adapter)
      )
    value = self.engine.metrics.value
    total = value('sampled_tokens_total') + self.batch_size * self.new_tokens
    first = value('time_to_first_token_seconds_count') + self.batch_size
    start, begun = 0.0, 0.0
    for _ in self.engine.run():
      if not start and value('time_to_first_token_seconds_count') >= first:
        start, begun = time.perf_counter(), value('sampled_tokens_total')
    return (total - begun) / (time.perf_counter() - start)


def decode_bytes(
  model: model_config.ModelConfig, batch_size: int, context: float, dtype: Any
) -> float:
  """Returns the bytes that a decode step must read."""
  heads = 2 * model.num_layers * model.num_kv_heads * model.head_width
  numbers = flops.num_matmul_params(model) + batch_size * context * heads
  return dtype.itemsize * numbers


def measure(args: Any) -> Iterator[entry.Result]:
  """Yields the figures, medians over rounds in which the sides take turns."""
  device = jax.devices()[0]
  is_cpu = device.platform == 'cpu'
  shape = args.shape or ('110m' if is_cpu else '1b')
  dtype = jnp.float32 if is_cpu else jnp.bfloat16
  counts = [0, args.adapters] if args.adapters else [0]
  sides = [
    _side(args, shape, dtype, batch_size=int(size), num_adapters=count)
    for size in args.batches
    for count in counts
  ]
  rates: list[list[float]] = [[] for _ in sides]
  for _ in range(args.rounds + 1):
    for side, found in zip(sides, rates, strict=True):
      found.append(side.tokens_per_s())
  peak = peaks.peaks(device)
  batches = {}
  for index in range(0, len(sides), len(counts)):
    # The first round fills caches.
    side, found = sides[index], rates[index][1:]
    rate = statistics.median(found)
    batches[side.batch_size] = {
      'tokens_per_s': rate,
      'bandwidth': rate / side.batch_size * side.step_bytes / peak.bytes_per_s,
      'ready_s': side.ready_s,
    }
    if args.adapters:
      # Of one round each: the machine is as busy for both.
      pairs = zip(rates[index + 1][1:], found, strict=True)
      ratio = statistics.median(adapted / base for adapted, base in pairs)
      batches[side.batch_size]['adapted'] = ratio
  yield {
    'shape': shape,
    'numerics': args.numerics,
    'device': device.device_kind,
    'peak_bytes_per_s': peak.bytes_per_s,
    'peak_source': peak.source,
    'adapters': args.adapters,
    'rank': args.rank,
    'batches': batches,
  }


def _side(args: Any, shape: str, dtype: Any, **fields: int) -> Side:
  return Side(
    model_of(shape),
    new_tokens=args.new_tokens,
    dtype=dtype,
    numerics=args.numerics,
    rank=args.rank,
    **fields,
  )


def report(result: entry.Result) -> str:
  """Returns the table."""
  heads: tuple[str, ...] = 'sequences', 'tokens/s', 'bandwidth', 'ready'
  if result.get('adapters'):
    heads += (f'{result["adapters"]} adapters of rank {result["rank"]}',)
  rows: list[tuple[str, ...]] = [heads]
  for size, each in result['batches'].items():
    row = (
      str(size),
      f'{each["tokens_per_s"]:,.0f}',
      f'{each["bandwidth"]:.0%}',
      f'{each["ready_s"]:.1f} s',
    )
    rows.append((*row, *[f'{x:.0%}' for x in [each.get('adapted')] if x]))
  return timing.table(
    f'Decoding, {result["shape"]} on {result["device"]},'
    f' {result["numerics"]} numerics',
    rows,
  )


def main(argv: list[str]) -> None:
  """Measures and reports."""
  del argv
  entry.run(measure, report)


if __name__ == '__main__':
  entry.define_flags(rounds=3)
  flags.DEFINE_enum(
    'shape', None, SHAPES, 'Model; default: 110m on a CPU, else 1b.'
  )
  flags.DEFINE_list('batches', ['1', '8', '32'], 'Sequences that run at once.')
  flags.DEFINE_integer('new_tokens', 256, 'Tokens of each answer.', 2)
  flags.DEFINE_integer(
    'adapters', 0, 'Number of adapters of a second side; 0: no such side.', 0
  )
  flags.DEFINE_integer('rank', 16, 'Rank of each adapter.', 1)
  flags.DEFINE_enum(
    'numerics', 'fast', engine_config.NUMERICS, 'Numerics of the engine.'
  )
  app.run(main)
