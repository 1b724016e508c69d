"""Synthetic sources: what they promise, against enumeration and formulas."""

import numpy as np
import pytest

from data.synthetic import biographies, markov, pairs, repeats, sums


def test_floors_of_chains_are_in_order_and_those_of_the_chain():
  rng = np.random.default_rng(0)
  chains = markov.draw(rng, num_chains=512, length=40, num_states=3)
  floors = markov.floors(chains)
  assert floors.entropy < floors.bigram < floors.unigram < floors.uniform
  assert floors.uniform == pytest.approx(np.log(3))
  # The rows are used as they are written: pairs occur as often as they say.
  before_BT, now_BT = chains.states_BT[:, :-1], chains.states_BT[:, 1:]
  chain_B1 = np.arange(512)[:, None]
  probs_BT = chains.transitions_BKK[chain_B1, before_BT, now_BT]
  assert floors.entropy == pytest.approx(-np.log(probs_BT).mean())
  rows = chains.transitions_BKK[chain_B1, before_BT]
  expected = -(rows * np.log(rows)).sum(axis=-1).mean()
  # 20,000 draws: five standard errors of about .005.
  assert floors.entropy == pytest.approx(expected, abs=0.025)


def test_the_bigram_floor_is_that_of_counts():
  states_BT = np.array([[0, 1, 0, 1]], np.int32)
  chains = markov.Chains(
    states_BT=states_BT, transitions_BKK=np.full((1, 2, 2), 0.5)
  )
  # From 0: 1/2, then 1 after one count of two; from 1: 1/2.
  expected = -np.log([1 / 2, 1 / 2, 2 / 3]).mean()
  assert markov.floors(chains).bigram == pytest.approx(expected)
  unigram = -np.log([1 / 3, 2 / 4, 2 / 5]).mean()
  assert markov.floors(chains).unigram == pytest.approx(unigram)
  with pytest.raises(ValueError, match='expected at least 1 of 2 states'):
    markov.draw(np.random.default_rng(0), 1, 5, 1)


def test_repeated_tokens_are_foretold_by_the_place_before():
  rng = np.random.default_rng(0)
  ids_BT, is_known_BT = repeats.draw(rng, 20, 30, num_ids=12, block=(4, 9))
  assert 0 < is_known_BT.sum() < is_known_BT.size
  for ids, is_known in zip(ids_BT.tolist(), is_known_BT, strict=True):
    for t in range(1, 30):
      behind = {ids[i + 1] for i in range(t - 1) if ids[i] == ids[t - 1]}
      assert is_known[t] == bool(behind)
      assert not behind or behind == {ids[t]}
  with pytest.raises(ValueError, match=r'block: got \(4, 13\) with 12 ids'):
    repeats.draw(rng, 1, 30, num_ids=12, block=(4, 13))


@pytest.mark.parametrize('is_reversed', [False, True])
def test_additions_are_written_as_they_are_read(is_reversed):
  pairs_B2 = np.array([[128, 367], [999, 1], [0, 0]])
  ids_BT, is_sum_BT = sums.rows(pairs_B2, 3, is_reversed=is_reversed)
  written = [''.join('0123456789+='[i] for i in row) for row in ids_BT]
  expected = ['128+367=0495', '999+001=1000', '000+000=0000']
  if is_reversed:
    expected = [text[:8] + text[:7:-1] for text in expected]
  assert written == expected
  assert is_sum_BT.tolist() == [[False] * 8 + [True] * 4] * 3
  with pytest.raises(ValueError, match='expected 0 to 99 with 2 digits'):
    sums.rows(pairs_B2, 2, is_reversed=False)
  drawn_B2 = sums.draw(np.random.default_rng(0), 1000, 2)
  assert drawn_B2.min() == 0
  assert drawn_B2.max() == 99


def test_pairs_have_different_parts_and_both_orders():
  found = pairs.draw(np.random.default_rng(0), num_pairs=100, num_ids=15)
  for part, length in ((found.names, 2), (found.descriptions, 3)):
    assert len(np.unique(part, axis=0)) == 100
    assert part.shape == (100, length)
    assert part.min() >= 3
    assert part.max() < 15
  forward, is_description = found.rows(pairs.FORWARD)
  backward, is_name = found.rows(pairs.BACKWARD)
  n1, n2 = found.names[0]
  d1, d2, d3 = found.descriptions[0]
  assert forward[0].tolist() == [0, n1, n2, 2, d1, d2, d3]
  assert backward[0].tolist() == [1, d1, d2, d3, 2, n1, n2]
  assert is_description[0].tolist() == [False] * 4 + [True] * 3
  assert is_name[0].tolist() == [False] * 5 + [True] * 2
  with pytest.raises(ValueError, match='got 145 with 15 ids, expected at most'):
    pairs.draw(np.random.default_rng(0), 145, 15)


WORDS = biographies.Vocabulary(names=(3, 4), values=(5, 2, 6), phrases=2)


def test_texts_tell_all_values_of_a_person():
  people = biographies.draw(np.random.default_rng(0), WORDS, 12)
  # All names, once each.
  assert len({tuple(name) for name in people.names_NP.tolist()}) == 12
  rng = np.random.default_rng(1)
  everybody = np.arange(12)
  for is_permuted in (False, True):
    ids_BT, is_value_BT = people.texts(everybody, rng, is_permuted=is_permuted)
    assert ids_BT.shape == (12, WORDS.text_length)
    assert ids_BT.max() < WORDS.num_ids
    np.testing.assert_array_equal(ids_BT[:, :2], people.names_NP)
    told_BA = ids_BT[is_value_BT].reshape(12, 3)
    np.testing.assert_array_equal(np.sort(told_BA), np.sort(people.values_NA))
    assert np.array_equal(told_BA, people.values_NA) != is_permuted
    # The phrase says which attribute follows.
    phrases_BA = ids_BT[:, 2::2]
    attribute_BA = (phrases_BA - WORDS.first_phrase) // WORDS.phrases
    np.testing.assert_array_equal(
      np.take_along_axis(people.values_NA, attribute_BA, axis=1), told_BA
    )
    assert len(np.unique(phrases_BA)) == 3 * WORDS.phrases
  with pytest.raises(ValueError, match='people: got 13, expected 1 to 12'):
    biographies.draw(rng, WORDS, 13)
  with pytest.raises(ValueError, match=r'values: got \(3, 0\)'):
    biographies.Vocabulary(names=(3,), values=(3, 0))


def test_questions_share_no_id_with_phrases_and_end_with_the_value():
  people = biographies.draw(np.random.default_rng(0), WORDS, 12)
  chosen_B, attribute_B = np.array([3, 3, 7]), np.array([0, 2, 1])
  ids_BT, is_answer_BT = people.questions(chosen_B, attribute_B)
  assert ids_BT.shape == (3, WORDS.question_length)
  np.testing.assert_array_equal(
    ids_BT[is_answer_BT], people.values_NA[chosen_B, attribute_B]
  )
  assert len({tuple(row) for row in ids_BT[:, :-1].tolist()}) == 3
  assert ids_BT[:, -2].max() < WORDS.first_phrase
  assert ids_BT[:, :-2].min() >= WORDS.first_name
  assert WORDS.bits_per_person == pytest.approx(np.log2(60))
