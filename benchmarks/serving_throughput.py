"""Serving speed of many requests, beside other batching and a peer.

    python -m benchmarks.serving_throughput --peer

A Llama-like model of 110M parameters (`decode_latency.llama_110m`) answers a
trace of requests: prompts and completions of 16 to 256 tokens, log-uniform, all
submitted at once; greedy, no EOS. Four ways take turns:

  continuous  the engine's continuous batching, 32 sequences at a time
  serial      one request after another, for the first requests of the trace
  static      batches of 32 in order; each runs until its longest completion
              ends, and tokens after a row's own end do not count
  peer        transformers' `generate` on the same batches, padded on the left

Columns. `tokens/s` is the requested new tokens over the whole time, prompts
included; ratios are medians over rounds. `roofline` is the least time of the
continuous way over its measured time. The least time is the longer of two times
at this machine's rates: reading weights and cache, or computing all products.
`KV waste` is the share of slots in used pages that hold no token, averaged over
steps. `contiguous` is the same share if each sequence had a contiguous row for
the whole context, or for exactly its final length.
"""

from collections.abc import Sequence
import contextlib
import dataclasses
import math
import statistics
import time
from typing import Any

from absl import app, flags
import jax
import numpy as np

from benchmarks import decode_latency
from benchmarks.common import entry, random_model, timing
from benchmarks.peer import peer_process
from hardware import host_memory, peaks as peaks_lib
from inference.engine import engine as engine_lib, engine_config
from inference.requests import requests
from inference.sampling import settings as settings_lib
from models import flops, model_config


@dataclasses.dataclass(frozen=True)
class Job:
  """One request of a trace."""

  prompt: tuple[int, ...]
  new_tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
  """A trace of requests, and the model and engine that serve it."""

  model: model_config.ModelConfig
  jobs: tuple[Job, ...]
  num_serial: int  # how many of the first jobs are also served serially
  engine: engine_config.EngineConfig


def mixed_jobs(
  count: int, vocab_size: int, *, least: int, most: int, seed: int = 0
) -> tuple[Job, ...]:
  """Returns requests whose lengths are log-uniform in [least, most]."""
  rng = np.random.default_rng(seed)

  def length() -> int:
    return round(math.exp(rng.uniform(math.log(least), math.log(most))))

  return tuple(
    Job(tuple(rng.integers(3, vocab_size, length()).tolist()), length())
    for _ in range(count)
  )


def judged(num_jobs: int) -> Workload:
  """Returns the workload of the published figures."""
  model = decode_latency.llama_110m().model
  return Workload(
    model=model,
    jobs=mixed_jobs(num_jobs, model.vocab_size, least=16, most=256),
    num_serial=8,
    # Every round repeats the trace: a prefix cache would find all prompts.
    engine=engine_config.EngineConfig(max_sequences=32, prefix_cache=False),
  )


class Ours:
  """Our side: one engine, used in three of the ways."""

  def __init__(self, workload: Workload):
    self.workload = workload
    self.engine = engine_lib.Engine(
      workload.model,
      random_model.params(workload.model),
      tokenizer=random_model.Tokenizer(workload.model.vocab_size),
      weights_digest='',
      config=workload.engine,
    )
    self.waste: list[float] = []  # of each step of `continuous`
    self.contiguous: list[float] = []
    self.host_shares: list[float] = []

  def continuous(self) -> float:
    """Serves all jobs at once; returns the seconds taken."""
    metrics = self.engine.metrics
    names = 'engine_host_seconds_total', 'engine_step_seconds_total'
    before = [metrics.value(name) for name in names]
    start = time.perf_counter()
    for job in self.workload.jobs:
      self._submit(job, job.new_tokens)
    while self.engine.has_work:
      self.engine.step()
      self._note_memory()
    seconds = time.perf_counter() - start
    host, steps = (
      metrics.value(name) - value
      for name, value in zip(names, before, strict=True)
    )
    self.host_shares.append(host / steps)
    return seconds

  def serial(self) -> float:
    """Serves the first jobs one after another; returns the seconds taken."""
    start = time.perf_counter()
    for job in self.workload.jobs[: self.workload.num_serial]:
      self._submit(job, job.new_tokens)
      self._drain()
    return time.perf_counter() - start

  def static(self) -> float:
    """Serves batch after batch; returns the seconds taken.

    Every job of a batch generates as many tokens as the longest one.
    """
    start = time.perf_counter()
    for batch in batches(self.workload):
      longest = max(job.new_tokens for job in batch)
      for job in batch:
        self._submit(job, longest)
      self._drain()
    return time.perf_counter() - start

  def _submit(self, job: Job, new_tokens: int) -> None:
    settings = settings_lib.Settings(
      temperature=0.0, max_tokens=new_tokens, ignore_eos=True
    )
    self.engine.submit(
      requests.Request(prompt_ids=job.prompt, settings=settings)
    )

  def _drain(self) -> None:
    for _ in self.engine.run():
      pass

  def _note_memory(self) -> None:
    gauges = self.engine.manager.gauges()
    if slots := gauges.pages_used * self.engine.page_tokens:
      self.waste.append(1 - gauges.tokens_held / slots)
      whole = gauges.num_running * self.workload.model.max_length
      self.contiguous.append(1 - gauges.tokens_held / whole)


def batches(workload: Workload) -> list[Sequence[Job]]:
  """Returns the trace in batches of `max_sequences` jobs."""
  size = workload.engine.max_sequences
  jobs = workload.jobs
  return [jobs[i : i + size] for i in range(0, len(jobs), size)]


