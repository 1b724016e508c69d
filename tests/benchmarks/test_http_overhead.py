"""The cost of HTTP beside the bare engine: a short run, and its report."""

import types

import pytest

from benchmarks import http_overhead
from tests.helpers import frozen_dirs


@pytest.mark.slow
def test_both_sides_make_all_tokens(tmp_path):
  frozen_dirs.write(tmp_path / 'model')
  args = types.SimpleNamespace(
    model=str(tmp_path / 'model'),
    sequences=3,
    tokens=9,
    rounds=2,
    replicas=1,
    in_process=True,
  )
  (result,) = http_overhead.measure(args)
  assert result['ratio'] > 0
  assert result['ratio_in_process'] > 0
  assert 0 < result['events_per_token'] <= 1
  assert '3 streams of 9 tokens' in http_overhead.report(result)


def test_a_goal_that_is_missed_is_said():
  result = {
    'sequences': 32,
    'tokens': 128,
    'ratio': 1.2,
    'tokens_per_s': {'bare': 1200.0, 'http': 1000.0},
    'events_per_token': 0.5,
    'goal': 1.15,
    'ratio_in_process': None,
  }
  assert 'bare: 1.20 (goal 1.15: MISSED)' in http_overhead.report(result)
  met = {**result, 'ratio': 1.15}
  assert '(goal 1.15: met)' in http_overhead.report(met)
  speeds = {**result['tokens_per_s'], 'in_process': 850.0}
  beside = {**met, 'ratio_in_process': 1.41, 'tokens_per_s': speeds}
  assert 'process of the server: 1.41, 850 tokens/s' in http_overhead.report(
    beside
  )


def test_too_few_tokens_are_an_error():
  with pytest.raises(ValueError, match='got 8 tokens, expected 9'):
    http_overhead._check(8, 9)
