"""Values out of range give one form of error; values in range give none."""

import re

import pytest

from checks import expect


@pytest.mark.parametrize(
  ('check', 'error'),
  [
    (
      lambda: expect.one_of('a.kind', 'mesh2', ('mesh', 'pmap')),
      "a.kind: got 'mesh2', expected one of mesh, pmap",
    ),
    (
      lambda: expect.at_least('a.size', 0, 1, 'take more'),
      'a.size: got 0, expected at least 1; take more',
    ),
    (
      lambda: expect.at_least('a.size', float('nan'), 1),
      'a.size: got nan, expected at least 1',
    ),
    (
      lambda: expect.divides('a.groups', 3, 'a.experts', 8),
      'a.groups: got 3, expected a divisor of a.experts = 8',
    ),
    (
      lambda: expect.divides('a.groups', 0, 'a.experts', 8),
      'a.groups: got 0, expected a divisor of a.experts = 8',
    ),
    (
      lambda: expect.multiple_of('a.rows', 7, 'a.parts', 2, 'pad'),
      'a.rows: got 7, expected a multiple of a.parts = 2; pad',
    ),
    (
      lambda: expect.multiple_of('a.rows', 7, '', 2),
      'a.rows: got 7, expected a multiple of 2',
    ),
  ],
)
def test_an_error_says_got_expected_and_fix(check, error):
  with pytest.raises(ValueError, match=f'^{re.escape(error)}$'):
    check()


def test_values_in_range_pass():
  expect.one_of('a', 'x', ('x', 'y'))
  expect.at_least('a', 1, 1)
  expect.divides('a', 4, 'b', 8)
  expect.multiple_of('a', 8, 'b', 4)


def test_names_like_a_wrong_one_are_found():
  names = ('adamw', 'muon', 'lion')
  assert expect.meant('lyon', names) == '; did you mean lion?'
  assert expect.meant('adam', names) == '; did you mean adamw?'
  assert not expect.meant('sgd', names)
  assert not expect.meant(3, (1, 2))