def final_length_waste(jobs: Sequence[Job]) -> float:
  """Returns the waste of contiguous rows of exactly the final length.

  A sequence grows evenly to its final length: in the average step, half of its
  new tokens are not there yet.
  """
  reserved = sum(
    job.new_tokens * (len(job.prompt) + job.new_tokens) for job in jobs
  )
  empty = sum(job.new_tokens * job.new_tokens / 2 for job in jobs)
  return empty / reserved


def least_seconds(workload: Workload, peaks: peaks_lib.Peaks) -> float:
  """Returns the least seconds of the trace on this device, float32.

  The longer of two times: all products at the peak rate; or all reads of
  memory, which are the weights once per step of full batches, and the cache of
  each sequence once per new token.
  """
  model, rows = workload.model, workload.engine.max_sequences
  products = memory = 0.0
  for job in workload.jobs:
    num_prompt, num_new = len(job.prompt), job.new_tokens
    # The prompt gives the first new token; the last one is not fed back.
    products += flops.span_flops(model, 0, num_prompt, 1)
    products += flops.span_flops(model, num_prompt, num_new - 1, num_new - 1)
    # Keys and values per token. On average half of the new tokens are cached.
    width = 2 * model.num_layers * model.num_kv_heads * model.head_width
    memory += 4 * width * num_new * (num_prompt + num_new / 2)
  steps = sum(job.new_tokens for job in workload.jobs) / rows
  memory += 4 * flops.num_matmul_params(model) * steps
  return max(
    products / peaks.flops_per_s['float32'], memory / peaks.bytes_per_s
  )


def peer_spec(workload: Workload) -> dict[str, Any]:
  """Returns the same batches for `peer_worker`."""
  return {
    'workload': 'serve_llama',
    'model': decode_latency.peer_model(workload.model),
    'batches': [
      {
        'prompts': [job.prompt for job in batch],
        'new_tokens': max(job.new_tokens for job in batch),
      }
      for batch in batches(workload)
    ],
  }


def run(workload: Workload, *, with_peer: bool, rounds: int) -> dict[str, Any]:
  """Measures all ways in turns; returns everything that `report` prints."""
  device = jax.devices()[0]
  peaks = peaks_lib.peaks(device)
  with contextlib.ExitStack() as stack:
    turns: dict[str, timing.Turn] = {}
    if with_peer:
      peer = stack.enter_context(peer_process.PeerProcess(peer_spec(workload)))
      peer_process.check_same_size(peer.info, flops.num_params(workload.model))
      turns['peer'] = peer.turn
    ours = Ours(workload)
    turns.update(
      serial=ours.serial, static=ours.static, continuous=ours.continuous
    )
    ours.serial()  # warm-up: the first run touches memory for the first time
    taken = timing.interleave(turns, rounds)
  wanted = sum(job.new_tokens for job in workload.jobs)
  first = workload.jobs[: workload.num_serial]
  counts = dict.fromkeys(taken, wanted)
  counts['serial'] = sum(job.new_tokens for job in first)
  rates = {
    way: [counts[way] / seconds for seconds in taken[way]] for way in taken
  }
  least = least_seconds(workload, peaks)
  metrics = ours.engine.metrics
  return {
    'benchmark': 'serving_throughput',
    'device': device.device_kind,
    'num_params': flops.num_params(workload.model),
    'num_jobs': len(workload.jobs),
    'new_tokens': wanted,
    'seconds': taken,
    'tokens_per_s': {way: statistics.median(rates[way]) for way in rates},
    'ratios': {
      way: timing.median_ratio(rates['continuous'], rates[way])
      for way in rates
      if way != 'continuous'
    },
    'roofline': least / statistics.median(taken['continuous']),
    'kv_waste': statistics.fmean(ours.waste),
    'contiguous_waste': statistics.fmean(ours.contiguous),
    'final_length_waste': final_length_waste(workload.jobs),
    'padding': metrics.padding_waste,
    'host_share': statistics.median(ours.host_shares),
    'compilations': metrics.value('compilations_after_ready_total'),
    'compile_seconds': ours.engine.compile_seconds,
  }


def report(result: dict[str, Any]) -> str:
  """Returns the table of all ways, and the engine's own figures."""
  rows = [('', 'tokens/s', 'continuous is')]
  for way, rate in result['tokens_per_s'].items():
    ratio = result['ratios'].get(way)
    rows.append((way, f'{rate:.1f}', f'{ratio:.2f} x' if ratio else ''))
  title = (
    f'Serving {result["num_jobs"]} mixed requests:'
    f' {result["num_params"] / 1e6:.1f}M parameters, float32,'
    f' {result["new_tokens"]} new tokens'
  )
  return '\n'.join(
    [
      timing.table(title, rows),
      f'  continuous: {result["roofline"]:.0%} of the roofline;'
      f' host {result["host_share"]:.1%} of a step;'
      f' {result["compilations"]:.0f} compilations after ready'
      f' ({result["compile_seconds"]:.0f} s before)',
      f'  KV waste {result["kv_waste"]:.1%}; contiguous rows of the whole'
      f' context {result["contiguous_waste"]:.1%}, of the final length'
      f' {result["final_length_waste"]:.1%}; padding rows, all ways together'
      f' {result["padding"]:.1%}',
    ]
  )


def main(argv: list[str]) -> None:
  """Runs the benchmark."""
  del argv
  host_memory.reuse_freed_memory(one_heap=False)  # as serve.py does
  entry.run(
    lambda args: [
      run(judged(args.jobs), with_peer=args.peer, rounds=args.rounds)
    ],
    report,
  )


if __name__ == '__main__':
  entry.define_flags(rounds=2, has_peer=True)
  flags.DEFINE_integer('jobs', 96, 'Requests in the trace.', 1)
  app.run(main)
