"""The abuse of a real server: short, with few clients of each kind."""

import contextlib
import sqlite3
import types

import pytest

from benchmarks import server_abuse
from tests.helpers import frozen_dirs


@pytest.mark.slow
def test_streams_end_while_others_abuse_the_server(tmp_path, monkeypatch):
  frozen_dirs.write(tmp_path / 'model')
  few = {name: (2, do) for name, (_, do) in server_abuse.ABUSES.items()}
  monkeypatch.setattr(server_abuse, 'ABUSES', few)
  args = types.SimpleNamespace(
    model=tmp_path / 'model', clients=4, seconds=4.0, replicas=0
  )
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
  assert result['tokens'] > 0
  assert result['ledger_rows'] >= statuses['stream'][200]
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
    'tokens': 1,
    'ledger_rows': 1,
  }
  text = server_abuse.report(result)
  assert 'above idle: 100.5 (MISSED)' in text
  assert 'quarter: 1.019 (met)' in text


@pytest.mark.parametrize(
  ('rows', 'says'),
  [
    ([(3, 'finished')], 'got 3 completion tokens and 0 open'),
    ([(5, 'finished'), (0, None)], 'got 5 completion tokens and 1 open'),
  ],
)
def test_a_ledger_that_does_not_add_up_is_a_failure(tmp_path, rows, says):
  with contextlib.closing(sqlite3.connect(tmp_path / 'db')) as connection:
    connection.execute('CREATE TABLE ledger (completion_tokens, outcome)')
    connection.executemany('INSERT INTO ledger VALUES (?, ?)', rows)
    connection.commit()
  with pytest.raises(ValueError, match=says):
    server_abuse._check_ledger(tmp_path / 'db', 5)


@pytest.mark.slow
def test_a_server_that_ends_is_reported(tmp_path):
  args = types.SimpleNamespace(
    model=tmp_path / 'no', clients=1, seconds=4.0, replicas=0
  )
  with pytest.raises(ValueError, match='serve.py has ended: '):
    next(server_abuse.measure(args))
