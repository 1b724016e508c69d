"""Numbers in answers: found, and equal however they are written."""

import fractions

import pytest

from evals.tasks import gsm8k, numbers


@pytest.mark.parametrize(
  ('text', 'value'),
  [
    ('18', '18'),
    ('18.', '18'),
    ('18.00', '18'),
    ('$1,200.50', '1200.5'),
    ('-$5', '-5'),
    ('50%', '50'),
    (' 1,234,567 ', '1234567'),
    ('.5', '0.5'),
  ],
)
def test_a_number_is_what_it_says(text, value):
  assert numbers.number(text) == fractions.Fraction(value)


@pytest.mark.parametrize('text', ['', 'ten', '1 2', 'nan', 'Infinity', '#'])
def test_what_is_no_number(text):
  assert numbers.number(text) is None


@pytest.mark.parametrize(
  ('text', 'value'),
  [
    ('so 3 + 4 = 7.', '7'),
    ('The total is $1,050.25, he said', '1050.25'),
    ('it is -3', '-3'),
    ('5-3', '3'),
    ('(2)-3', '3'),
    ('9 of 10 are right, I am 100% sure', '100'),
    ('pages 1, 2, 3', '3'),
  ],
)
def test_the_last_number(text, value):
  assert numbers.last_number(text) == fractions.Fraction(value)


def test_no_number_at_all():
  assert numbers.last_number('none.') is None
  assert gsm8k.marked_number('the answer is 18') is None


@pytest.mark.parametrize(
  ('completion', 'strict', 'last'),
  [
    ('9 * 2 = 18\n#### 18', 1.0, 1.0),
    ('#### $18.00', 1.0, 1.0),
    ('The answer is 18.', 0.0, 1.0),
    ('#### 17', 0.0, 0.0),
    # The first mark counts, since the next question follows it.
    ('#### 18\n\nQuestion: 5 apples\nAnswer: #### 5', 1.0, 0.0),
    ('', 0.0, 0.0),
  ],
)
def test_grades(completion, strict, last):
  assert gsm8k.grade('9 * 2 = <<9*2=18>>18\n#### 18', completion) == {
    'exact_match': strict,
    'exact_match_last': last,
  }


def test_an_answer_without_a_number_cannot_be_graded():
  with pytest.raises(ValueError, match="expected one that ends with '####'"):
    gsm8k.grade('eighteen', '18')


def test_solved_examples_stand_before_the_question():
  assert gsm8k.prompt('Q2', [('Q1', 'A1')]) == (
    'Question: Q1\nAnswer: A1\n\nQuestion: Q2\nAnswer:'
  )
