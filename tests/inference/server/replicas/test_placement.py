"""Placement: the longest known prefix, within a margin of load."""

import random

from inference.server.replicas import placement

_BLOCK = placement.BLOCK


def _candidate(index, num_open=0, num_known=0, num_served=0):
  return placement.Candidate(
    index=index,
    num_open=num_open,
    num_known=num_known,
    num_served=num_served,
  )


def _chosen(*candidates, margin=2):
  return placement.choose(candidates, margin=margin).index


def test_the_longest_known_prefix_wins_unless_its_replica_is_too_busy():
  assert _chosen(_candidate(0, 0), _candidate(1, 2, num_known=1)) == 1
  assert _chosen(_candidate(0, 0), _candidate(1, 3, num_known=1)) == 0
  assert (
    _chosen(_candidate(0, 0, num_known=2), _candidate(1, 0, num_known=3)) == 1
  )
  # The second longest is near enough.
  three = _candidate(0), _candidate(1, 2, num_known=1), _candidate(2, 9, 9)
  assert _chosen(*three) == 1
  # Of two with the same prefix, the less busy.
  assert _chosen(_candidate(0, 2, 4), _candidate(1, 1, 4)) == 1


def test_without_a_known_prefix_the_least_busy_answers():
  assert _chosen(_candidate(0, 2), _candidate(1, 1), _candidate(2, 1)) == 1
  served = _candidate(0, 1, num_served=5), _candidate(1, 1, num_served=4)
  assert _chosen(*served) == 1


def test_blocks_are_those_of_the_beginning_in_one_scope():
  ids = tuple(range(3 * _BLOCK + 1))
  found = placement.blocks(('alice', ''), ids)
  assert len(found) == 3
  # The last token is computed, whatever is known.
  assert placement.blocks(('alice', ''), ids[:-1]) == found[:2]
  assert placement.blocks(('alice', ''), ids[:_BLOCK]) == []
  longer = placement.blocks(('alice', ''), (*ids, 7, 8))
  assert longer[:3] == found
  assert not set(placement.blocks(('bob', ''), ids)) & set(found)
  changed = placement.blocks(('alice', ''), (9, *ids[1:]))
  assert not set(changed) & set(found)
  assert placement.blocks(('alice', ''), ()) == []


def test_known_blocks_are_forgotten_oldest_first_and_beginnings_last():
  known = placement.Known(4 * _BLOCK)
  first, second = [1, 2, 3], [1, 9]
  known.add(first)
  assert known.num_known(first) == 3
  assert known.num_known(second) == 1
  known.add(second)  # four blocks
  assert known.num_known(first) == 3
  known.add([7])
  assert known.num_known(first) == 2  # its end has gone
  assert known.num_known(second) == 2
  assert placement.Known(0).num_known(first) == 0


def test_turns_of_conversations_stay_on_their_replica_and_load_is_even():
  rng = random.Random(0)
  replicas = [placement.Known(10**6) for _ in range(3)]
  home, served = {}, [0, 0, 0]
  talks = {name: [rng.randrange(99) for _ in range(90)] for name in range(30)}
  for _ in range(4):
    for name, ids in talks.items():
      found = placement.blocks((name,), ids)
      chosen = _chosen(
        *(
          _candidate(i, 0, each.num_known(found), served[i])
          for i, each in enumerate(replicas)
        )
      )
      replicas[chosen].add(found)
      served[chosen] += 1
      assert home.setdefault(name, chosen) == chosen
      ids += [rng.randrange(99) for _ in range(40)]
  assert served == [40, 40, 40]
