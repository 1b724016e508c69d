"""The abuse of a real server: short, with few clients of each kind."""

import types

import pytest

from benchmarks import server_abuse
from tests.helpers import frozen_dirs


@pytest.mark.slow
def test_streams_end_while_others_abuse_the_server(tmp_path, monkeypatch):
  frozen_dirs.write(tmp_path / 'model')
  few = {name: (2, do) for name, (_, do) in server_abuse.ABUSES.items()}
  monkeypatch.setattr(server_abuse, 'ABUSES', few)
  args = types.SimpleNamespace(model=tmp_path / 'model', clients=4, seconds=4.0)
  (result,) = server_abuse.measure(args)
  statuses = result['statuses']
  assert statuses['stream'].keys() == {200}
  assert statuses['large body'].keys() == {413}
  assert statuses['long prompt'].keys() == {400}
  assert statuses['hostile JSON'].keys() <= {400, 413}
  assert result['health_ms']['p50'] > 0
  assert result['control_ms']['p50'] > 0
  assert statuses['many headers'].keys() == {400}
  assert statuses['short chunks'].keys() == {400}
  assert statuses['smuggler'].keys() == {400}
  text = server_abuse.report(result)
  assert 'health_ms' in text
  assert text.count('goal') == 2


def test_a_goal_that_is_missed_is_said():
  idle = {'p50': 1.0, 'p99': 2.0, 'max': 3.0}
  result = {
    'health_idle_ms': idle,
    'health_ms': {**idle, 'p99': 102.5},
    'control_ms': idle,
    'memory_mib': {'after_a_quarter': 100.0, 'at_the_end': 101.9},
    'statuses': {},
  }
  text = server_abuse.report(result)
  assert 'above idle: 100.5 (MISSED)' in text
  assert 'quarter: 1.019 (met)' in text


def test_a_server_that_ends_is_reported(tmp_path):
  args = types.SimpleNamespace(model=tmp_path / 'no', clients=1, seconds=4.0)
  with pytest.raises(ValueError, match='serve.py has ended: '):
    next(server_abuse.measure(args))
