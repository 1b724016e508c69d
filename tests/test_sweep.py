"""The command line of sweeps: results, and one clear line for each mistake."""

import pathlib
import struct
import sys
from unittest import mock

import pytest
from tensorboardX.proto import event_pb2, plugin_hparams_pb2

from tests.helpers import commands
from tests.helpers.training import tiny_run

SMALL = [
  '--config.num_steps=4',
  '--config.optimizer.warmup_steps=1',
  '--config.eval_every_steps=2',
]
EXPERIMENT = """
from tests.helpers.training import tiny_run

def get_config():
  return tiny_run.experiment({corpus!r})
"""
SWEEP = """
from training import sweep

def get_sweep():
  return sweep.Sweep(
    name='a',
    parameters={{{parameters}}},
    num_seeds=2,
    {fields}
  )
"""
RATES = "'optimizer.peak_lr': sweep.LogUniform(1e-3, 1e-1, points=3)"


@pytest.fixture(name='place')
def _place(tmp_path):
  corpus = tiny_run.write_corpus(tmp_path)
  (tmp_path / 'tiny.py').write_text(EXPERIMENT.format(corpus=corpus))
  return tmp_path


def _run(place, *flags, parameters=RATES, fields='', text=None):
  text = text or SWEEP.format(parameters=parameters, fields=fields)
  (place / 'sweep_file.py').write_text(text)
  # So that the experiment finds the tests.
  with mock.patch.object(
    sys, 'path', [str(pathlib.Path(__file__).parents[1]), *sys.path]
  ):
    return commands.run(
      'sweep.py',
      f'--config={place}/tiny.py',
      f'--sweep={place}/sweep_file.py',
      f'--workdir={place}/out',
      '--compilation_cache=',
      *SMALL,
      *flags,
    )


def _error(done):
  assert done.returncode == 1, done.stdout + done.stderr
  (line,) = done.stderr.strip().splitlines()
  assert line.startswith('error: ')
  return line


def test_a_sweep_prints_its_table_and_ends_at_once_the_second_time(place):
  pytest.importorskip('optuna')
  done = _run(place)
  assert done.returncode == 0, done.stdout + done.stderr
  assert '3 trials x 2 seeds in one program' in done.stdout
  for line in ('trial 0: optimizer.peak_lr=0.001: complete', 'best       tria'):
    assert line in done.stdout
  assert 'optimum    ' in done.stdout
  for name in ('results.csv', 'results.json', 'report.html'):
    assert (place / 'out' / name).stat().st_size
  best = (place / 'out' / 'best.flags').read_text().splitlines()
  assert best[:-1] == [f'--config={place}/tiny.py', *SMALL]
  assert best[-1].startswith('--config.optimizer.peak_lr=0.')
  _check_tensorboard(place / 'out' / 'tensorboard')
  again = _run(place)
  assert again.returncode == 0
  assert 'in one program' not in again.stdout
  assert 'best       trial' in again.stdout


def _check_tensorboard(root):
  """Checks the hyper-parameters and the curves of one of six runs."""
  assert len(list(root.glob('*/seed*/events*'))) == 6
  (path,) = (root / '0001' / 'seed1').iterdir()
  values = [value for event in _events(path) for value in event.summary.value]
  tags = [value.tag for value in values]
  assert tags.count('eval/loss') == 2
  assert tags.count('train/loss') == 4
  (start,) = (v for v in values if v.tag.endswith('session_start_info'))
  info = plugin_hparams_pb2.HParamsPluginData.FromString(
    start.metadata.plugin_data.content
  ).session_start_info
  assert info.group_name == '0001'
  rate = info.hparams['optimizer.peak_lr'].number_value
  assert rate == pytest.approx(1e-2)


def _events(path):
  data, at, found = path.read_bytes(), 0, []
  while at < len(data):  # length, its CRC, the event, its CRC
    (size,) = struct.unpack_from('<Q', data, at)
    found.append(event_pb2.Event.FromString(data[at + 12 : at + 12 + size]))
    at += 16 + size
  return found


