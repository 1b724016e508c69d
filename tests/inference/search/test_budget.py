"""No strategy exceeds its budget, in 10,000 random requests."""

import numpy as np
import pytest

from inference.requests import requests
from inference.sampling import settings
from inference.search import budget as budget_lib, samples, scorers
from inference.search.strategies import (
  forcing,
  revision,
  sampling,
  trees,
  voting,
)
from tests.helpers import tiny_models
from tests.helpers.serving import scripted_engine, searches

_NUM_QUESTIONS = 10_000
_TOKENIZER = tiny_models.byte_tokenizer()
_IS_FOUR = scorers.Called(lambda question, text: float(text.endswith('4')))


class _Costly(scorers.Called):
  """A scorer that reads each answer with a model of 100 FLOPs per token."""

  def cost(self, num_tokens: int) -> budget_lib.Cost:
    return budget_lib.Cost(flops=100.0 * num_tokens, money=1e-6 * num_tokens)

  def num_read(self, num_tokens: int) -> int:
    return num_tokens


def _asked(
  question: samples.Question, sample: samples.Sample
) -> requests.Request:
  return requests.Request(
    prompt_ids=(*question.request.prompt_ids, *sample.ids, 7),
    settings=settings.Settings(max_tokens=1, seed=1),
    target=5,
  )


_COSTLY = _Costly(lambda question, text: float(len(text)))
_REQUESTED = samples.Requested(
  request=_asked,
  read=lambda completion: completion.num_prompt_tokens % 5 / 5,
  costs=budget_lib.Costs(
    tiny_models.llama_like(vocab_size=261), prices=searches.PRICES
  ),
  num_more=1,
)
STRATEGIES = (
  sampling.SampleOnce(),
  sampling.BestOfN(n=4, scorer=_COSTLY),
  sampling.BestOfN(n=3, scorer=scorers.MeanLogprob()),
  sampling.BestOfN(n=4, scorer=_REQUESTED),
  voting.SelfConsistency(n=5, scorer=_REQUESTED),
  trees.BeamSearch(beams=2, width=2, scorer=_REQUESTED, step_end=' '),
  voting.SelfConsistency(n=5),
  voting.SelfConsistency(n=6, scorer=_IS_FOUR, at_once=2),
  voting.SelfConsistency(n=9, confidence=0.8),
  trees.BeamSearch(beams=2, width=2, scorer=_COSTLY, step_end=' '),
  trees.BeamSearch(
    beams=1, width=3, scorer=_IS_FOUR, step_end=' ', lookahead=2
  ),
  revision.SequentialRevision(n=3, tokenizer=_TOKENIZER, words='no: '),
  forcing.BudgetForcing(
    tokenizer=_TOKENIZER, most_reasoning=6, num_waits=2, closing='4'
  ),
)


def _says(prompt_ids, number, rng) -> str:
  return f'{"so " * int(rng.integers(0, 5))}\n{rng.integers(4, 6)}'


def _budget(unit: str, rng, costs) -> budget_lib.Budget:
  """Draws a budget between less than a token and more than all samples."""
  tokens = int(np.exp(rng.uniform(0, np.log(80))))
  most = costs.most(8, tokens)
  value = {
    'tokens': tokens,
    'flops': most.flops * rng.uniform(0.5, 1.5),
    'money': most.money * rng.uniform(0.5, 1.5),
    'seconds': rng.uniform(0.5, 20),
  }[unit]
  return budget_lib.Budget(**{unit: value})


@pytest.mark.slow
def test_no_strategy_exceeds_its_budget():
  rng = np.random.default_rng(11)
  batch, num_cut, num_preempted = 25, 0, 0
  for number in range(_NUM_QUESTIONS // batch):
    unit = budget_lib.UNITS[number % len(budget_lib.UNITS)]
    engine = scripted_engine.ScriptedEngine(
      _says,
      seed=number,
      max_sequences=int(rng.integers(1, 12)),
      preemption=float(rng.choice([0.0, 0.2])),
      most_tokens=int(rng.choice([1, 4])),
    )
    costs = budget_lib.Costs(engine.model_config, prices=searches.PRICES)
    budget = _budget(unit, rng, costs)
    questions = [
      searches.question('x' * int(rng.integers(1, 12)), max_tokens=12, seed=i)
      for i in range(batch)
    ]
    strategy = STRATEGIES[int(rng.integers(len(STRATEGIES)))]
    found = searches.run(strategy, engine, questions, budget=budget)
    receipts = [each.receipt for each in found]
    for each in receipts:
      # Sums of floats round in another order than the bound.
      flops, money = each.flops * (1 - 1e-12), each.money * (1 - 1e-12)
      cost = budget_lib.Cost(
        tokens=each.completion_tokens, flops=flops, money=money
      )
      assert budget.allows(cost), (strategy, budget, each)
      # All steps take as long, so the end of each is foreseen but the first.
      if budget.seconds and budget.seconds >= engine.longest:
        assert each.seconds <= budget.seconds, (strategy, budget, each)
    assert sum(x.completion_tokens for x in receipts) == engine.sampled
    is_asked = getattr(strategy, 'scorer', None) is _REQUESTED
    spent = sum(x.flops - x.score_flops * (not is_asked) for x in receipts)
    assert spent == pytest.approx(engine.flops, rel=1e-12)
    num_cut += sum(each.ended_by == 'budget' for each in found)
    num_preempted += engine.preemptions
  # The budgets matter, and so do preemptions.
  assert 0.2 < num_cut / _NUM_QUESTIONS < 0.95
  assert num_preempted > 1000


def test_seconds_are_exceeded_by_a_part_of_one_slow_step_at_most():
  for seed in range(40):
    engine = scripted_engine.ScriptedEngine(
      _says, seed=seed, step_seconds=lambda rng: float(rng.exponential(1.0))
    )
    budget = budget_lib.Budget(seconds=5.0)
    (found,) = searches.run(voting.SelfConsistency(n=9), engine, budget=budget)
    assert found.receipt.seconds <= 5.0 + engine.longest


def test_the_deadline_leaves_what_was_said_so_far():
  engine = searches.saying('one two three four five')
  budget = budget_lib.Budget(seconds=7.5)
  (found,) = searches.run(sampling.SampleOnce(), engine, budget=budget)
  assert found.text == 'one two'  # 7 steps of a second, a token each
  assert found.ended_by == 'budget'
  assert not found.chosen.is_whole
