"""Turns, ratios, tables and the JSON that a benchmark leaves behind."""

import json
import os

from benchmarks.common import timing


def test_sides_take_turns_and_the_order_is_reversed_every_other_round():
  order = []

  def turn(name, seconds):
    def run():
      order.append(name)
      return seconds

    return run

  taken = timing.interleave({'a': turn('a', 1.0), 'b': turn('b', 2.0)}, 3)
  assert order == ['a', 'b', 'b', 'a', 'a', 'b']
  assert taken == {'a': [1.0] * 3, 'b': [2.0] * 3}


def test_ratio_is_the_median_of_the_rounds_ratios():
  # The machine was ten times slower in the last round, for both sides; the
  # ratio of the medians would be 2 / 3.
  assert timing.median_ratio([2.0, 3.0, 20.0], [1.0, 3.0, 10.0]) == 2.0


def test_table_aligns_columns():
  text = timing.table('T', [('', 'tokens/s'), ('ours', '1'), ('peer', '12')])
  assert text.splitlines() == [
    'T',
    '        tokens/s',
    '  ours         1',
    '  peer        12',
  ]


def test_json_is_written_whole_into_new_directories(tmp_path):
  path = tmp_path / 'new' / 'result.json'
  timing.write_json(str(path), {'ratio': 1.5})
  timing.write_json(str(path), {'ratio': 2.5})
  assert json.loads(path.read_text()) == {'ratio': 2.5}
  assert [file.name for file in path.parent.iterdir()] == ['result.json']


def test_a_busy_machine_is_pointed_out(monkeypatch):
  monkeypatch.setattr(os, 'cpu_count', lambda: 4)
  monkeypatch.setattr(os, 'getloadavg', lambda: (3.0, 0.0, 0.0))
  assert 'load average 3.0 on 4 cores' in timing.busy_note()
  monkeypatch.setattr(os, 'getloadavg', lambda: (1.0, 9.0, 9.0))
  assert timing.busy_note() == ''
