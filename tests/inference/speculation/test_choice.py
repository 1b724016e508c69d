"""The choice of drafts: the most tokens per second, from injected costs."""

import pytest

from inference.speculation import choice as choice_lib


class _Costs:
  """Seconds by (rows, width)."""

  def __init__(self, seconds):
    self._seconds = seconds

  def seconds(self, rows, width):
    return self._seconds.get((rows, width), 0.0)


def _choice(**seconds):
  costs = {(4, 1): 1.0, (4, 4): 1.5, (4, 8): 2.5}
  costs.update({(4, int(name[1:])): x for name, x in seconds.items()})
  return choice_lib.Choice(_Costs(costs))


_SHAPES = [(4, 4), (4, 8)]


def _learn(choice, id, accepted, length, times=60):
  for _ in range(times):
    choice.observe(id, accepted=accepted, length=length)


def test_expected_tokens_are_those_of_the_formula():
  choice = _choice()
  _learn(choice, 'a', 3, 7)  # of four examined tokens, three are right
  for length in (0, 1, 5):
    expected = (1 - 0.75 ** (length + 1)) / (1 - 0.75)
    assert choice.expected('a', length) == pytest.approx(expected, rel=0.02)
  assert choice.acceptance == pytest.approx(0.75, abs=0.01)
  # A new sequence is expected to be like the others.
  own = choice.expected('a', 3)
  assert choice.expected('b', 3) == pytest.approx(own, rel=0.01)


def test_good_drafts_are_verified_wide_and_poor_ones_are_not():
  choice = _choice()
  _learn(choice, 'a', 7, 7)
  assert choice.choose({'a': 7}, _SHAPES, 4, is_queue=True).lengths == {'a': 7}
  poor = _choice()
  _learn(poor, 'a', 0, 7)
  assert poor.choose({'a': 7}, _SHAPES, 4, is_queue=True) == ({}, 1.0)
  middle = _choice()
  _learn(middle, 'a', 2, 7)
  # 1 + .67 + .44 + .3 in 1.5 s, or .63 more in a second more.
  assert middle.choose({'a': 7}, _SHAPES, 4, is_queue=True).lengths == {'a': 3}


def test_a_gain_within_the_error_of_estimates_is_left():
  choice = _choice(w4=1.0)
  _learn(choice, 'a', 1, 3)
  tokens = choice.expected('a', 3)
  for seconds, expected in ((0.95, {'a': 3}), (0.985, {})):
    costs = _Costs({(4, 1): 1.0, (4, 4): seconds * tokens})
    other = choice_lib.Choice(costs)
    _learn(other, 'a', 1, 3)
    assert (
      other.choose({'a': 3}, [(4, 4)], 4, is_queue=True).lengths == expected
    )


def test_the_batch_decides():
  choice = _choice()
  _learn(choice, 'a', 3, 3)
  alone = choice.choose({'a': 3}, _SHAPES, 4, is_queue=True)
  assert alone.lengths == {'a': 3}
  # Three sequences without a draft would wait for the one that has one.
  others = {'a': 3, 'b': 0, 'c': 0, 'd': 0}
  crowd = choice_lib.Choice(_Costs({(4, 1): 1.0, (4, 4): 2.5}))
  _learn(crowd, 'a', 3, 3)
  assert crowd.choose({'a': 3}, [(4, 4)], 4, is_queue=True).lengths == {'a': 3}
  assert crowd.choose(others, [(4, 4)], 4, is_queue=True).lengths == {}
  _learn(crowd, 'b', 0, 3)
  both = choice.choose({'a': 3, 'b': 3}, _SHAPES, 4, is_queue=True).lengths
  assert both == {'a': 3, 'b': 3}  # tokens that fit cost nothing more


def test_without_a_queue_no_sequence_pays_for_another():
  choice = _choice(w4=2.0)
  for id in 'abcd':
    _learn(choice, id, 3 if id in 'ab' else 0, 3)
  drafts = dict.fromkeys('abcd', 3)

  def chosen(drafts, is_queue):
    return choice.choose(drafts, [(4, 4)], 4, is_queue=is_queue).lengths

  # 2 of 4 have 4 tokens where decode steps give 2: 2.5 of them on average, and
  # a geometric mean of 2.
  assert chosen(drafts, is_queue=True) == drafts
  assert chosen(drafts, is_queue=False) == {}
  pair = {'a': 3, 'b': 3}
  assert chosen(pair, is_queue=False) == pair


