"""Preparation of stock data sets, as far as it needs no TensorFlow."""

import json
import pathlib
import subprocess
import sys

import pytest

from data import prepare


def _python(directory, *lines):
  """An interpreter that prints `lines` for any arguments."""
  path = directory / 'python'
  quoted = ''.join(f"echo '{line}'\n" for line in lines)
  path.write_text(f'#!/bin/sh\n{quoted}exit 3\n')
  path.chmod(0o755)
  return path


def test_what_tfds_says_last_is_the_result(tmp_path):
  result = {'directory': 'd/1.0.0', 'splits': {'train': 7}, 'text_keys': ['t']}
  python = _python(tmp_path, 'a banner', json.dumps(result))
  prepared = prepare.run_in(python, 'x', tmp_path, None)
  assert prepared == prepare.Prepared(**result)
  usage = prepare.usage(prepared)
  assert '--config.data.path=d/1.0.0 --config.data.text_key=t' in usage
  assert 'train 7' in usage


def test_without_text_there_is_nothing_to_train_on():
  prepared = prepare.Prepared(directory='d', splits={}, text_keys=[])
  assert prepare.usage(prepared).endswith('no text to train on.')


def test_errors_of_tfds_are_one_line(tmp_path):
  python = _python(tmp_path, json.dumps({'error': 'DatasetNotFoundError: x'}))
  with pytest.raises(
    ValueError, match=r'--dataset=x: TFDS cannot .*\(DatasetNotFoundError: x\)'
  ):
    prepare.run_in(python, 'x', tmp_path, None)
  with pytest.raises(ValueError, match='TFDS died with exit code 3'):
    prepare.run_in(_python(tmp_path, 'no JSON'), 'x', tmp_path, None)


def test_the_program_that_runs_there_tells_what_went_wrong(tmp_path):
  """The program must not need anything but Python to report its error."""
  (tmp_path / 'tensorflow_datasets.py').write_text('raise OSError("no\\nnet")')
  result = subprocess.run(
    [sys.executable, '-c', prepare._PROGRAM, 'x', str(tmp_path), ''],
    cwd=tmp_path,
    capture_output=True,
    text=True,
    check=True,
  )
  assert json.loads(result.stdout) == {'error': 'OSError: no net'}


def test_an_environment_is_made_once(tmp_path, monkeypatch):
  calls = []

  def create(directory, **options):
    calls.append('venv')
    (directory / 'bin').mkdir(exist_ok=True)
    python = directory / 'bin' / 'python'
    python.write_text('#!/bin/sh\n')
    python.chmod(0o755)

  monkeypatch.setattr(prepare.venv, 'create', create)
  python = prepare.make_environment(tmp_path / 'venv', ['a'])
  assert python == tmp_path / 'venv' / 'bin' / 'python'
  assert prepare.make_environment(tmp_path / 'venv', ['a']) == python
  assert calls == ['venv']
  prepare.make_environment(tmp_path / 'venv', ['a', 'b'])
  assert calls == ['venv', 'venv']


def test_an_installation_that_fails_is_told_and_repeated(tmp_path, monkeypatch):
  def create(directory, **options):
    (directory / 'bin').mkdir(exist_ok=True)
    python = directory / 'bin' / 'python'
    python.write_text('#!/bin/sh\necho "ERROR: no a" >&2\nexit 1\n')
    python.chmod(0o755)

  monkeypatch.setattr(prepare.venv, 'create', create)
  for _ in range(2):
    with pytest.raises(ValueError, match=r'a cannot be inst.*ERROR: no a'):
      prepare.make_environment(tmp_path / 'venv', ['a'])


def test_files_that_are_not_there_are_named_first(tmp_path, monkeypatch):
  monkeypatch.setattr(prepare, 'make_environment', None)
  with pytest.raises(ValueError, match="--manual_dir: got 'nowhere', expected"):
    prepare.prepare('x', str(tmp_path), manual_dir='nowhere')


def test_the_command_line_says_what_is_missing():
  root = pathlib.Path(__file__).parents[2]
  result = subprocess.run(
    [sys.executable, '-m', 'data.prepare'],
    cwd=root,
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode != 0
  assert '--dataset' in result.stderr + result.stdout
