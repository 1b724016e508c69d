"""Sides of a comparison, what is said of them, and one-line errors."""

import functools
import json
import pathlib
from unittest import mock

from absl import app, flags
from absl.testing import flagsaver
import pytest

from studies import compare
from studies.common import load, quiet_run
from studies.comparison import run_values, sides, trained
from training.optimizer import update_rules


def _write(workdir, seed, loss, *, step=3, **config):
  workdir.mkdir(parents=True)
  config = {'seed': seed, 'name': workdir.name, **config}
  (workdir / 'run.json').write_text(json.dumps({'config': config}))
  records = [
    {'kind': 'train', 'step': 1, 'loss': 9.0},
    {'kind': 'speed', 'step': 1, 'tokens_per_s': 1.0},
    {'kind': 'speed', 'step': 2, 'tokens_per_s': 10.0},
    {'kind': 'speed', 'step': step, 'tokens_per_s': 12.0},
    {'kind': 'eval', 'step': step, 'loss': loss, 'accuracy': 1 - loss},
  ]
  lines = [json.dumps(record) + '\n' for record in records]
  (workdir / 'metrics.jsonl').write_text(''.join(lines))


@pytest.fixture(name='runs')
def _runs(tmp_path):
  for seed in (0, 1):
    _write(tmp_path / f'a/seed{seed}', seed, 0.1 + seed / 100, lr=1)
    _write(tmp_path / f'lr/trials/0001/seed{seed}', seed, 0.3, lr=2)
  _write(tmp_path / 'one', 0, 0.2, lr=3)
  _write(tmp_path / 'late', 5, 0.2, lr=1, step=6)
  (tmp_path / 'lr/results.json').write_text('{"best": 1}')
  (tmp_path / 'empty').mkdir()
  return tmp_path


def test_sides_are_lists_directories_and_trials(runs):
  expected = {0: 0.1, 1: 0.11}
  assert sides.read(f'{runs}/a', 'loss').values == expected
  listed = f'{runs}/a/seed0,{runs}/a/seed1'
  assert sides.read(listed, 'loss').values == expected
  for trial in ('lr:1', 'lr:best', 'lr/trials/0001'):
    found = sides.read(f'{runs}/{trial}', 'loss')
    assert found.values == {0: 0.3, 1: 0.3}
  assert sides.read(f'{runs}/one', 'accuracy').values == {0: 0.8}


def test_a_speed_is_the_median_of_its_reports(runs):
  found = sides.read(f'{runs}/one', 'tokens_per_s')
  assert found.values == {0: 10.0}


def test_two_single_runs_say_what_would_be_enough(runs):
  found = compare.report(
    sides.read(f'{runs}/a/seed0', 'loss'),
    sides.read(f'{runs}/one', 'loss'),
    'loss',
  )
  assert 'loss 0.2000, one run (seed 0)' in found
  assert 'config     lr: 1 | 3' in found
  assert 'difference +0.1\n' in found
  # .1 / 2.8016 x sqrt(3 / 2), and with 10 / 2
  assert '3 are enough up to 0.044, 10 are enough up to 0.08' in found


def test_sides_with_seeds_have_a_verdict(runs):
  first, second = (sides.read(f'{runs}/{n}', 'loss') for n in ('a', 'lr:best'))
  found = compare.report(first, second, 'loss')
  assert 'loss 0.1050, 2 seeds: 0.1000 0.1100' in found
  assert '95 % interval +0.1315 to +0.2585 (paired by seed' in found
  assert 'verdict    they differ; seeds to know a difference of this' in found
  late = sides.read(f'{runs}/late', 'loss')
  assert 'last evaluations at steps 3 and 6' in compare.report(
    first, late, 'loss'
  )
  same = compare.report(first, first, 'loss')
  assert 'config     the same, with the same seeds' in same
  assert 'verdict    no difference' in same


@pytest.mark.parametrize(
  ('place', 'metric', 'words'),
  [
    ('{0}/none', 'loss', 'got a directory without runs, expected a workdir'),
    ('{0}/lr', 'loss', r'for a trial of this sweep, write .*/lr:3$'),
    ('{0}/lr:7', 'loss', 'got no trial 7, expected one of the 1 trials of'),
    ('{0}/a:7', 'loss', 'which is no --workdir of sweep.py; expected one, as'),
    ('{0}/a:best', 'loss', 'a:best: got no results of a sweep'),
    (
      '{0}/a',
      'acc',
      "--metric: got 'acc', expected one of accuracy, loss",
    ),
    ('{0}/a', 'acuracy', 'did you mean accuracy'),
    ('{0}/one,{0}/one', 'loss', 'got a second run of seed 0, expected each'),
    ('{0}/a/seed1,{0}/one', 'loss', r'got a run with lr: 1 \| 3 \(as in'),
    ('{0}/a/seed1,{0}/late', 'loss', 'got a last evaluation at step 6, expec'),
  ],
)
def test_a_wrong_side_is_one_line(runs, place, metric, words):
  with pytest.raises(ValueError, match=words):
    sides.read(place.format(runs), metric)


