"""Serving latency: prefix reuse, and the cost of an arriving prompt for others.

    python -m benchmarks.serving_latency

The 110M model of `decode_latency`, with a context of 4,096.

- **Prefix.** Time to first token of a prompt of 1,000 tokens, alone on the
  engine: with no token seen before, over the first 900 tokens seen before.
- **Arrival.** While 16 sequences decode, a prompt of 2,000 tokens arrives. The
  figures are the inter-token latency of these sequences from the arrival to the
  prompt's first token, over their median latency before. `bounded` is the
  engine as it is: a step that decodes has at most `max_mixed_chunks` chunks of
  prompt. `whole` is the same engine without that bound.
"""

import dataclasses
import statistics
import time
from typing import Any

from absl import app
import jax
import numpy as np

from benchmarks import decode_latency
from benchmarks.common import entry, random_model, timing
from hardware import host_memory
from inference.engine import engine as engine_lib, engine_config
from inference.requests import requests
from inference.sampling import settings as settings_lib
from models import flops, model_config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scenario:
  """The sizes of both measurements."""

  model: model_config.ModelConfig
  engine: engine_config.EngineConfig
  prefix_tokens: int  # of the prompt whose first token is timed
  shared_tokens: int  # of these, seen before
  num_decoding: int  # sequences that decode when the prompt arrives
  context_tokens: int  # prompt of each decoding sequence
  settled_steps: int  # decode steps before the prompt arrives
  arriving_tokens: int  # of the arriving prompt


def judged() -> Scenario:
  """Returns the scenario of the published figures."""
  model = decode_latency.llama_110m().model
  return Scenario(
    model=dataclasses.replace(model, max_length=4096),
    engine=engine_config.EngineConfig(
      max_sequences=32,
      num_pages=1024,
      decode_shapes=(1, 16, 32),
      decode_steps=1,  # latency is that between two tokens
    ),
    prefix_tokens=1000,
    shared_tokens=900,
    num_decoding=16,
    context_tokens=64,
    settled_steps=30,
    arriving_tokens=2000,
  )


