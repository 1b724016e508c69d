"""serve.py as a user runs it: in a process of its own."""

import re
import signal
import socket
import subprocess
import sys
import time

import httpx2
import pytest

from tests import fixtures, frozen_fixtures

# As long as what --chat makes of 'hi': all of these tests compile one shape,
# and find it in the compilation cache that the session shares.
_PROMPT = 'User: hi\n\nAssistant:'


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  directory = tmp_path_factory.mktemp('serve') / 'tiny'
  config = frozen_fixtures.config(num_layers=1, max_length=32)
  manifest = frozen_fixtures.write(directory, config=config)
  return directory, manifest.weights_digest


def _start(*args, **kwargs):
  return subprocess.Popen(
    [sys.executable, 'serve.py', *args],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env=fixtures.subprocess_env(PYTHONUNBUFFERED='1', PYTHONUTF8='1'),
    **kwargs,
  )


def _run(*args, stdin=''):
  process = _start(*args, stdin=subprocess.PIPE)
  out, err = process.communicate(stdin, timeout=120)
  return process.returncode, out, err


def test_prompt_streams_then_reports_speed_and_an_unchanged_digest(model):
  directory, digest = model
  flags = [f'--model={directory}', '--max_tokens=5', '--seed=3']
  code, out, err = _run(*flags, f'--prompt={_PROMPT}', '--top_k=20')
  assert (code, err) == (0, '')
  assert out.startswith(_PROMPT)
  assert re.search(r'prefill +[\d,]+ tokens/s \(21 tokens\)', out)
  assert re.search(r'decode +[\d,.]+ tokens/s \(4 tokens, ended by length', out)
  assert 'seed 3' in out
  assert re.search(r'compilation +[\d.]+ s, not counted above', out)
  assert f'weights before  {digest}' in out
  assert f'weights after   {digest}  unchanged' in out


def test_chat_ends_with_its_input(model):
  directory, _ = model
  code, out, err = _run(
    f'--model={directory}', '--chat', '--max_tokens=4', stdin='hi\n'
  )
  assert (code, err) == (0, '')
  assert out.count('You: ') == 2
  assert 'Model: ' in out


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    ([], 'got none of them, expected one of --prompt, --chat, --port'),
    (['--chat', '--prompt=a'], 'got --prompt and --chat, expected one of'),
    (['--prompt=a', 'b'], 'got --prompt and b, expected one of'),
  ],
)
def test_one_way_to_ask_is_required(flags, message):
  code, out, err = _run('--model=anything', *flags)
  assert (code, out) == (2, '')
  assert message in err


def test_bad_input_is_one_line_and_no_traceback(model, tmp_path):
  directory, _ = model
  for flags, message in (
    (
      [f'--model={directory}', '--prompt=a', '--temperature=-1'],
      'temperature: got -1.0, expected a number >= 0',
    ),
    (
      [f'--model={tmp_path}', '--prompt=a'],
      f'{tmp_path}/manifest.json: got no such file, expected a frozen',
    ),
  ):
    code, out, err = _run(*flags)
    assert (code, out) == (2, '')
    (line,) = err.splitlines()
    assert line.startswith(f'error: {message}')


def test_help_does_not_wait_for_jax():
  process = subprocess.run(
    [
      sys.executable,
      '-X',
      'importtime',
      'serve.py',
      '--help',
    ],
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
  )
  assert '--prompt' in process.stdout
  assert ' jax' not in process.stderr


def test_port_serves_until_it_is_stopped(model):
  directory, digest = model
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    port = probe.getsockname()[1]
  process = _start(f'--model={directory}', f'--port={port}')
  try:
    _wait_for(f'http://127.0.0.1:{port}/health', process)
    answer = httpx2.post(
      f'http://127.0.0.1:{port}/v1/completions',
      json={'model': frozen_fixtures.EXPERIMENT, 'prompt': _PROMPT},
      timeout=60,
    )
    assert answer.json()['usage']['completion_tokens'] > 0
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
  finally:
    process.kill()
  assert digest in out
  assert f'weights {digest}: unchanged' in err
  assert 'Traceback' not in err


def _wait_for(url, process):
  for _ in range(600):
    assert process.poll() is None, process.communicate()
    try:
      if httpx2.get(url).status_code == 200:
        return
    except httpx2.TransportError:
      time.sleep(0.1)
  pytest.fail(f'{url} did not answer')
