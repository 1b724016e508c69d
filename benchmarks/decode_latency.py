"""Decoding speed of one request, beside the memory roofline and a peer.

    python -m benchmarks.decode_latency --peer

A Llama-like model of 110M parameters (12 layers, width 768, vocabulary 32000;
float32, random weights) reads a prompt of 32 tokens and generates 128 tokens
greedily, for a single stream.

Columns. `tokens/s` is the new tokens over the time of the whole request, prompt
included; `ms/token` is one decode step. Decoding one stream is bound by memory:
each step reads every weight and all keys and values so far. `bandwidth` is
these bytes per second over the rate at which this device read memory in the
same round. With `--peer`, transformers' `generate` answers the same request,
taking turns with ours. `ours / peer` is the median over rounds of the ratio of
tokens/s; above 1, ours is faster.
"""

import contextlib
import dataclasses
import statistics
import time
from typing import Any

from absl import app
import jax
import numpy as np

from benchmarks.common import entry, random_model, timing
from benchmarks.peer import peer_process
from hardware import peaks
from inference.engine import engine as engine_lib, engine_config
from inference.requests import requests
from inference.sampling import settings
from models import flops, model_config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
  """One stream: its model and its lengths."""

  model: model_config.ModelConfig
  prompt_tokens: int
  new_tokens: int


def llama_110m() -> Request:
  """Returns the request of the published figures."""
  model = model_config.ModelConfig(
    vocab_size=32000,
    num_layers=12,
    model_width=768,
    num_heads=12,
    num_kv_heads=12,
    head_width=64,
    mlp_width=2048,
    max_length=1024,
    tie_embeddings=True,
    scan_layers=False,  # as frozen models are
  )
  return Request(model=model, prompt_tokens=32, new_tokens=128)


def bytes_per_token(request: Request) -> float:
  """Returns the bytes that the average decode step must read, float32.

  These are all weights that multiply the token, and the keys and values of the
  prompt and of half of the new tokens.
  """
  model = request.model
  context = request.prompt_tokens + request.new_tokens / 2
  # Keys and values; all numbers have 4 bytes.
  cache = 2 * model.num_layers * model.num_kv_heads * model.head_width * context
  return 4.0 * (flops.num_matmul_params(model) + cache)


def prompt_ids(request: Request) -> list[int]:
  """Returns the prompt, the same for both sides."""
  rng = np.random.default_rng(0)
  size = request.prompt_tokens
  return rng.integers(0, request.model.vocab_size, size).tolist()


def our_turn(request: Request) -> tuple[timing.Turn, list[float]]:
  """Returns a turn of our engine, warmed up, and its first-token times.

  The turn answers the request, and appends the seconds to its first token to
  the list.
  """
  engine = engine_lib.Engine(
    request.model,
    random_model.params(request.model),
    tokenizer=random_model.Tokenizer(request.model.vocab_size),
    weights_digest='',
    # Every turn repeats the prompt: a prefix cache would find it.
    config=engine_config.EngineConfig(max_sequences=1, prefix_cache=False),
  )
  asked = requests.Request(
    prompt_ids=tuple(prompt_ids(request)),
    settings=settings.Settings(
      temperature=0.0, max_tokens=request.new_tokens, ignore_eos=True
    ),
  )
  first_token_seconds: list[float] = []

  def turn() -> float:
    start = time.perf_counter()
    engine.submit(asked)
    for count, _ in enumerate(engine.run()):
      if not count:
        first_token_seconds.append(time.perf_counter() - start)
    return time.perf_counter() - start

  turn()
  first_token_seconds.clear()
  return turn, first_token_seconds


def peer_spec(request: Request) -> dict[str, Any]:
  """Returns the same request for `peer_worker`."""
  return {
    'workload': 'generate_llama',
    'prompt': prompt_ids(request),
    'new_tokens': request.new_tokens,
    'model': peer_model(request.model),
  }


