"""The choice of a version: by weight, explainable, and as sticky as it says."""

import collections

import pytest

from inference.server.versions import traffic as traffic_lib


def _shares(weights, num=20_000):
  found = collections.Counter(
    traffic_lib.choose(weights, f'request\0{i}') for i in range(num)
  )
  return {version: found[version] / num for version in weights}


@pytest.mark.parametrize(
  'weights', [{'a': 90, 'b': 10}, {'a': 1, 'b': 1, 'c': 2}, {'a': 1, 'b': 0}]
)
def test_versions_are_chosen_by_their_weights(weights):
  total = sum(weights.values())
  for version, share in _shares(weights).items():
    expected = weights[version] / total
    # Five standard deviations: a false alarm in two million.
    error = 5 * (expected * (1 - expected) / 20_000) ** 0.5
    assert share == pytest.approx(expected, abs=error)


def test_a_changed_weight_moves_only_what_it_must():
  keys = [f'request\0{i}' for i in range(2000)]
  before, after = (
    [traffic_lib.choose({'old': 100 - new, 'new': new}, key) for key in keys]
    for new in (10, 30)
  )
  moved = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
  assert set(moved) == {('old', 'new')}
  assert len(moved) == pytest.approx(400, abs=100)


def test_nobody_is_chosen_without_a_weight():
  assert traffic_lib.choose({}, 'k') is None
  assert traffic_lib.choose({'a': 0.0}, 'k') is None


def test_a_conversation_of_a_principal_sticks():
  def key(is_by_principal=False, **fields):
    traffic = traffic_lib.Traffic(weights={}, is_by_principal=is_by_principal)
    request = {'request_id': 'r', 'principal': 'p', 'conversation': ''}
    return traffic_lib.key(traffic, **{**request, **fields})

  assert key() != key(request_id='s')
  one, other = (key(conversation='c', request_id=i) for i in 'rs')
  assert one == other
  # Of another principal it is another conversation.
  assert one != key(conversation='c', principal='q')
  assert key(True) == key(True, request_id='s')
  assert key(True) != key(True, principal='q')
  # No text of one kind can be taken for a text of another.
  assert key(conversation='c') != key(request_id='p\0c')


def test_copies_are_a_share_of_all_that_a_version_gets():
  keys = [f'request\0{i}' for i in range(4000)]
  assert not any(traffic_lib.copies({'s': 0.0}, key) for key in keys)
  assert all(traffic_lib.copies({'s': 1.0}, key) for key in keys)
  weights, shadows = {'a': 1, 's': 1}, {'s': 0.25}
  mine = [key for key in keys if traffic_lib.choose(weights, key) == 'a']
  copied = sum(bool(traffic_lib.copies(shadows, key)) for key in mine)
  assert copied / len(mine) == pytest.approx(0.25, abs=0.05)
