"""Three ways to know: the index, the rows, the crossing points, a short run."""

import json

from absl.testing import flagsaver
import numpy as np
import pytest

from data.synthetic import people
from studies import three_ways_to_know as study


def known(**changes):
  fields = {
    'new': 0.5, 'old': 1.0, 'at_once': 0.0, 'per_question': 10.0, 'digest': 'a',
  }  # fmt: skip
  return study.Known(**(fields | changes))


def test_the_index_finds_the_statement_of_a_question():
  everybody = people.draw(np.random.default_rng(0), 200)
  statements = [everybody.statement(i, i % 3) for i in range(200)]
  index = study.Index(statements)
  for i in range(0, 200, 7):
    assert index.find(everybody.question(i), 3)[0] == statements[i]


def test_a_context_row_trains_answers_alone_and_has_their_statements():
  rng = np.random.default_rng(0)
  for _ in range(20):
    row, is_trained = study._context_row(rng)
    places = np.flatnonzero(is_trained).tolist()
    assert len(places) == 3
    first = places[0] - 3
    # 4 n1 n2 v, three times, and nothing behind them.
    for place in places:
      assert row[place - 3] == 4
      assert row[place] in row[:first]
    assert not row[places[-1] + 1 :].any()


def test_a_repeated_row_trains_the_statements_that_come_again():
  rng = np.random.default_rng(0)
  for _ in range(20):
    row, is_trained = study._repeated_row(rng)
    (begin, *_), length = np.flatnonzero(is_trained), (row > 0).sum()
    assert begin * 2 == length == begin + is_trained.sum()
    assert sorted(row[:begin]) == sorted(row[begin:length])


def test_costs_cross_where_the_context_has_cost_as_much():
  context = known(per_question=110.0)
  assert study.crossing(known(at_once=1000.0), context) == 10.0
  assert study.crossing(known(at_once=1.0), known(per_question=5.0)) == np.inf


@pytest.mark.slow
def test_a_short_run_says_which_weights_changed(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(study, '_BASE_STEPS', 100)
  monkeypatch.setattr(study, '_TUNE_STEPS', 100)
  monkeypatch.setattr(study, '_OLD', 20)
  monkeypatch.setattr(study, '_NEW', 8)
  figure = tmp_path / 'ways.svg'
  with flagsaver.flagsaver(workdir=str(tmp_path), seeds=1, figure=str(figure)):
    study.main([''])
    first = capsys.readouterr().out
    study.main([''])
  assert capsys.readouterr().out == first
  (kept,) = tmp_path.glob('ways_0_*.json')
  ways = json.loads(kept.read_text())
  assert tuple(ways) == study.WAYS
  base = ways['context']['digest']
  for name, way in ways.items():
    assert (way['digest'] == base) == (name == 'context' or 'LoRA' in name)
    assert (way['at_once'] == 0) == (name == 'context')
    assert (way['per_question'] < ways['context']['per_question']) == (
      name != 'context'
    )
  assert '| the same, and an adapter' in first
  assert 'FLOPs, training and answers' in figure.read_text()


def test_people_are_stated_and_asked():
  one = people.draw(np.random.default_rng(0), 5)[:2]
  n1, n2, value = int(one.first[1]), int(one.last[1]), int(one.value[1])
  assert one.statement(1, 0) == [1, n1, n2, value]
  assert one.statement(1, 1) == [2, value, n1, n2]
  assert one.statement(1, 2) == [3, n1, 5, n2, value]
  assert one.question(1) == [4, n1, n2, value]
  for seed in range(9):
    alike = people.draw_alike(np.random.default_rng(seed))
    names = [*zip(alike.first.tolist(), alike.last.tolist(), strict=True)]
    assert len({*names}) == 3
    assert len({*alike.first.tolist()}) == len({*alike.last.tolist()}) == 2
  ids = np.array(one.statement(1, 2))
  assert people.is_name(ids).tolist() == [False, True, False, True, False]
  with pytest.raises(ValueError, match='template: got 3, expected 0 to 2'):
    one.statement(0, 3)
  with pytest.raises(ValueError, match='expected 1 to 1600 different names'):
    people.draw(np.random.default_rng(0), 1601)
