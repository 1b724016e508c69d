"""Verifiers of numbers, texts, choices and patterns."""

import pytest

from evals import judges
from evals.verifiers import texts, verifier
from evals.verifiers.sandbox import runner


@pytest.mark.parametrize(
  ('rule', 'answer', 'record', 'value'),
  [
    (texts.Number(), 'So it is $1,000.00.', {'answer': '1000'}, 1),
    (texts.Number(), '3 + 4 = 7', {'answer': 'so\n#### 7'}, 1),
    (texts.Number(), '3 + 4 = 7', {'answer': '3'}, 0),
    (texts.Number(), 'none', {'answer': '3'}, 0),
    (texts.Number(is_strict=True), 'It is 3', {'answer': '3'}, 0),
    (texts.Number(is_strict=True), '#### 3', {'answer': '3'}, 1),
    (texts.Exact(), ' Paris\n', {'answer': 'Paris'}, 1),
    (texts.Exact(), 'Why?\n#### Paris', {'answer': ['Rome', 'Paris']}, 1),
    (texts.Exact(), 'paris', {'answer': 'Paris'}, 0),
    (texts.Exact(ignores_case=True), 'paris', {'answer': 'Paris'}, 1),
    (texts.Exact(is_strict=True), 'Paris', {'answer': 'Paris'}, 0),
    (texts.Choice(), 'The answer is (B).', {'answer': 'B'}, 1),
    (texts.Choice(), 'A or B', {'answer': 'B'}, 0),
    (texts.Pattern(), 'on 2024-02-30', {'pattern': r'\d{4}-\d\d'}, 1),
    (texts.Pattern(), 'today', {'pattern': r'\d{4}-\d\d'}, 0),
  ],
)
def test_the_score_of_an_answer(rule, answer, record, value):
  if isinstance(rule, texts.Choice):
    record = {**record, 'choices': ['A', 'B']}
  rule.check(record)
  score = rule(answer, record)
  assert score.value == value
  assert score.reason.startswith('got ')
  assert not score.failure


@pytest.mark.parametrize(
  ('rule', 'record', 'said'),
  [
    (texts.Number(), {}, 'answer: got none, expected text'),
    (texts.Number(), {'answer': 'ten'}, "answer: got 'ten', expected number"),
    (texts.Exact(), {'answer': []}, r'answer: got \[\], expected text, or'),
    (
      texts.Choice(),
      {'answer': 'C', 'choices': ['A', 'B']},
      "answer: got 'C', expected one of A, B",
    ),
    (texts.Pattern(), {'pattern': '('}, "pattern: got '\\(', expected a regul"),
  ],
)
def test_a_wrong_record_is_refused(rule, record, said):
  with pytest.raises(ValueError, match=said):
    rule.check(record)


def test_a_pattern_of_exponential_time_is_a_failure_of_time():
  score = texts.Pattern()('a' * 40 + '!', {'pattern': '^(a+)+$'})
  assert (score.value, score.failure) == (0.0, 'time')
  assert score.reason == 'pattern: it computed for 1 s'


class _Broken(verifier.Verifier):
  def check(self, record):
    pass

  def __call__(self, answer, record):
    if answer == 'bad':
      raise KeyError('lost')
    if answer == 'no sandbox':
      raise runner.Unavailable('sandbox: none')
    return verifier.Score(0.5, 'half')


def test_a_verifier_that_crashes_gives_0_and_says_so():
  scores = verifier.score_all(_Broken(), [('good', {}), ('bad', {})])
  assert scores[0] == (0.5, 'half', '')
  assert scores[1] == (0.0, "KeyError: 'lost'", 'error')
  with pytest.raises(runner.Unavailable):
    verifier.score_all(_Broken(), [('no sandbox', {})])


def test_a_verifier_is_a_judge():
  record_of = {'two and two': {'answer': '4'}}.__getitem__
  judge = judges.by_score(verifier.score_fn(texts.Number(), record_of))
  pair = judges.Comparison('two and two', 'It is 5.', 'It is 4.')
  (orders,) = judges.both_orders(judge, [pair])
  assert orders.forward.choice is judges.Choice.SECOND
  assert orders.backward.choice is judges.Choice.FIRST
