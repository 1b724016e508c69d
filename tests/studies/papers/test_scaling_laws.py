"""Claims about scaling laws that runs measure: from a law that is known."""

import numpy as np
import pytest

from studies.papers import port, registry, scaling_laws
from studies.scaling import isoflop, parametric, points as points_lib
from training.planning import scaling_laws as laws

_LAW = laws.Fit(
  source='a test',
  floor=1.2,
  params_scale=40.0,
  tokens_scale=90.0,
  params_exponent=0.4,
  tokens_exponent=0.36,
)


def _measured(name, monkeypatch, tmp_path, noise=0.0):
  """Returns the values of a claim whose runs have the losses of a law."""

  def measure(grid, workdir):
    assert workdir == tmp_path
    runs = [run for of_size in grid.runs.values() for run in of_size]
    params = np.array([float(run.num_params) for run in runs])
    tokens = np.array([float(run.num_tokens) for run in runs])
    budgets = np.array([run.budget for run in runs])
    points = points_lib.make(params, tokens, np.ones(len(runs)), budgets)
    losses = parametric.predict(_LAW, points)
    losses += noise * np.random.default_rng(0).normal(size=len(runs))
    return points_lib.make(params, tokens, losses, budgets)

  monkeypatch.setattr(isoflop, 'measure', measure)
  (claim,) = registry.chosen([name], '')
  setting = port.Setting(seeds=(), workdir=tmp_path, inputs={})
  return claim, getattr(scaling_laws, name)(claim, setting)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['isoflop_bytes', 'isoflop_bytes_large'])
def test_exponents_are_those_of_the_law_behind_the_losses(
  name, monkeypatch, tmp_path
):
  claim, measured = _measured(name, monkeypatch, tmp_path, noise=1e-3)
  parabolas, law, bias = (measured[each.name] for each in claim.quantities)
  exact = parametric.quantities(_LAW)['a']
  assert isinstance(parabolas, port.Interval)
  assert isinstance(law, port.Interval)
  assert abs(law.value - exact) < 0.03
  for each in (parabolas, law):
    assert each.low < each.value < each.high
  assert isinstance(bias, float)
  assert abs(parabolas.value - exact - bias) < 0.15
  kept = points_lib.read(str(tmp_path / isoflop.POINTS))
  assert len(kept) == {'isoflop_bytes': 25, 'isoflop_bytes_large': 19}[name]


def test_a_grid_that_a_signal_stops_is_no_result(monkeypatch, tmp_path):
  (claim,) = registry.chosen(['isoflop_bytes'], '')
  monkeypatch.setattr(isoflop, 'measure', lambda grid, workdir: None)
  setting = port.Setting(seeds=(), workdir=tmp_path, inputs={})
  with pytest.raises(port.Stopped):
    scaling_laws.isoflop_bytes(claim, setting)
