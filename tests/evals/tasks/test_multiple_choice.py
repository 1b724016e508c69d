"""Multiple choice: the answer that each accuracy takes."""

import math

import numpy as np
import pytest

from evals import ports
from evals.tasks import multiple_choice
from tests.helpers import eval_models


def _question(choices, label, **fields):
  return multiple_choice.Question(
    **{'id': f'q{label}', 'context': 'Q:', 'choices': choices, 'label': label}
    | fields
  )


def _scores(logprob_of):
  """Returns a LogprobFn with a log-probability for each continuation text."""

  def score(requests):
    answers = []
    for _, continuation in requests:
      logprob = logprob_of[bytes(continuation).decode()]
      answers.append(ports.Logprobs(logprob, False, np.array([logprob])))
    return answers

  return score


def test_three_ways_of_asking():
  # By log-probability 'no' wins. Per character 'perhaps' (-0.5) is before 'öö'
  # (-1.75). Per byte 'öö', which has four bytes, has -0.875.
  question = _question(('no', 'perhaps', 'öö'), 1)
  scored = _scores({' no': -3.0, ' perhaps': -3.5, ' öö': -3.4})
  model = eval_models.model(logprob_fn=scored)
  group = multiple_choice.measure([question], model)
  got = {score.name: score.value for score in group.scores}
  assert (got['acc'], got['acc_norm'], got['acc_bytes']) == (0.0, 1.0, 1.0)
  assert group.examples[0]['logprobs'] == [-3.0, -3.5, -3.4]
  # Here the accuracies per character and per byte differ.
  question = _question(('abc', 'öö'), 1)
  scored = _scores({' abc': -3.0, ' öö': -3.2})
  group = multiple_choice.measure(
    [question], eval_models.model(logprob_fn=scored)
  )
  got = {score.name: score.value for score in group.scores}
  assert (got['acc'], got['acc_norm'], got['acc_bytes']) == (0.0, 0.0, 1.0)


def test_the_first_of_equals_wins():
  scored = _scores({' a': -1.0, ' b': -1.0})
  group = multiple_choice.measure(
    [_question(('a', 'b'), 0), _question(('a', 'b'), 1)],
    eval_models.model(logprob_fn=scored),
  )
  assert group.score('acc').value == 0.5
  assert group.score('acc').standard_error == pytest.approx(0.5)


def test_confidence_is_the_share_among_the_choices():
  scored = _scores({' a': math.log(0.06), ' b': math.log(0.02)})
  group = multiple_choice.measure(
    [_question(('a', 'b'), 0)], eval_models.model(logprob_fn=scored)
  )
  got = {score.name: score.value for score in group.scores}
  assert got['nll'] == pytest.approx(-math.log(0.75))
  assert got['brier'] == pytest.approx(2 * 0.25**2)
  assert got['ece'] == pytest.approx(0.25)
  (found,) = group.details['reliability']
  assert found['confidence'] == pytest.approx(0.75)


def test_questions_of_a_passage_cluster():
  scored = _scores({' a': -1.0, ' b': -2.0})
  model = eval_models.model(logprob_fn=scored)
  questions = [
    _question(('a', 'b'), 0, id='1', cluster='x'),
    _question(('a', 'b'), 0, id='2', cluster='x'),
    _question(('a', 'b'), 1, id='3'),
  ]
  group = multiple_choice.measure(questions, model)
  assert group.clusters == ('cluster x', 'cluster x', 'id 3')
  # Residuals 1/3, 1/3 | -2/3: sqrt(2 / 1 * 2 * (2/3)^2) / 3.
  assert group.score('acc').standard_error == pytest.approx(4 / 9)
  alone = multiple_choice.measure(questions[2:], model)
  assert alone.clusters is None


def test_a_context_that_was_cut_is_told_of():
  long = _question(('a', 'b'), 0, context='x' * 40, id='long')
  group = multiple_choice.measure(
    [long, _question(('a', 'b'), 1)], eval_models.model()
  )
  assert group.notes == (
    '1 of 2 contexts were cut from the left to the 32 tokens that the model'
    ' reads',
  )


def test_a_choice_that_cannot_be_read_names_its_question():
  with pytest.raises(ValueError, match='q0: got a continuation of 41 tokens'):
    multiple_choice.measure(
      [_question(('a', 'b' * 40), 0)], eval_models.model()
    )
