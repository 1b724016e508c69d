"""A grid of runs: its sizes and steps, branching, resuming, and its data."""

import dataclasses
import pathlib

import pytest

from data import sources
from experiments import presets
from experiments.scaling import bytes as page
from models import flops
from storage import file_names
from studies.scaling import isoflop
from tests.helpers.training import tiny_run
from training.optimizer import chain

FILE = 'experiments/scaling/bytes.py'


@pytest.fixture(scope='module')
def grid():
  """Returns the grid of the experiment; reading it takes a second."""
  return isoflop.make_grid(page, text='text/{split}.txt')


def test_the_grid_has_the_flops_of_its_budgets(grid):
  assert set(grid.runs) == set(grid.trunks)
  for budget in page.BUDGETS:
    runs = [r for of in grid.runs.values() for r in of if r.budget == budget]
    assert len(runs) >= 4
    for run in runs:
      # Half a step of the shortest run, of more than 250 steps.
      assert 6 * run.num_params * run.num_tokens == pytest.approx(
        budget, rel=2e-3
      )
      steps = run.experiment.num_steps
      assert run.branch_step == steps - run.experiment.optimizer.decay_steps
      run.experiment.validate()
  # The trunk is shared: less than all runs on their own would take.
  alone = sum(r.experiment.num_steps for of in grid.runs.values() for r in of)
  assert grid.num_steps < 0.75 * alone


def test_a_grid_with_too_few_sizes_is_refused():
  with pytest.raises(ValueError, match=r'sizes at 1\.5e\+08 FLOPs: got 0'):
    isoflop.make_grid(page, 1e-3)


def test_a_text_takes_the_place_of_the_data(grid):
  run = next(iter(grid.runs.values()))[0]
  assert run.experiment.data.open_source is sources.text_files
  assert run.experiment.data.path == 'text/{split}.txt'


def test_a_file_without_a_grid_is_refused(tmp_path):
  assert isoflop.load(FILE).SIZES == page.SIZES
  with pytest.raises(ValueError, match='without SIZES, BUDGETS'):
    isoflop.load('experiments/quickstart.py')
  with pytest.raises(ValueError, match='--config: got .* expected a Python'):
    isoflop.load(str(tmp_path / 'nothing.py'))


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
  """Returns the path of a small text."""
  directory = tmp_path_factory.mktemp('corpus') / 'text'
  directory.mkdir()
  return tiny_run.write_corpus(directory)


def _grid(corpus, budgets):
  """Returns a grid of one size; `make_grid` would ask for more."""

  def get_config(variant):
    experiment = tiny_run.experiment(
      corpus,
      name=f'grid_{variant}',
      model=presets.llama(
        vocab_size=264, num_layers=1, num_heads=1, num_kv_heads=1,
        width=int(variant), mlp_width=16, length=16,
      ),
      optimizer=chain.OptimizerConfig(
        schedule='constant', warmup_steps=2, end_lr=1e-4
      ),
    )  # fmt: skip
    experiment.freeze.enabled = False
    return experiment

  trunk = get_config('8')
  num_params = flops.num_params(trunk.model)
  per_step = 6 * num_params * 8 * 16
  runs = [
    isoflop._run(trunk, num_params, steps * per_step, 0.25) for steps in budgets
  ]
  return isoflop.Grid(trunks={trunk.name: trunk}, runs={trunk.name: runs})


@pytest.fixture(scope='module')
def measured(corpus, tmp_path_factory):
  """Returns the workdir of a finished grid, and its points."""
  workdir = tmp_path_factory.mktemp('grid')
  return workdir, isoflop.measure(_grid(corpus, (6, 12)), workdir)


@pytest.mark.slow
def test_runs_are_branched_off_one_trunk(measured):
  workdir, points = measured
  assert points.tokens.tolist() == [6 * 128, 12 * 128]
  assert points.losses[1] < points.losses[0]
  assert sorted(p.name for p in workdir.iterdir()) == [
    'grid_8-12',
    'grid_8-6',
    'grid_8-trunk',
  ]


@pytest.mark.slow
def test_finished_runs_are_not_repeated(corpus, measured, capsys, monkeypatch):
  workdir, points = measured
  started = []
  original = isoflop._run_to_end

  def counted(experiment, place):
    started.append(place.name)
    return original(experiment, place)

  monkeypatch.setattr(isoflop, '_run_to_end', counted)
  # A shorter budget that comes later: the trunk is past it, and its run starts
  # at step 0.
  more = isoflop.measure(_grid(corpus, (4, 6, 12)), workdir)
  assert started == ['grid_8-4']
  assert more.losses.tolist()[1:] == points.losses.tolist()
  said = capsys.readouterr().out
  assert said.count('(was there)') == 2
  assert 'is past step 3' in said


@pytest.mark.slow
def test_a_run_of_other_values_is_refused(corpus, measured):
  workdir, points = measured
  (runs,) = _grid(corpus, (6,)).runs.values()
  place = workdir / runs[0].name
  assert isoflop.finished(runs[0], place) == points.losses[0]
  optimizer = dataclasses.replace(runs[0].experiment.optimizer, peak_lr=0.5)
  other = dataclasses.replace(
    runs[0],
    experiment=dataclasses.replace(runs[0].experiment, optimizer=optimizer),
  )
  with pytest.raises(ValueError, match=r'other values \(optimizer\.peak_lr'):
    isoflop.finished(other, place)
  # A run that was cut short counts as none.
  records = (place / file_names.METRICS).read_text()
  (place / file_names.METRICS).write_text(records.replace('"eval"', '"cut"'))
  try:
    assert isoflop.finished(runs[0], place) is None
  finally:
    (place / file_names.METRICS).write_text(records)


def test_a_text_of_one_file_is_cut_in_two(tmp_path):
  path = tmp_path / 'all.txt'
  lines = [f'line {i}\n' for i in range(200)]
  path.write_text(''.join(lines))
  cut = isoflop.cut_text(str(path), tmp_path / 'run')
  parts = [
    pathlib.Path(cut.format(split=split)).read_text()
    for split in ('train', 'validation')
  ]
  assert ''.join(parts) == ''.join(lines)
  assert parts[0].endswith('\n')
  assert 5 <= parts[1].count('\n') <= 15
  assert isoflop.cut_text(str(path), tmp_path / 'run') == cut
  path.write_text('another text\n' * 50)
  with pytest.raises(ValueError, match='was cut from; use another --workdir'):
    isoflop.cut_text(str(path), tmp_path / 'run')
  assert isoflop.cut_text('a/{split}.txt', tmp_path) == 'a/{split}.txt'
  with pytest.raises(ValueError, match="--path: got '.*nothing.txt'"):
    isoflop.cut_text(str(tmp_path / 'nothing.txt'), tmp_path)
