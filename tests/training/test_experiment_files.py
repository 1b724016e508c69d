"""--config: the error for a missing file, and the list of experiments."""

import pytest

from tests.helpers import commands
from training import experiment_files

NAMES = {
  path.relative_to(experiment_files.DIRECTORY).as_posix()
  for path in experiment_files.DIRECTORY.rglob('*.py')
  if path.stem not in ('__init__', 'presets')
  and path.parent.name not in ('sweeps', 'papers')
}


@pytest.mark.parametrize(
  ('value', 'message'),
  [
    ('experiments/quikstart.py', 'did you mean quickstart.py?'),
    ('experiments/pretrain_file', 'did you mean pretrain_files.py or pretrain'),
    ('experiments/nope.py', '; --config=list describes them'),
    ('experiment/quickstart.py', 'did you mean quickstart.py?'),
    ('quickstart', 'did you mean quickstart.py?'),
    (
      'experiments/scaling/byte.py',
      'of experiments/scaling, one of bytes.py, bytes_large.py;',
    ),
    ('experiments', 'expected a file of experiments, one of distil.py'),
    ('', "--config: got '', expected a file of experiments, one of"),
    ('nope.py:8b', "--config: got 'nope.py', expected a file of"),
    (
      'experiments/quickstart.py:8b',
      "got the variant '8b' of experiments/quickstart.py, expected none",
    ),
    ('$NOPE/a.py', 'expected $NOPE to be set'),
    ('experiments/presets.py', 'expected a file with a function get_config;'),
  ],
)
def test_a_file_that_is_not_there_names_those_that_are(value, message):
  done = commands.run('train.py', f'--config={value}', '--workdir=unused')
  assert done.returncode == 1
  (line,) = done.stderr.splitlines()
  assert line.startswith('error: --config: got ')
  assert message in line
  if 'expected a file of experiments, ' in line:
    assert all(name in line for name in NAMES)


def test_a_file_of_flags_that_is_not_there_is_named():
  done = commands.run('train.py', '--flagfile=nope')
  assert done.returncode == 1
  (line,) = done.stderr.splitlines()
  assert line.startswith('error: ')
  assert line.endswith("No such file or directory: 'nope'")


@pytest.mark.parametrize('args', [['--config=list'], ['--config', 'list']])
def test_the_list_has_a_line_of_each_experiment(args):
  done = commands.run('train.py', *args)
  assert (done.returncode, done.stderr) == (0, '')
  lines = done.stdout.splitlines()
  assert {
    line.split()[0].removeprefix('--config=experiments/') for line in lines
  } == NAMES
  (line,) = (line for line in lines if 'finetune' in line)
  assert line.startswith('--config=experiments/finetune.py ')
  assert line.endswith(
    'training continues from frozen weights, own or imported.'
  )


def test_other_directories_have_a_list_of_their_own(tmp_path):
  (tmp_path / 'mine.py').write_text('def get_config():\n  return None\n')
  (tmp_path / 'broken.py').write_text('def get_config(:\n')
  (tmp_path / 'other.py').write_text('X = 1\n')
  with pytest.raises(ValueError, match=f'file of {tmp_path}, one of mine.py; '):
    experiment_files.check(f'{tmp_path}/your.py', '')
  experiment_files.check(f'{tmp_path}/mine.py', '')


def test_the_home_directory_stands_in_every_path_of_a_run(
  tmp_path, monkeypatch
):
  (tmp_path / 'mine.py').write_text(
    'from experiments import quickstart\nget_config = quickstart.get_config\n'
  )
  monkeypatch.setenv('HOME', str(tmp_path))
  done = commands.run(
    'train.py',
    '--config=~/mine.py',
    '--workdir=~/run',
    '--config.init_from=~/base',
    '--config.data.data_dir=~/data',
    '--config.num_steps=0',
  )
  assert done.stderr == 'error: config.num_steps: got 0, expected at least 1\n'
