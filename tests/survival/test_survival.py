"""The survival suites, shorter than `make survive` runs them."""

import pytest

from tests.survival import damage, figure, full_disk, kills, process, suite


@pytest.fixture(scope='module')
def arena(tmp_path_factory):
  return suite.prepare(tmp_path_factory.mktemp('arena'))


def _check(tally):
  assert not tally.failures, '\n'.join(tally.failures)
  if tally.skipped:
    pytest.skip(tally.skipped)


@pytest.mark.slow
def test_a_run_that_is_killed_becomes_the_same_run(arena):
  _check(suite.kill(arena, 3))


@pytest.mark.slow
@pytest.mark.parametrize(
  ('what', 'count'),
  [
    ('bit flips', 20),
    ('truncations', 5),
    ('half deletions', 5),
    ('added files', 1),
  ],
)
def test_damage_is_found_named_and_passed_over(arena, what, count):
  _check(suite.damage_checkpoints(arena, what, count))


@pytest.mark.slow
def test_if_all_is_damaged_nothing_is_changed(arena):
  _check(suite.damage_all(arena, 2))


@pytest.mark.slow
def test_saves_onto_a_full_disk_are_made_up_for(arena):
  for tally in suite.fill_disk(arena, is_short=True):
    _check(tally)


# ------------------------------------------------------------------------------
# The suites can fail.


@pytest.mark.slow
def test_a_damage_that_does_nothing_is_a_failure(arena):
  def none(directory, rng):
    return directory / 'seal.json'

  wrong = damage.try_damage(arena.whole, none, arena.rng('none'))
  assert any('was frozen' in text for text in wrong)
  assert any('went on from 240' in text for text in wrong)


def test_the_table_counts_failures_and_tells_what_was_skipped():
  told = suite.table(
    [
      suite.Tally(what='a', tried=3, failures=['x'], detail='steps 3'),
      suite.Tally(what='bc', tried=0, skipped='no disk'),
    ]
  )
  assert told.splitlines() == [
    '    tried  passed  failed',
    'a       3       2       1  steps 3',
    'bc      0       0       0  skipped: no disk',
  ]


def test_every_phase_is_aimed_at_and_the_freeze_last():
  arena = suite.Arena(directory=None, corpus='')
  planned = kills.plan(20, arena.rng('kill'))
  assert len(planned) == 20
  assert {phase for phase, _ in planned} == set(kills.PHASES)
  assert [step for _, step in planned] == sorted(step for _, step in planned)
  assert planned == kills.plan(20, arena.rng('kill'))


def test_the_figure_says_whether_the_curves_are_one(tmp_path):
  whole = [{'step': i, 'loss': 3.0 / i} for i in (1, 2, 3)]
  figure.write(tmp_path / 'a.svg', whole, whole, [2])
  assert '3 losses, all equal to the bit' in (tmp_path / 'a.svg').read_text()
  other = [*whole[:2], {'step': 3, 'loss': 1.0000001}]
  figure.write(tmp_path / 'b.svg', whole, other, [2])
  assert 'NOT equal' in (tmp_path / 'b.svg').read_text()


def test_what_is_read_from_a_growing_file_is_whole(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  assert process.tail(path) == []
  path.write_text('{"step": 1}\n{"step": 2}\n{"st')
  assert process.tail(path) == [{'step': 1}, {'step': 2}]
  assert process.tail(path, 20) == [{'step': 2}]
  assert full_disk.saves(tmp_path / 'none') == []
