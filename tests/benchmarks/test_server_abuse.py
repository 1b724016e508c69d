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
  assert 'health_ms' in server_abuse.report(result)


def test_a_server_that_ends_is_reported(tmp_path):
  args = types.SimpleNamespace(model=tmp_path / 'no', clients=1, seconds=4.0)
  with pytest.raises(ValueError, match='serve.py has ended: '):
    next(server_abuse.measure(args))
