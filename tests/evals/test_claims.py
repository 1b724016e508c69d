"""Claims: the values that count as reproduced, and bad claims."""

import dataclasses
import math

import pytest

from evals import claims


def claim(**changes):
  fields = {
    'name': 'a_claim',
    'paper': 'A 2024',
    'where': 'table 1',
    'statement': 'It is so.',
    'quantities': (claims.digits('x', '.25'),),
    'seconds': {'cpu': 1},
  }
  return claims.Claim(**(fields | changes))


@pytest.mark.parametrize(
  ('published', 'inside', 'outside'),
  [
    ('.25', (0.245, 0.25, 0.255), (0.2449, 0.2551)),
    ('3.0', (2.95, 3.05), (2.94, 3.06)),
    ('20', (19.5, 20.5), (19.4, 20.6)),
    ('-1.5', (-1.55, -1.45), (-1.56, -1.44, 1.5)),
  ],
)
def test_digits_are_half_a_unit_of_the_last_one(published, inside, outside):
  quantity = claims.digits('x', published)
  assert all(map(quantity.accepts, inside))
  assert not any(map(quantity.accepts, outside))


def test_ranges_of_one_side_and_of_a_share():
  assert claims.at_least('x', 'more', 0.5, 'why').accepts(math.inf)
  assert not claims.at_least('x', 'more', 0.5, 'why').accepts(0.49)
  assert not claims.at_most('x', 'less', 0.5, 'why').accepts(0.51)
  within = claims.within('x', '-2', -2.0, 0.1, 'why')
  assert within.accepts(-2.19)
  assert not within.accepts(-1.79)


@pytest.mark.parametrize('text', ['1.7e22', '.5 (.1)', '', '1.'])
def test_digits_take_plain_numbers_alone(text):
  with pytest.raises(ValueError, match='expected a decimal number'):
    claims.digits('x', text)


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'name': 'Two words'}, 'lower-case'),
    ({'paper': ' '}, 'got no paper'),
    ({'quantities': ()}, 'at least one'),
    ({'quantities': (claims.digits('x', '1'),) * 2}, 'each once'),
    ({'seeds': 1}, 'at least 2'),
    ({'seconds': {}}, 'got no seconds'),
    ({'seconds': {'tpu': 1}}, 'one of cpu, gpu'),
    ({'seconds': {'cpu': 0}}, 'more than 0'),
  ],
)
def test_a_claim_that_cannot_be_checked_is_refused(changes, words):
  claim().validate()
  with pytest.raises(ValueError, match=words):
    claim(**changes).validate()


@pytest.mark.parametrize(
  'changes', [{'name': 'a | b'}, {'why': ''}, {'low': 2.0, 'high': 2.0}]
)
def test_a_quantity_that_cannot_be_shown_is_refused(changes):
  quantity = dataclasses.replace(claims.digits('x', '2'), **changes)
  with pytest.raises(ValueError, match='claim'):
    claim(quantities=(quantity,)).validate()