class Bench:
  """An engine, and a source of prompts that it has not seen."""

  def __init__(self, scenario: Scenario, engine: engine_config.EngineConfig):
    self.scenario = scenario
    self.engine = engine_lib.Engine(
      scenario.model,
      random_model.params(scenario.model),
      tokenizer=random_model.Tokenizer(scenario.model.vocab_size),
      weights_digest='',
      config=engine,
    )
    self._rng = np.random.default_rng(0)

  def prompt(self, num_tokens: int) -> tuple[int, ...]:
    """Returns new random tokens."""
    size = self.scenario.model.vocab_size
    return tuple(self._rng.integers(3, size, num_tokens).tolist())

  def submit(self, prompt: tuple[int, ...], new_tokens: int) -> int:
    """Submits a greedy request for `new_tokens` tokens; returns its id."""
    settings = settings_lib.Settings(
      temperature=0.0, max_tokens=new_tokens, ignore_eos=True
    )
    return self.engine.submit(
      requests.Request(prompt_ids=prompt, settings=settings)
    )

  def first_token_seconds(self, prompt: tuple[int, ...]) -> float:
    """Returns the seconds to the first token of a request, alone."""
    start = time.perf_counter()
    self.submit(prompt, 1)
    for _ in self.engine.run():
      pass
    return time.perf_counter() - start

  def arrival(self) -> tuple[list[float], list[float]]:
    """Returns inter-token seconds of decoding sequences: before, and during.

    "During" is from the arrival of the prompt to its first token.
    """
    scenario, engine = self.scenario, self.engine
    steps = scenario.settled_steps
    room = scenario.model.max_length - scenario.context_tokens
    others = {
      self.submit(self.prompt(scenario.context_tokens), room)
      for _ in range(scenario.num_decoding)
    }
    last: dict[int, float] = {}
    gaps: list[float] = []
    before: list[float] = []
    arrived = None
    while True:
      updates = engine.step()
      now = time.perf_counter()
      if any(update.request_id == arrived for update in updates):
        break
      for update in updates:
        if update.request_id in last:
          gaps.append(now - last[update.request_id])
        last[update.request_id] = now
      if arrived is None and len(gaps) >= steps * len(others):
        before, gaps = gaps[-steps * len(others) // 2 :], []
        arrived = self.submit(self.prompt(scenario.arriving_tokens), 1)
    for request_id in others:
      engine.cancel(request_id)
    for _ in engine.run():
      pass
    return before, gaps


def run(scenario: Scenario, *, rounds: int) -> dict[str, Any]:
  """Measures prefix and arrival; returns everything that `report` prints."""
  bench = Bench(scenario, scenario.engine)
  unbounded = Bench(
    scenario,
    dataclasses.replace(
      scenario.engine, max_mixed_chunks=scenario.engine.max_chunks
    ),
  )
  cold, warm, stalls = [], [], {'bounded': [], 'whole': []}
  for _ in range(rounds):
    prompt = bench.prompt(scenario.prefix_tokens)
    cold.append(bench.first_token_seconds(prompt))
    tail = scenario.prefix_tokens - scenario.shared_tokens
    half_new = prompt[: scenario.shared_tokens] + bench.prompt(tail)
    warm.append(bench.first_token_seconds(half_new))
    for name, side in (('bounded', bench), ('whole', unbounded)):
      before, during = side.arrival()
      usual = statistics.median(before)
      stalls[name].append(
        {
          'median': statistics.median(during) / usual,
          'p95': float(np.quantile(during, 0.95)) / usual,
          'largest': max(during) / usual,
          'before_p95': float(np.quantile(before, 0.95)) / usual,
        }
      )
  compilations = sum(
    each.engine.metrics.value('compilations_after_ready_total')
    for each in (bench, unbounded)
  )
  return {
    'benchmark': 'serving_latency',
    'device': jax.devices()[0].device_kind,
    'num_params': flops.num_params(scenario.model),
    'prefix_tokens': scenario.prefix_tokens,
    'shared_tokens': scenario.shared_tokens,
    'cold_seconds': cold,
    'warm_seconds': warm,
    'prefix_ratio': timing.median_ratio(cold, warm),
    'num_decoding': scenario.num_decoding,
    'arriving_tokens': scenario.arriving_tokens,
    'stalls': {
      name: {
        key: statistics.median(each[key] for each in found) for key in found[0]
      }
      for name, found in stalls.items()
    },
    'compilations': compilations,
  }


def report(result: dict[str, Any]) -> str:
  """Returns the line on prefixes and the table on arrivals."""
  rows: list[tuple[str, ...]] = [('', 'median', 'p95', 'largest')]
  bounded = result['stalls']['bounded']
  rows.append(('before it', '1.00', f'{bounded["before_p95"]:.2f}', ''))
  for name, found in result['stalls'].items():
    rows.append(
      (name, *(f'{found[key]:.2f}' for key in ('median', 'p95', 'largest')))
    )
  share = result['shared_tokens'] / result['prefix_tokens']
  title = (
    f'A prompt of {result["arriving_tokens"]} tokens arrives while'
    f' {result["num_decoding"]} decode: their inter-token latency over its'
    ' median before'
  )
  return (
    f'Prefix: {share:.0%} of {result["prefix_tokens"]} tokens seen before:'
    f' first token {result["prefix_ratio"]:.1f} times as soon\n'
    + timing.table(title, rows)
    + f'\n  {result["compilations"]:.0f} compilations after ready'
  )


def main(argv: list[str]) -> None:
  """Runs the benchmark."""
  del argv
  host_memory.reuse_freed_memory(one_heap=False)  # as serve.py does
  entry.run(lambda args: [run(judged(), rounds=args.rounds)], report)


if __name__ == '__main__':
  entry.define_flags(rounds=3)
  app.run(main)