def peer_model(model: model_config.ModelConfig) -> dict[str, Any]:
  """Returns the fields of transformers' LlamaConfig for the same model."""
  return {
    'vocab_size': model.vocab_size,
    'num_hidden_layers': model.num_layers,
    'hidden_size': model.model_width,
    'num_attention_heads': model.num_heads,
    'num_key_value_heads': model.num_kv_heads,
    'head_dim': model.head_width,
    'intermediate_size': model.mlp_width,
    'max_position_embeddings': model.max_length,
    'rms_norm_eps': model.norm_epsilon,
    'tie_word_embeddings': model.tie_embeddings,
  }


def run(
  request: Request, *, with_peer: bool, rounds: int, megabytes: int = 128
) -> dict[str, Any]:
  """Measures the request; returns everything that `report` prints."""
  device = jax.devices()[0]
  num_params = flops.num_params(request.model)

  def read_turn() -> float:
    rate = peaks.read_bytes_per_s(
      megabytes=megabytes, seconds=0.3, device=device
    )
    return 1 / rate  # seconds per byte

  turns: dict[str, timing.Turn] = {'roofline': read_turn}
  result: dict[str, Any] = {}
  with contextlib.ExitStack() as stack:
    if with_peer:
      peer = stack.enter_context(peer_process.PeerProcess(peer_spec(request)))
      turns['peer'] = peer.turn
      result['peer_info'] = peer.info
      peer_process.check_same_size(peer.info, num_params)
    turns['ours'], first_token_seconds = our_turn(request)
    taken = timing.interleave(turns, rounds)
  per_byte = taken.pop('roofline')
  for side, seconds in taken.items():
    tokens_per_s = [request.new_tokens / s for s in seconds]
    bandwidth = [
      t * bytes_per_token(request) * p
      for t, p in zip(tokens_per_s, per_byte, strict=True)
    ]
    result[side] = {
      'tokens_per_s': statistics.median(tokens_per_s),
      'bandwidth': statistics.median(bandwidth),
      'seconds_per_turn': seconds,
    }
  first = statistics.median(first_token_seconds)
  rest = statistics.median(taken['ours']) - first
  result['ours']['first_token_s'] = first
  result['ours']['s_per_token'] = rest / (request.new_tokens - 1)
  if with_peer:
    result['ratio'] = timing.median_ratio(taken['peer'], taken['ours'])
  return {
    'benchmark': 'decode_latency',
    'device': device.device_kind,
    'num_params': num_params,
    'prompt_tokens': request.prompt_tokens,
    'new_tokens': request.new_tokens,
    'roofline_bytes_per_s': 1 / statistics.median(per_byte),
    'bytes_per_token': bytes_per_token(request),
    **result,
  }


def report(result: dict[str, Any]) -> str:
  """Returns the table, and the times of our side's request."""
  rows = [('', 'tokens/s', 'bandwidth')]
  for side in ('ours', 'peer'):
    if side in result:
      figures = result[side]
      rows.append(
        (side, f'{figures["tokens_per_s"]:.1f}', f'{figures["bandwidth"]:.1%}')
      )
  title = (
    f'Decoding, one stream: {result["num_params"] / 1e6:.1f}M parameters,'
    f' {result["prompt_tokens"]} + {result["new_tokens"]} tokens, float32;'
    f' roofline {result["roofline_bytes_per_s"] / 1e9:.1f} GB/s'
  )
  ours = result['ours']
  lines = [
    timing.table(title, rows),
    f'  ours: first token after {1e3 * ours["first_token_s"]:.0f} ms, then'
    f' {1e3 * ours["s_per_token"]:.1f} ms/token',
  ]
  if 'ratio' in result:
    lines.append(f'  ours / peer: {result["ratio"]:.2f}')
  return '\n'.join(lines)


def main(argv: list[str]) -> None:
  """Runs the benchmark."""
  del argv
  entry.run(
    lambda args: [run(llama_110m(), with_peer=args.peer, rounds=args.rounds)],
    report,
  )


if __name__ == '__main__':
  entry.define_flags(rounds=5, has_peer=True)
  app.run(main)
