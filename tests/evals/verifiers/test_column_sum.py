"""The verifier of a sum in columns: steps, without question or record."""

import pytest

from data.problems import draws, generator, working
from evals.verifiers import kinds

RULE = kinds.named('column_sum')


def _value(text):
  RULE.check({})
  return RULE(text, {}).value


def test_steps_are_scored_without_the_question():
  right = '9+3+0=12\n4+7+1=12\n#### 122'
  assert _value(right) == 1
  assert _value(right.replace('+1=12', '+1=11')) < 1
  forgotten = '9+3+0=12\n4+7+0=11\n#### 112'  # the carry
  assert _value(forgotten) == pytest.approx(2 / 3)
  # A digit that was copied wrongly is no wrong step.
  assert _value('8+3+0=11\n4+7+1=12\n#### 121') == 1
  assert _value('') == _value('I do not know.') == 0
  assert RULE(forgotten, {}).reason == '2 of 3 lines follow'
  assert not RULE.NEEDS_RECORD


def test_the_beginning_of_an_answer_is_scored_by_its_columns():
  assert _value('9+3+0=12') == pytest.approx(1 / 2)
  assert _value('9+3+0=12\n4+7+1=12') == pytest.approx(2 / 3)
  assert _value('9+3+0=12\n4+7+0=11\n') == pytest.approx(1 / 3)


def test_right_solutions_of_problems_score_1_and_wrong_ones_less():
  settings = generator.Settings(
    count=20, families=('columns',), levels=(1, 3, 5)
  )
  for seed, made in enumerate(generator.make(settings, 'validation')):
    assert _value(made.solution().text) == 1
    for difficulty in working.DIFFICULTIES:
      wrong, _ = made.wrong_solution(difficulty, draws.Draws(seed))
      assert _value(wrong.text) < 1
