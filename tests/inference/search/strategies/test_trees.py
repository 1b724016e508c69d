"""Search over steps, and revision, on texts that are known."""

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
from inference.search.strategies import revision, sampling, trees
from tests.helpers import tiny_models
from tests.helpers.serving import reference_engine, scripted_engine, searches

_TARGET = ['b', 'c', 'a', 'b']


def _steps(prompt_ids, number: int, rng) -> str:
  """Says a, b or c in turn; after four steps it ends."""
  if bytes(prompt_ids).count(b'\n') == len(_TARGET):
    return 'end'
  return f'{"abc"[number % 3]}\n'


def _right_steps(question, text: str) -> float:
  lines = text.split('\n')
  pairs = zip(lines, _TARGET, strict=False)
  right = [a == b for a, b in pairs]
  return float(right.index(False) if False in right else len(right))


_BY_STEP = scorers.Called(_right_steps)


def _beams(**fields) -> trees.BeamSearch:
  return trees.BeamSearch(
    **{'beams': 1, 'width': 3, 'scorer': _BY_STEP, **fields}
  )


def test_beams_find_an_answer_that_whole_samples_miss():
  engine = scripted_engine.ScriptedEngine(_steps)
  (found,) = searches.run(_beams(), engine)
  assert found.text == 'b\nc\na\nb\nend'
  assert found.details['steps'] == 5
  receipt = found.receipt
  assert receipt.completion_tokens == engine.sampled
  assert receipt.answer_tokens == len('b\nc\na\nb\nend') + 1
  # A greedy chain of the first samples takes a wrong step.
  (greedy,) = searches.run(_beams(width=1), engine)
  assert greedy.text != found.text


def test_beams_that_are_apart_keep_their_roots():
  engine = scripted_engine.ScriptedEngine(_steps)
  (together,) = searches.run(_beams(beams=3, width=2), engine)
  (apart,) = searches.run(_beams(beams=3, width=2, is_apart=True), engine)
  last = [
    {x.tag for x in found.samples if x.number in found.details['scores']}
    for found in (together, apart)
  ]
  assert last[1] == {0, 1, 2}
  assert len(apart.details['scores']) == 3


def _fork(prompt_ids, number: int, rng) -> str:
  """The first step is x or y; x leads to a bad end, y to a good one."""
  said = bytes(prompt_ids)
  if b'\n' in said:
    return 'good' if b'y\n' in said else 'bad'
  return 'xxyx'[number % 4] + '\n'


def test_lookahead_lets_an_outcome_verifier_choose_a_step():
  outcome = scorers.Called(lambda question, text: float(text.endswith('good')))
  engine = scripted_engine.ScriptedEngine(_fork)
  blind = trees.BeamSearch(beams=1, width=4, scorer=outcome)
  (found,) = searches.run(blind, engine)
  assert found.text == 'x\nbad'
  seeing = trees.BeamSearch(beams=1, width=4, scorer=outcome, lookahead=1)
  (found,) = searches.run(seeing, engine)
  assert found.text == 'y\ngood'


@pytest.mark.parametrize('tokens', [1, 7, 20, 60])
def test_beams_end_within_their_budget(tokens):
  engine = scripted_engine.ScriptedEngine(_steps)
  budget = budget_lib.Budget(tokens=tokens)
  (found,) = searches.run(_beams(beams=2), engine, budget=budget)
  assert found.receipt.completion_tokens == engine.sampled <= tokens
  assert found.ended_by == 'budget'
  assert found.chosen is not None


@pytest.mark.parametrize(
  ('fields', 'words'),
  [
    ({'beams': 0}, 'beams: got 0'),
    ({'lookahead': -1}, 'lookahead: got -1'),
    ({'step_end': ''}, 'step_end: got an empty text'),
  ],
)
def test_beams_that_make_no_sense_are_refused(fields, words):
  with pytest.raises(ValueError, match=words):
    _beams(**fields)


def test_a_fork_computes_less_than_a_page_again():
  engine = reference_engine.engine(**reference_engine.TIGHT)  # pages of 16
  engine.manager.clear()
  question = samples_lib.Question(
    request=requests_lib.Request(
      prompt_ids=tuple(range(40)),
      settings=settings_lib.Settings(seed=1, max_tokens=8, ignore_eos=True),
    )
  )
  strategy = trees.BeamSearch(
    beams=1, width=3, scorer=scorers.MeanLogprob(), most_steps=3
  )
  # Steps end by their length here, so each beam is over; fork by hand.
  costs = budget_lib.of_engine(engine)
  (first,) = drive.run(engine, strategy, [question], costs=costs)
  before = engine.metrics.value('prefill_tokens_total')
  longer = samples_lib.Question(
    request=requests_lib.Request(
      prompt_ids=(*range(40), *first.chosen.ids),
      settings=settings_lib.Settings(seed=2, max_tokens=4, ignore_eos=True),
    )
  )
  drive.run(
    engine,
    sampling.BestOfN(n=3, scorer=scorers.MeanLogprob()),
    [longer],
    costs=costs,
  )
  # 48 tokens, of which 47 are computed: two whole pages are found.
  computed = engine.metrics.value('prefill_tokens_total') - before
  assert computed <= 16


def test_a_revision_sees_the_answers_before_it():
  prompts = []

  def says(prompt_ids, number, rng):
    prompts.append(bytes(prompt_ids))
    return ['#### 3', '#### 5', '#### 4'][number]

  engine = scripted_engine.ScriptedEngine(says)
  tokenizer = tiny_models.byte_tokenizer()
  strategy = revision.SequentialRevision(
    n=3, tokenizer=tokenizer, words=' Again: '
  )
  (found,) = searches.run(strategy, engine)
  assert prompts[-1] == b'2+2=#### 3 Again: #### 5 Again: '
  assert found.text == '#### 4'
  assert samples_lib.ballot(found.chosen) == 4
  receipt = found.receipt
  assert receipt.reasoning_tokens == 12  # both drafts, without their EOS
  assert receipt.answer_tokens == 7
  assert receipt.completion_tokens == engine.sampled == 21
  is_five = scorers.Called(lambda question, text: float('5' in text))
  early = revision.SequentialRevision(
    n=3, tokenizer=tokenizer, scorer=is_five, enough=1.0
  )
  (found,) = searches.run(early, engine)
  assert found.text == '#### 5'
  assert found.ended_by == 'decided'


def test_a_revision_without_a_scorer_knows_nothing_of_enough():
  with pytest.raises(ValueError, match='expected both or neither'):
    revision.SequentialRevision(
      n=2, tokenizer=tiny_models.byte_tokenizer(), enough=1.0
    )


def test_a_step_is_cut_where_the_context_ends():
  engine = scripted_engine.ScriptedEngine(
    lambda prompt, number, rng: 'abc\n', max_length=30
  )
  (found,) = searches.run(_beams(), engine, [searches.question(max_tokens=20)])
  assert len(found.chosen.ids) <= 26
  assert np.isfinite(found.chosen.score)