def _beside(choice, drafts, num_prompt=16):
  return choice.choose_beside(
    drafts,
    [(4, 1), (8, 1)],
    (4, 1),
    width=8,
    num_prompt=num_prompt,
    rows_later=4,
    num_later=4,
  )


def test_beside_chunks_a_draft_takes_places_that_are_free():
  costs = {((4, 1), 1): 1.0, ((4, 1), 8): 1.0, ((8, 1), 8): 2.0}
  choice = choice_lib.Choice(_Costs(costs))
  _learn(choice, 'a', 3, 4)
  _learn(choice, 'b', 0, 1)
  # The larger program has places for seven, and takes twice as long for them.
  drafts = {'a': 7, 'b': 7}
  assert _beside(choice, drafts).lengths == {'a': 2, 'b': 0}
  # The likeliest tokens come first: a second one of `a` before any of `b`.
  assert _beside(choice, {'b': 7, 'a': 1}).lengths == {'b': 1, 'a': 1}
  # Without a free place there is no draft in the small program.
  four = {'a': 7, 'b': 0, 'c': 0, 'd': 0}
  assert _beside(choice, four).lengths == {}
  costs[(8, 1), 8] = 1.01
  assert _beside(choice, four).lengths == {'a': 4, 'b': 0, 'c': 0, 'd': 0}


def test_a_draft_beside_chunks_saves_decode_steps():
  """It costs 6 % of a step, and gives 2.3 tokens more."""
  costs = {((4, 1), 1): 1.0, ((4, 1), 8): 1.06}
  choice = choice_lib.Choice(_Costs(costs))
  _learn(choice, 'a', 7, 8)

  def chosen(num_prompt, num_later=1):
    return choice.choose_beside(
      {'a': 3},
      [(4, 1)],
      (4, 1),
      width=8,
      num_prompt=num_prompt,
      rows_later=1,
      num_later=num_later,
    )

  # Decode steps were never measured: prompts count as answers do.
  gain = (choice.expected('a', 3) + 4) / 5 / 1.06
  assert chosen(4) == ({'a': 3}, pytest.approx(gain))
  assert chosen(640).lengths == {}
  for seconds, expected in ((0.1, {'a': 3}), (0.01, {})):
    costs[1, 1] = seconds
    assert chosen(4).lengths == chosen(640).lengths == expected
  assert choice.expected('a', 3) - 1 == pytest.approx(2.3, abs=0.1)
  # A decode step of .1 s that serves ten sequences: a token costs a tenth.
  costs[1, 1] = 0.1
  assert chosen(4, num_later=10).lengths == {}


def test_costs_that_are_unknown_are_found_out():
  choice = choice_lib.Choice(_Costs({}))
  assert choice.choose({'a': 7}, _SHAPES, 4, is_queue=True).lengths == {'a': 7}
  assert choice.choose({'a': 0}, _SHAPES, 4, is_queue=True).lengths == {}
  assert choice.choose({'a': 7}, [], 4, is_queue=True).lengths == {}
  measured = choice_lib.Measured()
  for seconds in (9.0, 1.0, 1.2):
    assert measured.seconds(4, 1) == 0
    measured.observe(4, 1, seconds)
  assert measured.seconds(4, 1) == 1.0
  measured.observe(4, 1, 2.0)
  assert measured.seconds(4, 1) == pytest.approx(1.1)
  # A wider program, measured or not, takes no less.
  for _ in range(3):
    measured.observe(4, 8, 0.5)
  assert measured.seconds(4, 4) == measured.seconds(4, 8) == pytest.approx(1.1)
  assert measured.seconds(2, 1) == 0


def test_drafts_that_lose_are_tried_again_at_last():
  choice = _choice(w4=9.0, w8=9.0)
  declined = 0
  while not choice.choose({'a': 7}, _SHAPES, 4, is_queue=True).lengths:
    declined += 1
    assert declined < 1000
  assert declined == 128
  # Until it has been seen how the draft does.
  assert choice.choose({'a': 7}, _SHAPES, 4, is_queue=True).lengths == {'a': 3}
  choice.observe('a', accepted=3, length=3)
  assert choice.choose({'a': 7}, _SHAPES, 4, is_queue=True).lengths == {}
