"""Routers beside a small engine: features of a prefill, efforts, budgets."""

import numpy as np
import pytest

from frozen import effort_predictor
from inference import model_port
from inference.search.routing import efforts, features, router as router_lib
from tests.helpers.serving import effort_predictors, reference_engine

PROMPTS = ((1, 2, 3), (9, 8, 7, 6, 5, 4), (40, 41))


@pytest.fixture(scope='module')
def engine():
  return reference_engine.engine()


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_router_spends_where_effort_helps_and_keeps_its_budget(
  engine, tmp_path
):
  path = tmp_path / 'effort.json'
  predictor = effort_predictors.of_length(
    engine.model_config.model_width, 'd', least=4, flops=(1.0, 10.0)
  )
  effort_predictor.save(path, predictor)
  router = router_lib.Router.open(path, 'd', budget=4.0)
  requests = [router.request(each) for each in PROMPTS]
  prefills = [each for (each,) in model_port.answer_all(engine, requests)]
  chosen = []
  for i in range(60):
    decision = router.decide(prefills[i % 3])
    chosen.append(decision.name)
    router.paid(decision.flops[decision.name])
  low, high = effort_predictors.EFFORTS
  assert {*chosen[::3], *chosen[2::3]} == {low}
  assert high in chosen[1::3]
  assert router.pace.spent <= 4.0 * 60 * 1.01
  assert router.decide(prefills[1], most=5.0).name == low
  with pytest.raises(ValueError, match=r'budget: got 0\.5 for a request'):
    router.decide(prefills[1], most=0.5)
  # Without a mean budget, the most probable effort.
  free = router_lib.Router.open(path, 'd')
  assert [free.decide(each).name for each in prefills] == [low, high, low]
  assert free.decide(prefills[1], most=5.0).name == low
  with pytest.raises(ValueError, match="expected the one of 'other'"):
    router_lib.Router.open(path, 'other', budget=4.0)


def test_an_effort_is_a_strategy_or_a_limit_of_reasoning_or_both():
  both = efforts.parsed('best_of_n:4+reasoning:128')
  assert (both.spec.name, both.spec.n, both.most_reasoning) == (
    'best_of_n',
    4,
    128,
  )
  assert efforts.parsed('reasoning:0').spec.name == 'once'
  assert efforts.parsed('once').most_reasoning is None
  scored = efforts.parsed('beam:8:column_sum+reasoning:9').spec
  assert (scored.name, scored.n, scored.scorer) == ('beam', 8, 'column_sum')
  for name in (
    'low', 'reasoning:x', 'once+once', 'beam:3', 'wait:2', '', 'once:self',
    'best_of_n:4:', 'best_of_n:self', 'best_of_n:4:self:self',
    'self_consistency:4:likelihood', 'wait:2:self+reasoning:9',
  ):  # fmt: skip
    with pytest.raises(ValueError, match='effort: got'):
      efforts.parsed(name)