@pytest.mark.slow
def test_all_trials_that_diverge_are_one_line(place):
  pytest.importorskip('optuna')
  done = _run(
    place, parameters="'optimizer.peak_lr': sweep.Choice((1e30, 1e31))"
  )
  assert done.returncode == 1
  assert 'got 2 diverged trials and none with a finite loss' in done.stdout


@pytest.mark.parametrize(
  ('options', 'words'),
  [
    (
      {'parameters': "'optimizer.peek_lr': sweep.Choice((1e-3,))"},
      "parameters: optimizer.peek_lr: got the unknown field 'peek_lr'",
    ),
    (
      {'parameters': "'optimizer.peek_lr': sweep.Choice((1e-3,))"},
      'did you mean peak_lr',
    ),
    (
      {'parameters': "'optimizer.peak_lr': sweep.Choice(('a',))"},
      "optimizer.peak_lr: got 'a', expected a number",
    ),
    (
      {'parameters': "'optimizer.rule': sweep.Choice(('lyon',))"},
      'did you mean lion',
    ),
    (
      {'parameters': "'optimizer.peak_lr': sweep.Choice(())"},
      'got an empty Choice, expected at least one value',
    ),
    (
      {'parameters': "'optimizer.peak_lr': sweep.Uniform(0, 1)"},
      'got a grid without points, expected some',
    ),
    ({'fields': 'num_trails=3'}, "unexpected keyword argument 'num_trails'"),
    ({'fields': "pruner='hyper'"}, 'did you mean hyperband'),
    ({'text': 'x = 1'}, 'expected a file with a function get_sweep'),
    ({'text': 'def get_sweep(): return 3'}, 'get_sweep returns int, expected'),
    ({'text': 'def get_sweep(:'}, 'which cannot be loaded (invalid syntax'),
  ],
)
def test_a_wrong_sweep_is_one_line(place, options, words):
  pytest.importorskip('optuna')
  assert words in _error(_run(place, **options))
  assert not (place / 'out').exists()


@pytest.mark.parametrize(
  ('flags', 'options', 'words'),
  [
    (
      ['--config.eval_every_steps=0'],
      {'fields': "pruner='asha'"},
      'pruner: got asha with config.eval_every_steps = 0 in 4 steps, expected',
    ),
    (['--storage=nowhere'], {}, '--storage: got nowhere, which cannot be'),
    (
      ['--metric=acuracy'],
      {},
      "metric: got 'acuracy', expected one of bits_pe",
    ),
    (
      ['--metric=tokens_per_s', '--processes=2'],
      {},
      '--processes: got 2 with metric tokens_per_s, expected 1',
    ),
    (['--storage=sqlite:///:memory:'], {}, 'expected a database that survives'),
    (['--sweep=lr.py'], {}, "got 'lr.py', expected a file such as these"),
    (['--config.num_steps=0'], {}, 'config.num_steps: got 0'),
  ],
)
def test_a_wrong_flag_is_one_line(place, flags, options, words):
  pytest.importorskip('optuna')
  assert words in _error(_run(place, *flags, **options))


@pytest.mark.slow
def test_a_storage_of_another_sweep_is_one_line(place):
  pytest.importorskip('optuna')
  first = _run(
    place, parameters="'optimizer.peak_lr': sweep.Choice((1e30, 1e31))"
  )
  assert 'diverged' in first.stdout
  line = _error(_run(place))
  assert "got the sweep 'a' with sweep.parameters.optimizer.peak_lr" in line
  assert 'expected the same sweep and config; use another --workdir' in line


def test_a_missing_optuna_is_one_line(place):
  with mock.patch.dict(sys.modules, {'optuna': None}):
    line = _error(_run(place))
  assert 'got no optuna, expected it to be installed; run pip install' in line
  assert 'requirements-sweep.txt' in line


def test_without_a_sweep_the_flags_are_named():
  done = commands.run('sweep.py', '--config=experiments/quickstart.py')
  assert done.returncode == 1
  assert 'got no --config, no --sweep or no --workdir' in (
    done.stdout + done.stderr
  )
