"""Claims about pretraining, with runs whose losses are formulas."""

import pytest

from studies.common import rate_grid
from studies.papers import port, pretraining, registry


def test_the_shift_of_the_best_rate_is_that_of_the_grid(tmp_path, monkeypatch):
  best = {('standard', 64): -8.0, ('mup', 256): -8.2, ('standard', 256): -9.4}

  def measure(grid, models):
    assert set(models) == set(best)
    return {
      (*model, rate): [(rate - best[model] - seed / 10) ** 2 for seed in (0, 1)]
      for model in models
      for rate in grid.rates
    }

  monkeypatch.setattr(rate_grid.Grid, 'measure', measure)
  (claim,) = [c for c in registry.all_claims() if c.name == 'mup_transfer']
  setting = port.Setting(seeds=(0, 1), workdir=tmp_path, inputs={})
  found = pretraining.mup_transfer(claim, setting)
  mup, standard = (found[quantity.name] for quantity in claim.quantities)
  assert mup == pytest.approx([-0.2, -0.2])
  assert standard == pytest.approx([-1.4, -1.4])
  # Beyond the grid, its edge counts.
  best['standard', 256] = -12.0
  _, standard = pretraining.mup_transfer(claim, setting).values()
  assert standard == pytest.approx([-2.0, -2.1])
