"""The command line of life one: exit codes, and a run that is supervised."""

import logging
import pathlib
import re
import signal
import subprocess
import sys

import pytest

from hardware import compilation_cache
from parallel import processes
from tests.helpers import commands, tiny_models
from training import run as run_lib
from training.lifecycle import exit_codes
from training.reporting import goodput, metrics

ROOT = pathlib.Path(__file__).parents[1]
# The quickstart, made small.
SMALL = [
  '--config=experiments/quickstart.py',
  '--config.num_steps=12',
  '--config.log_every_steps=1',
  '--config.eval_batches=2',
  '--config.checkpoint.every_steps=4',
  '--config.optimizer.warmup_steps=6',
  '--config.data.row_length=32',
  '--config.data.tokenizer.train_bytes=200000',
  '--config.model.num_layers=1',
  '--config.model.max_length=32',
  '--config.model.mlp_width=64',
]
# Runs train.py with something broken in it.
BREAK = """
import runpy, sys
{patch}
sys.argv = sys.argv[1:]
runpy.run_path('train.py', run_name='__main__')
"""
# train.py, killed after some steps, once each; {marks} tells which are done.
KILLED = """
import os, pathlib, runpy, signal, sys
sys.path.insert(0, os.getcwd())
from training.reporting import reporter as reporter_lib
add = reporter_lib.Reporter.add
def add_and_die(reporter, step, step_metrics):
  add(reporter, step, step_metrics)
  mark = pathlib.Path({marks!r}) / str(step)
  if step in (6, 11) and not mark.exists():
    mark.touch()
    reporter.flush()
    os.kill(os.getpid(), signal.SIGKILL)
reporter_lib.Reporter.add = add_and_die
runpy.run_path('train.py', run_name='__main__')
"""
# The supervisor of a script, as train.py makes it of itself.
SUPERVISED = """
import pathlib, sys
from training.lifecycle import supervisor
sys.exit(supervisor.Supervisor(
  [sys.executable, *sys.argv[1:]], pathlib.Path({workdir!r}),
  max_restarts=3, first_pause_s=0.1,
).run())
"""


def _train(*flags, patch='', timeout=240):
  return subprocess.run(
    [sys.executable, '-c', BREAK.format(patch=patch), 'train.py', *flags],
    cwd=ROOT,
    env=tiny_models.subprocess_env(),
    capture_output=True,
    text=True,
    timeout=timeout,
  )


@pytest.mark.slow
def test_an_unexpected_exception_has_a_code_of_its_own(tmp_path):
  patch = (
    'from parallel import processes\n'
    'def start(*_, **__): raise OSError("the disk is gone")\n'
    'processes.start = start'
  )
  result = _train(*SMALL, f'--workdir={tmp_path}', patch=patch)
  assert result.returncode == exit_codes.CRASHED
  assert result.stderr.splitlines()[-1] == 'OSError: the disk is gone'
  assert 'Traceback' in result.stderr


@pytest.mark.slow
def test_errors_of_the_users_are_final(tmp_path):
  flags = [*SMALL, f'--workdir={tmp_path / "run"}', '--config.num_steps=0']
  result = _train(*flags, '--max_restarts', '3')
  assert result.returncode == exit_codes.USER_ERROR
  assert result.stderr.splitlines() == [
    'error: config.num_steps: got 0, expected at least 1',
    'supervisor: exit code 1 is final, not restarted',
  ]


@pytest.mark.parametrize('value', ['-1', 'many'])
def test_a_wrong_number_of_restarts_is_refused(tmp_path, value):
  result = commands.run(
    'train.py',
    *SMALL,
    f'--workdir={tmp_path / "run"}',
    f'--max_restarts={value}',
  )
  assert result.returncode == exit_codes.USER_ERROR
  assert f'flag --max_restarts={value}: ' in result.stderr
  assert len(result.stderr.splitlines()) == 1


def test_names_of_exit_codes():
  assert exit_codes.name(137) == 'SIGKILL'
  assert exit_codes.name(70) == 'exit code 70'
  assert exit_codes.of_returncode(-signal.SIGSEGV) == 139
  assert exit_codes.of_returncode(143) == 143


# ------------------------------------------------------------------------------
# Real crashes of real runs.


def _records(workdir):
  return [r for r in metrics.read(workdir) if r['kind'] in ('train', 'eval')]


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('uninterrupted')
  result = _train(*SMALL, f'--workdir={workdir}')
  assert result.returncode == 0, result.stderr
  return workdir


@pytest.mark.slow
def test_a_supervised_run_survives_kills(uninterrupted, tmp_path):
  """SIGKILL in two of three attempts, as for want of memory."""
  workdir, script = tmp_path / 'run', tmp_path / 'killed.py'
  script.write_text(KILLED.format(marks=str(tmp_path)))
  result = subprocess.run(
    [
      sys.executable,
      '-c',
      SUPERVISED.format(workdir=str(workdir)),
      script,
      *SMALL,
      f'--workdir={workdir}',
    ],
    cwd=ROOT,
    env=tiny_models.subprocess_env(),
    capture_output=True,
    text=True,
    timeout=240,
  )
  assert result.returncode == 0, result.stdout + result.stderr
  assert result.stderr.count('supervisor: died of SIGKILL') == 2
  assert _records(workdir) == _records(uninterrupted)
  began = [attempt.first_step for attempt in goodput.read(workdir)]
  assert len(began) == 3
  # A save that was in flight is lost with the process.
  assert began == sorted(began)
  assert set(began) <= {0, 4, 8}
  assert re.search(r'^goodput .*, 3 attempts$', result.stdout, re.MULTILINE)


def test_a_command_in_this_process_leaves_logging_as_it_was(tmp_path):
  root = logging.getLogger()
  before = root.level, root.handlers[:]
  done = commands.run(
    'frozen/freeze.py', f'--workdir={tmp_path}/run', f'--out={tmp_path}/out'
  )
  assert 'error: ' in done.stderr
  assert (root.level, root.handlers) == before


@pytest.mark.parametrize(
  ('flags', 'variable', 'num_processes', 'expected'),
  [
    ([], None, 1, '{home}/two-lives/xla'),
    ([], None, 2, None),
    ([], '{home}/variable', 2, '{home}/variable'),
    (['--compilation_cache={home}/flag'], None, 2, '{home}/flag'),
    (['--compilation_cache='], '{home}/variable', 1, None),
    (['--plan'], None, 1, None),
  ],
)
def test_compiled_programs_are_kept_where_the_flag_says(
  monkeypatch, tmp_path, flags, variable, num_processes, expected
):
  used = []
  monkeypatch.setattr(compilation_cache, 'use', used.append)
  monkeypatch.setattr(processes, 'count', lambda: num_processes)
  monkeypatch.setattr(run_lib, 'run', _stopped)
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  monkeypatch.delenv(compilation_cache.VARIABLE, raising=False)
  if variable:
    path = variable.format(home=tmp_path)
    monkeypatch.setenv(compilation_cache.VARIABLE, path)
  flags = [flag.format(home=tmp_path) for flag in flags]
  done = commands.run('train.py', *SMALL, f'--workdir={tmp_path}/run', *flags)
  assert done.returncode == (0 if '--plan' in flags else 1), done.stderr
  expected = expected and pathlib.Path(expected.format(home=tmp_path))
  assert used == ([expected] if expected else [])


def _stopped(*_, **__):
  raise ValueError('the run begins here')
