"""Searches on the real engine: receipts, budgets, preemptions, shared pages."""

import dataclasses

import numpy as np
import pytest

from inference.requests import requests as requests_lib
from inference.sampling import settings as settings_lib
from inference.search import (
  budget as budget_lib,
  drive,
  samples as samples_lib,
  scorers,
)
from inference.search.strategies import sampling, voting
from tests.helpers.serving import reference_engine, searches, simulated_device

_COUNTERS = 'sampled_tokens_total', 'flops_total', 'prefill_tokens_total'


class _Preempting:
  """An engine whose sequences lose their pages at random, if told so."""

  def __init__(self, engine, probability: float):
    self._engine, self._rng = engine, np.random.default_rng(0)
    self._probability, self.num = probability, 0

  def __getattr__(self, name: str):
    return getattr(self._engine, name)

  def step(self):
    for sequence in list(self._engine.manager.running()):
      if sequence.pages and self._rng.random() < self._probability:
        simulated_device.preempt(self._engine.manager, sequence)
        self.num += 1
    return self._engine.step()


@pytest.fixture(scope='module')
def engine():
  return reference_engine.engine(**reference_engine.TIGHT)


def _questions(num: int, **settings):
  rng = np.random.default_rng(3)
  return [
    samples_lib.Question(
      request=requests_lib.Request(
        prompt_ids=tuple(rng.integers(0, 255, int(rng.integers(3, 40)))),
        settings=settings_lib.Settings(
          **{'seed': i, 'max_tokens': 10, **settings}
        ),
      )
    )
    for i in range(num)
  ]


def _counts(engine):
  return np.array([engine.metrics.value(name) for name in _COUNTERS])


@pytest.mark.parametrize('unit', ['tokens', 'flops', 'money'])
@pytest.mark.parametrize('probability', [0.0, 0.1])
def test_budgets_hold_and_receipts_are_the_counters(engine, unit, probability):
  port = _Preempting(engine, probability)
  costs = budget_lib.of_engine(engine, prices=searches.PRICES)
  most = costs.most(30, 25)
  budget = budget_lib.Budget(**{unit: getattr(most, unit)})
  before = _counts(engine)
  receipts = []
  for strategy in (
    sampling.BestOfN(n=4, scorer=scorers.MeanLogprob()),
    voting.SelfConsistency(n=5),
  ):
    found = drive.run(port, strategy, _questions(8), costs=costs, budget=budget)
    receipts += [each.receipt for each in found]
    assert any(each.ended_by == 'budget' for each in found)
  assert all(budget.allows(each.cost) for each in receipts)
  sums = [[x.completion_tokens, x.flops, x.prefill_tokens] for x in receipts]
  np.testing.assert_allclose(
    np.sum(sums, axis=0), _counts(engine) - before, rtol=1e-9
  )
  assert (port.num > 5) == (probability > 0)
  assert all(each.kv_byte_seconds > 0 for each in receipts)


def test_a_search_draws_the_samples_of_a_request_for_several(engine):
  (question,) = _questions(1)
  request = dataclasses.replace(
    question.request,
    settings=dataclasses.replace(question.request.settings, n=3),
  )
  texts = {}
  for _, update in engine.answer([request]):
    if update.completion:
      texts[update.index] = update.completion.token_ids
  strategy = sampling.BestOfN(n=3, scorer=scorers.MeanLogprob())
  costs = budget_lib.of_engine(engine)
  (alone,) = drive.run(
    engine, strategy, [question], costs=costs,
    budget=budget_lib.Budget(tokens=30),
  )  # fmt: skip
  assert texts == {each.number: list(each.ids) for each in alone.samples}


def test_samples_share_the_pages_of_their_prompt(engine):
  """Of a prompt of 36 tokens with pages of 16, one page is copied."""
  engine.manager.clear()
  question = samples_lib.Question(
    request=requests_lib.Request(
      prompt_ids=tuple(range(36)),
      settings=settings_lib.Settings(seed=0, max_tokens=3, ignore_eos=True),
    )
  )
  strategy = sampling.BestOfN(n=4, scorer=scorers.MeanLogprob())
  costs = budget_lib.of_engine(engine)
  (found,) = drive.run(engine, strategy, [question], costs=costs)
  # Once, and the last token of each other sample, whose logits it needs.
  assert found.receipt.prefill_tokens + found.receipt.decode_tokens == (
    36 + 3 + 4 * 2
  )
  assert found.receipt.flops < 4 * costs.sample_flops(36, 3) / 2


def test_a_sequence_ends_before_it_uses_more_flops_than_it_may(engine):
  (question,) = _questions(1, ignore_eos=True)
  costs = budget_lib.of_engine(engine)
  num_prompt = len(question.request.prompt_ids)
  most = costs.sample_flops(num_prompt, 5)
  request = dataclasses.replace(question.request, most_flops=most)
  ((_, last),) = [
    each for each in engine.answer([request]) if each[1].completion
  ]
  list(engine.run())  # the step in flight
  assert last.completion.finish_reason == 'length'
  assert len(last.completion.token_ids) == 5
  assert last.completion.usage.flops == most
