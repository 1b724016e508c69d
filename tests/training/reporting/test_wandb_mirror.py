"""The copy at W&B: every record once, whatever ends the process, or fails."""

import json
import sys
import types

import pytest

from training.reporting import wandb_mirror


class _Run:
  def __init__(self, options):
    self.options = options
    self.logged = []
    self.metrics = []
    self.exit_code = None

  def define_metric(self, name, *, step_metric):
    self.metrics.append((name, step_metric))

  def log(self, values):
    self.logged.append(values)

  def finish(self, exit_code):
    self.exit_code = exit_code


@pytest.fixture(name='wandb')
def _wandb(monkeypatch):
  """A W&B that keeps what it receives, by the run's id."""
  module = types.ModuleType('wandb')
  module.runs = []
  module.login = lambda: True

  def init(**options):
    module.runs.append(_Run(options))
    return module.runs[-1]

  module.init = init
  monkeypatch.setitem(sys.modules, 'wandb', module)
  monkeypatch.delenv('WANDB_MODE', raising=False)
  return module


def _write(workdir, steps, *, mode='w'):
  workdir.mkdir(exist_ok=True)
  (workdir / 'run.json').write_text(json.dumps({'config': {'seed': 3}}))
  records = [{'kind': 'train', 'step': step, 'loss': 0.5} for step in steps]
  with (workdir / 'metrics.jsonl').open(mode) as file:
    file.writelines(json.dumps(record) + '\n' for record in records)


def _steps(run):
  return [values['step'] for values in run.logged]


def test_every_record_is_sent_once(tmp_path, wandb):
  workdir = tmp_path / 'a'
  mirror = wandb_mirror.Mirror(workdir, 'team/lr', wandb, group='g')
  assert mirror.sync() == 0  # no run yet
  assert not wandb.runs
  _write(workdir, [1, 2])
  with (workdir / 'metrics.jsonl').open('a') as file:
    file.write('{"kind": "eval", "step": 2, "loss": 0.25, "text": "no"}\n')
    file.write('{"kind": "tra')  # being written
  assert mirror.sync() == 3
  assert mirror.sync() == 0
  (run,) = wandb.runs
  assert run.logged[1:] == [
    {'step': 2, 'train/loss': 0.5},
    {'step': 2, 'eval/loss': 0.25},
  ]
  assert run.metrics == [('*', 'step')]
  wanted = {
    'project': 'lr',
    'entity': 'team',
    'name': 'a',
    'group': 'g',
    'resume': 'allow',
    'config': {'seed': 3},
    'dir': str(workdir),
  }
  assert wanted.items() <= run.options.items()
  mirror.close()
  assert run.exit_code == 0


def test_a_run_that_goes_back_goes_on_in_the_same_run(tmp_path, wandb):
  workdir = tmp_path / 'a'
  _write(workdir, [1, 2, 3])
  first = wandb_mirror.Mirror(workdir, 'lr', wandb)
  first.sync()
  # A start from the checkpoint of step 1, in the same process and in another.
  (workdir / 'metrics.jsonl').unlink()
  _write(workdir, [1, 2])
  assert first.sync() == 0
  _write(workdir, [3, 4], mode='a')
  assert first.sync() == 1
  _write(workdir, [5], mode='a')
  assert wandb_mirror.Mirror(workdir, 'lr', wandb).sync() == 1
  one, other = wandb.runs
  assert (_steps(one), _steps(other)) == ([1, 2, 3, 4], [5])
  assert one.options['id'] == other.options['id']
  # Another project has them all, in a run of its own.
  assert wandb_mirror.Mirror(workdir, 'other', wandb).sync() == 5
  assert wandb.runs[-1].options['id'] != one.options['id']


def test_a_failure_is_told_once_and_ends_nothing(tmp_path, wandb):
  def log(run, values):
    raise ConnectionError('no\nnetwork')

  lines = []
  _Run.log, kept = log, _Run.log
  try:
    with wandb_mirror.following(tmp_path, 'lr', lines.append, seconds=0.01):
      _write(tmp_path, [1, 2])
  finally:
    _Run.log = kept
  (line,) = lines
  assert (
    'got ConnectionError: no network; the run goes on, and the next' in line
  )
  with wandb_mirror.following(tmp_path, 'lr', lines.append):
    pass
  assert _steps(wandb.runs[-1]) == [1, 2]
  assert wandb.runs[-1].exit_code == 0


def test_a_run_that_fails_has_failed_there_too(tmp_path, wandb):
  _write(tmp_path, [1])
  with (
    pytest.raises(FloatingPointError),
    wandb_mirror.following(tmp_path, 'lr', print),
  ):
    raise FloatingPointError
  assert wandb.runs[-1].exit_code == 1
  assert _steps(wandb.runs[-1]) == [1]


@pytest.mark.parametrize(
  ('project', 'words'),
  [
    ('a/b/c', "--wandb: got 'a/b/c', expected PROJECT or TEAM/PROJECT"),
    ('/a', "--wandb: got '/a', expected PROJECT or TEAM/PROJECT"),
  ],
)
@pytest.mark.usefixtures('wandb')
def test_a_wrong_project_is_one_line(tmp_path, project, words):
  with (
    pytest.raises(ValueError, match=words),
    wandb_mirror.following(tmp_path, project, print),
  ):
    pytest.fail('the run has begun')


def test_a_missing_key_is_one_line(wandb, monkeypatch):
  wandb.login = lambda: False
  with pytest.raises(ValueError, match=r'got no key of W&B, expected one; run'):
    wandb_mirror.library('lr')
  monkeypatch.setenv('WANDB_MODE', 'offline')
  assert wandb_mirror.library('lr') is wandb


def test_a_missing_library_is_one_line(monkeypatch):
  monkeypatch.setitem(sys.modules, 'wandb', None)
  with pytest.raises(ValueError, match='got no wandb, expected it to be inst'):
    wandb_mirror.library('lr')
