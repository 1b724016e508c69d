"""The decoding rate of a tiny model, and the bytes that a step reads."""

import dataclasses

import jax.numpy as jnp
import pytest

from benchmarks import decode_rate
from tests.helpers import tiny_models


@pytest.mark.slow
def test_a_side_answers_all_requests_and_knows_its_bytes():
  model = tiny_models.llama_like(
    num_layers=1, max_length=256, vocab_size=301, scan_layers=False
  )
  side = decode_rate.Side(model, 2, new_tokens=9, dtype=jnp.float32)
  assert side.tokens_per_s() > 0
  value = side.engine.metrics.value
  assert value('sampled_tokens_total') == 2 * 9
  assert side.ready_s > 0
  # 128 + 4.5 tokens of context, keys and values of 2 heads of 6 channels.
  cache = 2 * 132.5 * 2 * 2 * 6
  narrow = dataclasses.replace(model, num_layers=1)
  weights = decode_rate.flops.num_matmul_params(narrow)
  assert side.step_bytes == pytest.approx(4 * (weights + cache))


def test_shapes_are_those_of_the_published_figures():
  one_b = decode_rate.model_of('1b')
  assert decode_rate.flops.num_params(one_b) == 1_235_814_400
  assert decode_rate.model_of('110m').num_layers == 12


def test_the_report_shows_every_batch():
  each = {'tokens_per_s': 1234.5, 'bandwidth': 0.7, 'ready_s': 3.25}
  result = {
    'shape': '1b',
    'device': 'a device',
    'numerics': 'fast',
    'batches': {1: each, 32: each},
  }
  lines = decode_rate.report(result).splitlines()
  assert len(lines) == 4
  assert lines[-1].split() == ['32', '1,234', '70%', '3.2', 's']


@pytest.mark.slow
def test_adapters_are_a_second_side_of_the_same_requests():
  model = tiny_models.llama_like(
    num_layers=1, max_length=256, vocab_size=301, scan_layers=False
  )
  side = decode_rate.Side(
    model, 2, new_tokens=9, dtype=jnp.float32, num_adapters=2, rank=3
  )
  assert side.engine.adapters.digests == ['adapter 0', 'adapter 1']
  assert side.tokens_per_s() > 0
  assert side.engine.metrics.value('sampled_tokens_total') == 2 * 9


def test_the_report_shows_the_share_of_the_rate_that_adapters_leave():
  each = {
    'tokens_per_s': 1234.5,
    'bandwidth': 0.7,
    'ready_s': 3.25,
    'adapted': 0.81,
  }
  result = {
    'shape': '1b',
    'device': 'a device',
    'numerics': 'fast',
    'adapters': 8,
    'rank': 16,
    'batches': {8: each},
  }
  _, head, line = decode_rate.report(result).splitlines()
  assert head.endswith('8 adapters of rank 16')
  assert line.split()[-1] == '81%'
