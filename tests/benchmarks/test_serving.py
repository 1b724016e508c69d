"""The serving benchmarks at a tiny shape; no assertion on speed."""

import dataclasses

import pytest

from benchmarks import serving_latency, serving_throughput
from hardware import peaks
from inference.engine import engine_config
from tests.helpers import tiny_models

_ENGINE = engine_config.EngineConfig(
  max_sequences=4,
  chunk_tokens=8,
  max_chunks=2,
  max_mixed_chunks=1,
  num_pages=64,
  decode_shapes=(4,),
)
_PEAKS = peaks.Peaks(
  flops_per_s={'float32': 1e12}, bytes_per_s=1e10, source='made up'
)


def _workload():
  model = tiny_models.llama_like(
    num_layers=1, scan_layers=False, max_length=128
  )
  jobs = serving_throughput.mixed_jobs(6, model.vocab_size, least=3, most=12)
  return serving_throughput.Workload(
    model=model,
    jobs=jobs,
    num_serial=2,
    engine=dataclasses.replace(_ENGINE, prefix_cache=False),
  )


@pytest.fixture(autouse=True)
def quick_roofline(monkeypatch):
  monkeypatch.setattr(peaks, 'peaks', lambda device: _PEAKS)


def test_lengths_are_mixed_and_within_bounds():
  jobs = serving_throughput.mixed_jobs(200, 61, least=16, most=256)
  for lengths in (
    [len(job.prompt) for job in jobs],
    [job.new_tokens for job in jobs],
  ):
    assert min(lengths) >= 16
    assert max(lengths) <= 256
    # Log-uniform: as many below 64, the geometric mean, as above.
    assert 70 <= sum(length < 64 for length in lengths) <= 130
  assert jobs == serving_throughput.mixed_jobs(200, 61, least=16, most=256)


@pytest.mark.slow
def test_every_way_serves_the_trace():
  result = serving_throughput.run(_workload(), with_peer=False, rounds=1)
  assert set(result['tokens_per_s']) == {'serial', 'static', 'continuous'}
  assert set(result['ratios']) == {'serial', 'static'}
  assert result['compilations'] == 0
  assert 0 < result['kv_waste'] < result['contiguous_waste'] < 1
  assert 0 < result['host_share'] < 1
  text = serving_throughput.report(result)
  assert 'Serving 6 mixed requests' in text
  assert '0 compilations after ready' in text


def test_the_least_time_is_bound_by_reading_or_by_multiplying():
  workload = _workload()
  least = serving_throughput.least_seconds(workload, _PEAKS)
  assert least > 0
  fast = dataclasses.replace(_PEAKS, bytes_per_s=1e15)
  slow = dataclasses.replace(fast, flops_per_s={'float32': 1e11})
  products = serving_throughput.least_seconds(workload, fast)
  assert least > products
  assert serving_throughput.least_seconds(workload, slow) == pytest.approx(
    10 * products
  )


def test_rows_of_the_final_length_are_half_empty_where_nothing_is_prompt():
  job = serving_throughput.Job((), 10)
  assert serving_throughput.final_length_waste([job]) == 0.5
  job = serving_throughput.Job((5,) * 10, 10)
  assert serving_throughput.final_length_waste([job]) == 0.25


@pytest.mark.slow
def test_prefixes_and_arrivals_are_measured():
  model = tiny_models.llama_like(
    num_layers=1, scan_layers=False, max_length=256
  )
  scenario = serving_latency.Scenario(
    model=model,
    engine=_ENGINE,
    prefix_tokens=100,
    shared_tokens=90,
    num_decoding=3,
    context_tokens=5,
    settled_steps=4,
    arriving_tokens=60,
  )
  result = serving_latency.run(scenario, rounds=1)
  assert result['prefix_ratio'] > 0
  assert set(result['stalls']) == {'bounded', 'whole'}
  assert result['compilations'] == 0
  text = serving_latency.report(result)
  assert '90% of 100 tokens seen before' in text
  assert '60 tokens arrives while 3 decode' in text


@pytest.mark.slow
def test_the_peer_serves_the_same_batches():
  pytest.importorskip('torch', reason='requirements-peer.txt not installed')
  pytest.importorskip('transformers', reason='requirements-peer.txt')
  result = serving_throughput.run(_workload(), with_peer=True, rounds=1)
  assert result['ratios']['peer'] > 0
