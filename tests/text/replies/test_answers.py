"""Answers count by their value, however a model writes them."""

import fractions

import pytest

from text.replies import answers

_ANN = answers.Answer('word', 'Ann', ('Ann', 'Annabel', 'Ben'))
_SORTED = answers.Answer('numbers', '-3, 5, 1000')


def _is_right(number, completion, **options):
  return answers.is_right(
    answers.Answer('number', number), completion, **options
  )


@pytest.mark.parametrize(
  ('number', 'completion'),
  [
    ('1000', '#### 1000'),
    ('1000', '#### 1,000'),
    ('1000', '#### $1,000.00'),
    ('1000', '#### 1 000'),
    ('1000', '#### 1\u202f000'),
    ('1000', '#### 1{,}000'),
    ('1000', '#### 1e3'),
    ('18', '####18'),
    ('18', '#### **18**'),
    ('18', '#### 18 apples for 3 days'),
    ('18', '#### 18.'),
    ('18', '#### 18%'),
    ('18', '#### x = 18'),
    ('18', '#### 20 - 2 = 18'),
    ('18', 'first 5 + 4 = 9\n#### 18\n\nQuestion: what else?\n#### 7'),
    ('-3', '#### -3'),
    ('-3', '#### \u22123'),
    ('-5', '#### -$5'),
    ('0.5', '#### .5'),
    ('3/4', '#### 0.75'),
    ('3/4', '#### 6/8'),
    ('3/4', r'#### \frac{3}{4}'),
    ('7/4', '#### 1 3/4'),
    ('7/4', '#### 1.75 of them'),
    # Without the mark.
    ('18', r'So \boxed{18}.'),
    ('3/4', r'It is 1/4 * 3, so \boxed{\frac{3}{4}}'),
    ('18', 'The answer is 18.'),
    ('18', 'Answer: 18 dollars for 3 eggs'),
    ('18', 'We get 5 + 13 = 18'),
  ],
)
def test_a_right_number_is_seen(number, completion):
  assert _is_right(number, completion)


@pytest.mark.parametrize(
  ('number', 'completion'),
  [
    ('1000', '#### 100'),
    ('1000', '#### 10,00'),
    ('1000', '#### 1.000'),
    ('18', '#### 1.8'),
    ('18', '#### 180'),
    ('18', '#### -18'),
    ('18', '#### 5 #### 18'),
    ('18', '18 is it\n#### 17'),
    ('18', '18\n####'),
    ('18', '####\n'),
    ('18', ''),
    ('18', 'no number'),
    ('3/4', '#### 3'),
    ('3/4', '#### 4/3'),
    ('1/2', '#### 1/0'),
  ],
)
def test_a_wrong_number_is_not(number, completion):
  assert not _is_right(number, completion)


@pytest.mark.parametrize(
  'digits', ['9' * 10_000, '1e99999999', '1/' + '7' * 9999]
)
def test_a_monstrous_number_is_wrong_and_costs_nothing(digits):
  assert not _is_right('18', f'#### {digits}')


def test_strict_takes_an_answer_behind_the_mark_only():
  assert _is_right('18', 'so\n#### 18', strict=True)
  assert not _is_right('18', 'The answer is 18.', strict=True)


@pytest.mark.parametrize(
  'completion',
  [
    '#### -3, 5, 1000',
    '#### [-3, 5, 1,000]',
    '#### -3 < 5 < 1000',
    '#### (-3; 5; 1000)',
    '#### -3,5,1000',
    '#### -3 5 1000',
    'Sorted: -3, 5, 1000',
  ],
)
def test_a_right_list_is_seen(completion):
  assert answers.is_right(_SORTED, completion)


@pytest.mark.parametrize(
  'completion',
  [
    '#### -3, 1000, 5',
    '#### -3, 5',
    '#### -3, 5, 1000, 1001',
    '#### -3, 5, 1, 0',
    '#### 3, 5, 1000',
  ],
)
def test_a_wrong_list_is_not(completion):
  assert not answers.is_right(_SORTED, completion)


def test_commas_of_a_list_may_separate_numbers_of_three_digits():
  answer = answers.Answer('numbers', '100, 200, 300')
  assert answers.is_right(answer, '#### [100,200,300]')
  assert not answers.is_right(answer, '#### 100200300')


@pytest.mark.parametrize(
  ('completion', 'is_right'),
  [
    ('#### Ann', True),
    ('#### ann.', True),
    ('#### **Ann** is the tallest', True),
    ('Ann is taller than Ben.\nSo the tallest is Ann.', True),
    ('#### Annabel', False),
    ('#### Ann or Ben', False),
    ('#### Ben', False),
    ('#### Anna', False),
    ('#### nobody', False),
  ],
)
def test_a_word_is_found_whole_and_alone(completion, is_right):
  assert answers.is_right(_ANN, completion) == is_right


def test_values_of_numbers():
  assert answers.value(' $1,200.50 ') == fractions.Fraction(2401, 2)
  assert answers.value('3/4') == fractions.Fraction(3, 4)
  assert answers.value('18 apples') is None
  assert answers.value('') is None


@pytest.mark.parametrize(
  ('args', 'message'),
  [
    (('word', 'Cy', ('Ann', 'Ben')), "answer: got 'Cy', expected one of Ann"),
    (('number', 'many'), "answer: got 'many', expected number"),
    (('guess', '1'), "answer kind: got 'guess', expected one of number"),
  ],
)
def test_no_answer_of_its_kind_is_an_error(args, message):
  with pytest.raises(ValueError, match=message):
    answers.Answer(*args)
