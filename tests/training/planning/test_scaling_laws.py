"""The published fits, against the figures their authors give."""

import pytest

from training.planning import scaling_laws

# Chinchilla's own budget, arXiv:2203.15556 table 3: 5.76e23 FLOPs.
BUDGET = 5.76e23


@pytest.mark.parametrize(
  ('fit', 'tokens_per_param'),
  # To the three digits that the parameters of the fits allow.
  [(scaling_laws.BESIROGLU, 18.4), (scaling_laws.HOFFMANN, 92.6)],
)
def test_tokens_per_parameter_at_the_budget_of_chinchilla(
  fit, tokens_per_param
):
  num_params, num_tokens = fit.optimum(BUDGET)
  assert num_tokens / num_params == pytest.approx(tokens_per_param, rel=3e-3)
  assert 6 * num_params * num_tokens == pytest.approx(BUDGET)


@pytest.mark.parametrize('fit', scaling_laws.FITS)
@pytest.mark.parametrize('flops', [1e18, 1e25])
def test_nothing_beside_the_optimum_is_better(fit, flops):
  num_params, num_tokens = fit.optimum(flops)
  best = fit.loss(num_params, num_tokens)
  for factor in (0.8, 0.99, 1.01, 1.25):
    assert fit.loss(num_params * factor, num_tokens / factor) > best
