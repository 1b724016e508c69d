"""Searches over a scripted engine: seeds, budgets, receipts, one by one."""

import dataclasses

import numpy as np
import pytest

from inference.search import budget as budget_lib, scorers
from inference.search.strategies import sampling, voting
from tests.helpers.serving import scripted_engine, searches


def _says(prompt_ids, number: int, rng: np.random.Generator) -> str:
  """Answers 4 with probability .5, else 5 or 6, after some words."""
  words = 'so ' * int(rng.integers(0, 12))
  return f'{words}#### {rng.choice(["4", "5", "6"], p=[0.5, 0.3, 0.2])}'


def _run(strategy, engine=None, *, questions=None, **fields):
  engine = engine or scripted_engine.ScriptedEngine(_says)
  return searches.run(strategy, engine, questions, **fields)


_IS_FOUR = scorers.Called(lambda question, text: float(text.endswith('4')))


def test_a_sample_is_that_of_its_number_however_the_budget_lets_it_start():
  together, *_ = _run(sampling.BestOfN(n=8, scorer=_IS_FOUR))
  # Room for one sample at a time.
  alone, *_ = _run(
    sampling.BestOfN(n=8, scorer=_IS_FOUR),
    scripted_engine.ScriptedEngine(_says, max_sequences=1),
  )
  once, *_ = _run(sampling.SampleOnce())
  texts = {each.number: each.text for each in together.samples}
  assert texts == {each.number: each.text for each in alone.samples}
  assert len(set(texts.values())) > 1
  assert once.text == texts[0]


def test_best_of_n_keeps_the_best_whole_answer():
  (found,) = _run(sampling.BestOfN(n=8, scorer=_IS_FOUR))
  assert found.text.endswith('#### 4')
  assert found.ended_by == 'done'
  (by_model,) = _run(sampling.BestOfN(n=8, scorer=scorers.MeanLogprob()))
  means = {each.number: each.mean_logprob for each in by_model.samples}
  assert by_model.chosen.number == max(means, key=means.get)


def test_a_vote_stops_as_soon_as_its_winner_is_certain():
  engine = scripted_engine.ScriptedEngine(_says, max_sequences=1)
  (found,) = _run(voting.SelfConsistency(n=15), engine)
  (leader, most), *others = found.details['votes'].items()
  left = 15 - len(found.samples)
  assert found.ended_by == 'decided'
  assert most > max(votes for _, votes in others) + left
  assert found.text.endswith(f'#### {leader}')
  assert found.receipt.num_samples == 15  # cancelled samples, too


def test_a_receipt_adds_up_to_the_counters_of_the_engine():
  engine = scripted_engine.ScriptedEngine(_says, preemption=0.1, most_tokens=3)
  questions = [searches.question(seed=seed) for seed in range(6)]
  found = _run(voting.SelfConsistency(n=9), engine, questions=questions)
  receipts = [each.receipt for each in found]
  assert sum(x.completion_tokens for x in receipts) == engine.sampled
  assert sum(x.flops for x in receipts) == engine.flops
  assert sum(x.kv_byte_seconds for x in receipts) == pytest.approx(
    engine.kv_byte_seconds
  )
  assert engine.preemptions > 3
  for each in receipts:
    kept = each.reasoning_tokens + each.answer_tokens
    assert kept + each.discarded_tokens == each.completion_tokens
    assert 0 < each.single_flops < each.flops


def test_a_budget_of_tokens_cuts_the_last_sample():
  (found,) = _run(
    sampling.SampleOnce(),
    budget=budget_lib.Budget(tokens=4),
    questions=[searches.question(seed=3)],
  )
  assert found.ended_by == 'budget'
  assert found.receipt.completion_tokens == 4
  (none,) = _run(sampling.SampleOnce(), budget=budget_lib.Budget(flops=1.0))
  assert none.chosen is None
  assert none.receipt.completion_tokens == 0
  assert none.text == ''


def test_an_engine_with_work_of_others_is_refused():
  engine = scripted_engine.ScriptedEngine(_says)
  engine.submit(searches.question().request)
  with pytest.raises(ValueError, match='expected an idle one'):
    _run(sampling.SampleOnce(), engine)


@pytest.mark.parametrize('settings', [{'n': 2}, {'prompt_logprobs': 0}])
def test_a_question_leaves_samples_to_the_strategy(settings):
  with pytest.raises(ValueError, match='the strategy chooses the samples'):
    _run(sampling.SampleOnce(), questions=[searches.question(**settings)])


@pytest.mark.parametrize(
  ('text', 'words'),
  [
    ('tokens', 'expected UNIT:NUMBER'),
    ('tokens:1,tokens:2', 'each unit once'),
    ('pages:3', 'of tokens, flops, money, seconds'),
    ('tokens:many', 'expected a number'),
    ('tokens:1.5', 'expected a whole number'),
    ('seconds:-1', 'expected a finite number above 0'),
    ('flops:nan', 'expected a finite number above 0'),
  ],
)
def test_a_budget_that_is_none_is_refused(text, words):
  with pytest.raises(ValueError, match=words):
    budget_lib.parsed(text)


def test_a_budget_is_read_as_it_is_written():
  found = budget_lib.parsed('tokens:2000, flops:1e12,seconds:1.5')
  assert found == budget_lib.Budget(tokens=2000, flops=1e12, seconds=1.5)
  assert budget_lib.parsed(str(found)) == found
  assert dataclasses.asdict(found.within(budget_lib.Budget(tokens=5))) == {
    'tokens': 5, 'flops': 1e12, 'money': None, 'seconds': 1.5
  }  # fmt: skip