def test_a_run_without_an_evaluation_is_one_line(runs):
  (runs / 'one/metrics.jsonl').write_text('')
  with pytest.raises(ValueError, match='got a run without an evaluation'):
    run_values.last(runs / 'one', 'loss')


EXPERIMENT = """
from tests.helpers.training import tiny_experiment
from training.optimizer import chain

def get_config(variant):
  rates = {'low': 0.1, 'high': 0.2}
  if variant not in rates:
    raise ValueError(f'variant: got {variant!r}, expected low or high')
  optimizer = chain.OptimizerConfig(peak_lr=rates[variant], warmup_steps=1)
  return tiny_experiment.make(name=variant, optimizer=optimizer)
"""


def _main(capsys, monkeypatch, *sides, **values):
  # So that the experiment finds the tests.
  monkeypatch.syspath_prepend(pathlib.Path(__file__).parents[3])
  flags.FLAGS.mark_as_parsed()
  with flagsaver.flagsaver(**values):
    code = compare.main(['compare', *sides])
  return code, capsys.readouterr().out


def test_experiments_are_trained_and_compared(tmp_path, capsys, monkeypatch):
  file = tmp_path / 'tiny.py'
  file.write_text(EXPERIMENT)
  started = []

  # As a run would: tests of sweeps train in this way.
  def fake_run(experiment, workdir):
    started.append(workdir.name)
    rate, seed = experiment.optimizer.peak_lr, experiment.seed
    loss = rate + seed + experiment.num_steps
    _write(workdir, seed, loss, peak_lr=rate)
    return mock.Mock(exit_code=0)

  monkeypatch.setattr(quiet_run, 'run', fake_run)
  run = functools.partial(
    _main, capsys, monkeypatch, f'{file}:low', workdir=f'{tmp_path}/out'
  )
  figure = tmp_path / 'a.svg'
  code, out = run(f'{file}:high', seeds=2, steps=7, figure=str(figure))
  assert not code, out
  assert started == ['low-seed0', 'high-seed0', 'low-seed1', 'high-seed1']
  for line in (
    f'{file}:low seed 1: 8.1000 nats/token',
    f'{file}:low: loss 7.6000, 2 seeds: 7.1000 8.1000',
    'config     peak_lr: 0.1 | 0.2',
    'verdict    cannot be told: all seeds differ alike',
  ):
    assert line in out
  assert figure.stat().st_size
  code, out = run(f'{file}:none')
  assert code == 1
  assert out == "error: variant: got 'none', expected low or high\n"


def test_a_spread_is_borrowed_by_a_flag(runs, capsys, monkeypatch):
  sides = (f'{runs}/a/seed0', f'{runs}/one')
  run = functools.partial(_main, capsys, monkeypatch, *sides)
  code, out = run(spread_of=f'{runs}/a')
  assert not code
  assert 'with the spread of --spread_of; p = ' in out
  code, out = run(spread_of=f'{runs}/one')
  assert code == 1
  assert 'one run, expected several seeds' in out
  with pytest.raises(app.UsageError, match='got 2 sides, expected two or more'):
    _main(capsys, monkeypatch, sides[0], sides[0])


def test_curves_average_steps_and_leave_out_the_rest(tmp_path):
  for seed in (0, 1):
    workdir = tmp_path / f'seed{seed}'
    _write(workdir, seed, 0.1)
    records = [
      {'kind': 'train', 'step': step + 1, 'loss': step + 2.0 * seed}
      for step in range(25)
    ]
    with (workdir / 'metrics.jsonl').open('w') as file:
      file.writelines(json.dumps(record) + '\n' for record in records)
      file.write('{"kind": "eval", "step": 25, "loss": 1.0}\n')
  panel = trained.curves([sides.read(str(tmp_path), 'loss')])
  (line,) = panel.lines.values()
  assert line.x == [5.0, 15.0]
  assert line.y == [5.5, 15.5]
  assert line.low == [4.5, 14.5]
  assert line.high == [6.5, 16.5]


def test_an_unknown_file_is_refused(tmp_path):
  with pytest.raises(ValueError, match='side: got .* expected a Python'):
    load.experiment(f'{tmp_path}/absent.py:adamw', 'side')


def test_a_page_is_loaded_with_its_variant():
  muon = load.experiment('experiments/muon_against_adamw.py:muon')
  assert isinstance(muon.optimizer.rule, update_rules.Muon)
  cosine, wsd = (
    load.experiment(f'experiments/wsd_against_cosine.py:{variant}')
    for variant in ('cosine', 'wsd')
  )
  assert (cosine.name, wsd.name) == ('equal_steps_adamw', 'equal_steps_wsd')
