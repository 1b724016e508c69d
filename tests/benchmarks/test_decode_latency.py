"""The decoding benchmark at a tiny shape; no assertion on speed."""

import pytest

from benchmarks import decode_latency
from models import flops
from tests.helpers import tiny_models


def _tiny():
  return decode_latency.Request(
    model=tiny_models.llama_like(), prompt_tokens=5, new_tokens=4
  )


@pytest.fixture(autouse=True)
def quick_roofline(monkeypatch):
  monkeypatch.setattr(
    decode_latency.peaks, 'read_bytes_per_s', lambda **_: 1e10
  )


def test_the_judged_model_has_110_million_parameters():
  request = decode_latency.llama_110m()
  assert flops.num_params(request.model) == pytest.approx(110e6, rel=0.01)
  assert (request.prompt_tokens, request.new_tokens) == (32, 128)


def test_bytes_per_token_counts_weights_and_cache():
  # By hand, for width 24, 4 query and 2 kv heads of 6, mlp 40, 2 layers,
  # vocabulary 61, at a context of 5 + 4 / 2 = 7.
  attention = 24 * 24 + 2 * 24 * 12 + 24 * 24
  weights = 2 * (attention + 3 * 24 * 40) + 61 * 24
  cache = 2 * 2 * 12 * 7
  assert decode_latency.bytes_per_token(_tiny()) == 4 * (weights + cache)


@pytest.mark.slow
def test_result_is_consistent():
  result = decode_latency.run(_tiny(), with_peer=False, rounds=2)
  ours = result['ours']
  assert len(ours['seconds_per_turn']) == 2
  total = ours['first_token_s'] + 3 * ours['s_per_token']
  # Medians of two rounds are means, so they add up.
  assert total == pytest.approx(sum(ours['seconds_per_turn']) / 2)
  read = ours['tokens_per_s'] * result['bytes_per_token']
  assert ours['bandwidth'] == pytest.approx(read / 1e10)
  assert 'ratio' not in result


def test_report_names_both_sides_and_the_ratio():
  text = decode_latency.report(
    {
      'num_params': 110_000_000,
      'prompt_tokens': 32,
      'new_tokens': 128,
      'roofline_bytes_per_s': 3e10,
      'ours': {
        'tokens_per_s': 32.0,
        'bandwidth': 0.5,
        'first_token_s': 0.1,
        's_per_token': 0.0305,
      },
      'peer': {'tokens_per_s': 20.0, 'bandwidth': 0.3},
      'ratio': 1.6,
    }
  )
  lines = [line.split() for line in text.splitlines()]
  assert '110.0M parameters, 32 + 128 tokens' in text
  assert 'roofline 30.0 GB/s' in text
  assert lines[2] == ['ours', '32.0', '50.0%']
  assert lines[3] == ['peer', '20.0', '30.0%']
  assert 'first token after 100 ms, then 30.5 ms/token' in text
  assert lines[5] == ['ours', '/', 'peer:', '1.60']


@pytest.mark.slow
def test_peer_answers_the_same_request_in_turns():
  pytest.importorskip('torch', reason='requirements-peer.txt not installed')
  pytest.importorskip('transformers', reason='requirements-peer.txt')
  result = decode_latency.run(_tiny(), with_peer=True, rounds=2)
  assert len(result['peer']['seconds_per_turn']) == 2
  assert result['peer_info']['num_params'] == result['num_params']
  assert result['ratio'] > 0
