"""Weights that are made again from the recipe of their frozen directory."""

import pathlib

import pytest

from studies import rebuild
from tests.helpers.training import tiny_run

SMALL = {'num_steps': 4, 'log_every_steps': 1, 'eval_every_steps': 0}


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
  return tiny_run.write_corpus(tmp_path_factory.mktemp('corpus'))


@pytest.fixture(scope='module')
def frozen(corpus, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('first')
  tiny_run.run(tiny_run.experiment(corpus, **SMALL), workdir)
  return workdir / 'frozen'


def again(frozen, corpus, workdir, *changes):
  """Returns the exit code of a rebuild and its lines."""
  lines = []
  places = f'data.path={corpus}', f'data.data_dir={workdir.parent / "kept"}'
  code = rebuild.rebuild(frozen, workdir, [*places, *changes], lines.append)
  return code, lines


@pytest.mark.slow
def test_the_same_recipe_gives_the_same_weights(frozen, corpus, tmp_path):
  code, lines = again(frozen, corpus, tmp_path / 'w')
  assert (code, lines) == (0, [rebuild.EQUAL_TEXT])
  # The directory that was made again can be made again.
  code, _ = again(tmp_path / 'w/frozen', corpus, tmp_path / 'w2')
  assert code == 0


@pytest.mark.slow
def test_a_fine_tuned_child_gives_the_same_weights(frozen, corpus, tmp_path):
  tuned = tiny_run.tuning(corpus, frozen, **SMALL)
  tiny_run.run(tuned, tmp_path / 'tuned')
  parent = f'init_from={frozen}'
  code, lines = again(tmp_path / 'tuned/frozen', corpus, tmp_path / 'w', parent)
  assert (code, lines) == (0, [rebuild.EQUAL_TEXT])
  with pytest.raises(ValueError, match='init_from: got .*, expected'):
    again(
      tmp_path / 'tuned/frozen',
      corpus,
      tmp_path / 'w2',
      f'init_from={tmp_path / "tuned/frozen"}',
    )
  with pytest.raises(ValueError, match='give the directory with the weights'):
    again(tmp_path / 'tuned/frozen', corpus, tmp_path / 'w3')


@pytest.mark.slow
def test_another_seed_is_told_and_parts_at_the_first_step(
  frozen, corpus, tmp_path
):
  code, lines = again(frozen, corpus, tmp_path / 'w', 'seed=1')
  assert code == 3
  assert lines[0] == 'differs    seed: 0 made it, this is 1'
  assert 'that differs is at step 1' in lines[1]
  assert 'relative distance' in lines[1]


@pytest.mark.slow
def test_a_changed_byte_of_data_is_refused_before_training(frozen, tmp_path):
  other = tiny_run.write_corpus(tmp_path)
  first = next(pathlib.Path(tmp_path / 'train').iterdir())
  first.write_text(first.read_text() + '!')
  with pytest.raises(ValueError, match=r'data \S+: got tokens .* another text'):
    again(frozen, other, tmp_path / 'w')
  assert not (tmp_path / 'w').exists()


@pytest.mark.parametrize(
  ('change', 'words'),
  [
    ('seed', 'expected FIELD=VALUE'),
    ('no.field=1', 'expected a field'),
    ('seed=one', 'expected a value like 0'),
  ],
)
def test_bad_changes_are_refused(frozen, corpus, tmp_path, change, words):
  with pytest.raises(ValueError, match=words):
    again(frozen, corpus, tmp_path / 'w', change)
