"""Routers beside a small engine: features of a prefill, efforts, budgets."""

import jax
import numpy as np
import pytest

from frozen import effort_predictor
from inference.search.routing import features, router as router_lib
from models import effort_predictor as network
from tests.helpers.serving import reference_engine

PROMPTS = ((1, 2, 3), (9, 8, 7, 6, 5, 4), (40, 41))


@pytest.fixture(scope='module')
def engine():
  return reference_engine.engine()


def _predictor(num_features: int) -> effort_predictor.Predictor:
  """Says that effort helps longer prompts, at FLOPs of 1 and 10."""
  params = network.init(jax.random.key(0), num_features, 1, 2)
  inner_FH = np.zeros((num_features, 1), np.float32)
  inner_FH[-1] = 1.0  # the log of the length
  params |= {
    'inner_FH': inner_FH,
    'inner_H': np.array([-1.2], np.float32),
    'outer_HE': np.array([[0.0, 6.0]], np.float32),
    'least_cost_E': np.array([1.0, 10.0], np.float32),
  }
  return effort_predictor.Predictor(
    params={name: np.asarray(x) for name, x in params.items()},
    efforts=('low', 'high'),
    weights_digest='d',
  )


def test_features_are_of_the_prompt_alone(engine):
  together_BF = features.of_prompts(engine, PROMPTS)
  width = engine.model_config.model_width
  assert together_BF.shape == (3, width + features.NUM_SCALARS)
  alone_BF = features.of_prompts(engine, PROMPTS[1:2])
  # float32 of other shapes: the bound of the engine's fast numerics.
  np.testing.assert_allclose(alone_BF[0], together_BF[1], atol=1e-4)
  np.testing.assert_allclose(np.exp(together_BF[:, -1]), [3, 6, 2])
  assert np.all(together_BF[:, -3] > 0)  # entropy
  mean_BF = features.of_prompts(engine, PROMPTS, pooling='mean')
  assert not np.allclose(mean_BF[1, :width], together_BF[1, :width], atol=1e-2)


def test_the_entropy_of_listed_outcomes_is_exact_and_else_a_bound():
  probs_N = np.array([0.5, 0.2, 0.2, 0.1])
  whole = -np.sum(probs_N * np.log(probs_N))
  assert features.entropy(np.log(probs_N)) == pytest.approx(whole)
  rest = -0.3 * np.log(0.3) - np.sum(probs_N[:2] * np.log(probs_N[:2]))
  assert features.entropy(np.log(probs_N[:2])) == pytest.approx(rest)
  assert rest < whole


def test_a_router_spends_where_effort_helps_and_keeps_its_budget(
  engine, tmp_path
):
  num_features = engine.model_config.model_width + features.NUM_SCALARS
  path = tmp_path / 'effort.json'
  effort_predictor.save(path, _predictor(num_features))
  router = router_lib.Router.open(path, engine, 'd', budget=4.0)
  chosen = []
  for i in range(60):
    decision = router.decide(PROMPTS[i % 3])
    chosen.append(decision.effort)
    router.paid(decision.flops[decision.effort])
  assert {*chosen[::3], *chosen[2::3]} == {'low'}
  assert 'high' in chosen[1::3]
  assert router.pace.spent <= 4.0 * 60 * 1.01
  assert router.decide(PROMPTS[1], most=5.0).effort == 'low'
  with pytest.raises(ValueError, match=r'budget: got 0\.5 for a request'):
    router.decide(PROMPTS[1], most=0.5)
  with pytest.raises(ValueError, match="expected the one of 'other'"):
    router_lib.Router.open(path, engine, 'other', budget=4.0)
