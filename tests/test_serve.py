"""serve.py as a user runs it; servers in processes of their own."""

from concurrent import futures
import hashlib
import re
import shutil
import signal
import subprocess
import sys
import time

from absl import flags
import httpx2
import numpy as np
import pytest

from evals.results import scores
from frozen import format as frozen_format
from hardware import compilation_cache
from inference.sampling import settings as settings_lib
from models import transformer
import serve
from tests.helpers import commands, frozen_dirs, tiny_models

_PROMPT = 'User: hi\n\nAssistant:'
# Few shapes for --port. --prompt and --chat compile few shapes by default, and
# find them in the compilation cache that the session shares.
_ENGINE = [
  '--engine.max_sequences=1',
  '--engine.chunk_tokens=128',
  '--engine.max_chunks=1',
  '--engine.max_mixed_chunks=1',
]


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  directory = tmp_path_factory.mktemp('serve') / 'tiny'
  config = frozen_dirs.config(num_layers=1, max_length=32)
  manifest = frozen_dirs.write(directory, config=config)
  return directory, manifest.weights_digest


def _start(*args, **kwargs):
  return subprocess.Popen(
    [sys.executable, 'serve.py', *args],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env=tiny_models.subprocess_env(PYTHONUNBUFFERED='1', PYTHONUTF8='1'),
    **kwargs,
  )


def _run(*args, stdin=''):
  done = commands.run('serve.py', *args, stdin=stdin)
  return done.returncode, done.stdout, done.stderr


def _run_alone(*args):
  process = _start(*args, stdin=subprocess.DEVNULL)
  try:
    out, err = process.communicate(timeout=120)
  except subprocess.TimeoutExpired:
    process.kill()  # a server that was to refuse its arguments serves
    process.communicate()
    raise
  return process.returncode, out, err


@pytest.fixture
def defined_flags():
  """Defines the flags of serve.py, unparsed."""
  with commands.own_flags():
    serve._define_flags()
    yield


def test_prompt_streams_then_reports_speed_and_an_unchanged_digest(model):
  directory, digest = model
  flags = [f'--model={directory}', '--max_tokens=5', '--seed=3']
  code, out, err = _run_alone(*flags, f'--prompt={_PROMPT}', '--top_k=20')
  assert (code, err) == (0, '')
  assert out.startswith(_PROMPT)
  assert re.search(
    r'prefill +[\d,]+ tokens/s \(21 tokens, 0 of them cached\)', out
  )
  assert re.search(r'decode +[\d,.]+ tokens/s \(4 tokens, ended by length', out)
  assert 'seed 3' in out
  assert re.search(r'compilation +[\d.]+ s, not counted above', out)
  assert re.search(
    r'memory +KV cache \d+ MiB: 2 pages of 16 tokens; 1 sequences run at once,'
    ' of at most 32 tokens each and 32 together',
    out,
  )
  assert f'weights before  {digest}' in out
  assert f'weights after   {digest}  unchanged' in out


@pytest.mark.slow
def test_several_completions_of_a_prompt(model):
  directory, _ = model
  code, out, err = _run(
    f'--model={directory}',
    f'--prompt={_PROMPT}',
    '--n=2',
    '--seed=3',
    '--max_tokens=4',
    '--min_tokens=4',
    '--repetition_penalty=1.2',
    '--presence_penalty=0.5',
    '--frequency_penalty=0.5',
    '--stop_ids=5',
    '--ignore_eos',
    '--engine.max_sequences=1',  # the completions run one after the other
  )
  assert (code, err) == (0, '')
  assert '--- seed 3\n' in out
  assert f'--- seed {settings_lib.sample_seed(3, 1)}\n' in out
  assert re.search(r'decode .*\(6 tokens, ended by length', out)


@pytest.mark.slow
def test_a_prompt_with_a_system_prompt_is_a_chat(model):
  directory, _ = model
  code, out, err = _run(
    f'--model={directory}', '--prompt=a', '--system=S', '--max_tokens=1'
  )
  assert (code, err) == (0, '')
  # BOS and 'System: S\n\nUser: a\n\nAssistant:'.
  assert re.search(r'prefill .*\(31 tokens', out)


@pytest.mark.slow
def test_a_cache_is_mended_and_may_be_copied_to_another_place(model, tmp_path):
  """The next start finds all entries; it makes incomplete ones again."""
  directory, _ = model

  def entries(cache):
    # JAX notes in other files when it has read an entry.
    paths = [each for kind in kinds for each in cache.glob(kind)]
    return {each.name: each.read_bytes() for each in paths}

  def run(cache):
    code, _, err = _run_alone(
      f'--model={directory}',
      '--prompt=a',
      '--max_tokens=2',
      f'--compilation_cache={cache}',
    )
    assert (code, err) == (0, '')

  kinds = '*-cache', '*.program'  # JAX's entries, and those of engines
  first, copy = tmp_path / 'first', tmp_path / 'elsewhere' / 'copy'
  run(first)
  before = entries(first)
  shutil.copytree(first, copy)
  cut = [
    max(copy.glob(kind), key=lambda each: each.stat().st_size) for kind in kinds
  ]
  for path in cut:
    path.write_bytes(path.read_bytes()[:-100])
  run(copy)
  after = entries(copy)
  assert before.keys() == after.keys()
  changed = {name for name in after if after[name] != before[name]}
  assert changed <= {path.name for path in cut}
  entry, program = (after[path.name] for path in cut)
  assert compilation_cache.is_whole(entry)
  assert program[:32] == hashlib.sha256(program[32:]).digest()


@pytest.mark.slow
def test_chat_ends_with_its_input(model):
  directory, _ = model
  code, out, err = _run(
    f'--model={directory}', '--chat', '--max_tokens=4', stdin='hi\n'
  )
  assert (code, err) == (0, '')
  assert out.count('You: ') == 2
  assert 'Model: ' in out


@pytest.mark.parametrize(
  ('chosen', 'message'),
  [
    ([], 'got none, expected one of --prompt, --chat, --port'),
    (['--chat', '--prompt=a'], 'got --prompt and --chat, expected one of'),
    (['--prompt=a', 'b'], 'got --prompt and b, expected one of'),
    # A flag without effect is refused.
    (
      ['--port=1', '--temperature=0'],
      'got --temperature with --port, expected it with --prompt or --chat',
    ),
    (['--chat', '--n=2'], 'got --n with --chat, expected it with --prompt;'),
    (['--port=1', '--system=a'], 'got --system with --port, expected it with'),
    (['--prompt=a', '--name=k'], 'got --name with --prompt, expected it with'),
    (['--prompt=a', '--api_keys=k'], 'got --api_keys with --prompt, expected'),
    (['--plan=v5e:1x1', '--engine.page_size=8'], 'got --engine.page_size with'),
  ],
)
def test_one_way_to_ask_is_required(chosen, message, defined_flags, capsys):
  rest = flags.FLAGS(['serve.py', '--model=anything', *chosen])
  with pytest.raises(SystemExit) as caught:
    serve.main(rest)
  out, err = capsys.readouterr()
  assert (caught.value.code, out) == (2, '')
  assert message in err


def test_a_process_that_is_asked_nothing_exits_with_2():
  code, out, err = _run('--model=anything')
  assert (code, out) == (2, '')
  assert err.startswith('error: got none, expected one of --prompt')


@pytest.mark.slow
@pytest.mark.parametrize(
  ('chosen', 'message'),
  [
    (
      ['--model={model}', '--port=0', '--engine.page_size=7'],
      'engine.page_size: got 7, expected a',
    ),
    (
      ['--model={model}', '--port=0', '--api_keys={keys}'],
      '{keys}:1: got a line that is not name:key',
    ),
    # A guard with an empty value guards nothing.
    (
      ['--model={model}', '--port=0', '--api_keys='],
      '--api_keys: got an empty path, expected a file of lines name:key',
    ),
    (
      ['--model={model}', '--port=0', '--api_keys={empty}'],
      '--api_keys: got {empty}, which is no regular file',
    ),
    (['--model={model}', '--port=0', '--host='], '--host: got an empty'),
    (
      ['--model={model}', '--port=0', '--host=0.0.0.0'],
      '--host: got 0.0.0.0 without any key, expected a loopback address',
    ),
    (
      ['--model={model}', '--port=0', '--server.price_cached=-1'],
      'server.price_cached: got -1.0, expected a finite amount',
    ),
    (
      ['--model={model}', '--port=0', '--server.head_seconds=nan'],
      'server.head_seconds: got nan, expected a finite number',
    ),
    (
      ['--model={model}', '--port=0', '--server.max_connections=0'],
      'server.max_connections: got 0, expected at least 1',
    ),
    # Found by the thread that loads, when the server already listens.
    (
      [
        *('--model={model}', '--port=0'),
        *('--engine.attention=kernel', '--engine.native=off'),
      ],
      "engine.attention: got 'kernel', but engine.native is off",
    ),
    (['--model={model}', '--eval=perplexity:nowhere.txt'], 'nowhere.txt'),
    (
      ['--model={model}', '--prompt=a', '--temperature=-1'],
      'temperature: got -1.0, expected a number >= 0',
    ),
    (
      ['--model={model}', '--port=0', '--engine.max_length=33'],
      'engine.max_length: got 33, expected at most the 32 tokens of the',
    ),
    (
      ['--model={model}', '--prompt=a', '--engine.kv_memory=1kB'],
      'engine.kv_memory: got 1kB, expected at least 1MiB, for one sequence of',
    ),
    (
      ['--model={empty}/x.gguf', '--prompt=a'],
      '{empty}/x.gguf/manifest.json: got no such file, expected a frozen'
      ' directory; import open weights with `python -m frozen.huggingface'
      ' import --source={empty}/x.gguf --out=DIR`',
    ),
    (
      ['--model={empty}', '--prompt=a'],
      '{empty}/manifest.json: got no such file, expected a frozen',
    ),
  ],
)
def test_bad_input_is_one_line_and_no_traceback(
  model, tmp_path, chosen, message
):
  keys = tmp_path / 'keys'
  keys.write_text('nobody')
  names = {'model': model[0], 'keys': keys, 'empty': tmp_path}
  # A server has signal handlers: it needs the main thread of a process.
  run = _run_alone if '--port=0' in chosen else _run
  code, out, err = run(*(each.format(**names) for each in chosen))
  assert code == 2
  if '--port=0' not in chosen:  # a server prints more
    assert (out, err.count('\n')) == ('', 1)
  line = err.splitlines()[-1]
  assert line.startswith(f'error: {message.format(**names)}'), err
  assert 'Traceback' not in err


@pytest.mark.slow
def test_a_task_is_scored_by_the_engine_that_serves(model, tmp_path):
  directory, digest = model
  text = 'Of what is written, some is read; of what is read, little is kept.'
  (tmp_path / 'text.txt').write_text(text)
  out_file = tmp_path / 'result.json'
  code, out, err = _run(
    f'--model={directory}',
    f'--eval=perplexity:{tmp_path / "text.txt"}',
    '--eval.stride=8',
    f'--eval_out={out_file}',
    *_ENGINE,
  )
  assert (code, err) == (0, '')
  assert 'bits_per_byte' in out
  result = scores.load(out_file)
  assert result.model['weights_digest'] == digest
  frozen = frozen_format.read(directory)
  # BOS and the text: windows of the full forward score each byte once.
  ids = [256, *text.encode()]
  network = transformer.Transformer(frozen.config)
  total, start = 0.0, 1
  while start < len(ids):  # as evals.tasks.perplexity documents its windows
    stop = min(len(ids), start + (32 if start == 1 else 8))
    window = ids[max(0, stop - 33) : stop]
    logits_1TV, _ = network.apply(frozen.params, np.asarray([window[:-1]]))
    logits_TV = np.asarray(logits_1TV[0, :, :259], np.float64)
    logprobs_TV = logits_TV - np.logaddexp.reduce(
      logits_TV, axis=-1, keepdims=True
    )
    scored = range(len(window) - (stop - start), len(window))
    total += sum(logprobs_TV[t - 1, window[t]] for t in scored)
    start = stop
  expected = -total / np.log(2) / len(text.encode())
  (group,) = result.groups
  found = group.score('bits_per_byte').value
  assert found == pytest.approx(expected, rel=1e-5)


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
  for name in (
    *('prompt', 'min_p', 'engine.page_size', 'eval.limit'),
    'server.body_seconds',
  ):
    assert f'--{name}: ' in process.stdout
  # Every import has a line: own time, total time, name.
  assert ' inference.flags\n' in process.stderr
  for name in ('jax', 'scipy', 'orbax'):
    assert f' {name}\n' not in process.stderr


@pytest.mark.slow
def test_port_serves_until_it_is_stopped(model, tmp_path):
  directory, digest = model
  keys = tmp_path / 'keys'
  keys.write_text('me:my-key')
  process = _start(
    f'--model={directory}', '--port=0', f'--api_keys={keys}', *_ENGINE
  )
  try:
    url = _url(process)
    _wait_for(f'{url}/ready', process)
    answer = httpx2.post(
      f'{url}/v1/completions',
      json={'model': frozen_dirs.EXPERIMENT, 'prompt': _PROMPT},
      headers={'authorization': 'Bearer my-key'},
      timeout=60,
    )
    assert answer.json()['usage']['completion_tokens'] > 0
    assert httpx2.get(f'{url}/metrics').status_code == 401
    keys.write_text('me:other')
    process.send_signal(signal.SIGHUP)
    headers = {'authorization': 'Bearer other'}
    deadline = time.monotonic() + 30
    while httpx2.get(f'{url}/metrics', headers=headers).status_code == 401:
      assert time.monotonic() < deadline
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
  finally:
    process.kill()
  assert process.returncode == 0
  assert digest in out
  assert f'weights {digest}: unchanged' in err
  assert 'Traceback' not in err


@pytest.mark.slow
def test_streams_that_outlast_the_drain_end_with_an_error(tmp_path):
  """SIGTERM, while more is asked than one second can answer."""
  directory = tmp_path / 'long'
  config = frozen_dirs.config(num_layers=1, max_length=8192)
  frozen_dirs.write(directory, config=config)
  process = _start(
    f'--model={directory}', '--port=0', '--drain_seconds=1', *_ENGINE
  )
  body = {
    'model': 'long',
    'prompt': 'a',
    'max_tokens': 8000,
    'ignore_eos': True,
  }
  try:
    url = f'{_url(process)}/v1/completions'
    _wait_for(url.replace('v1/completions', 'ready'), process)
    with futures.ThreadPoolExecutor(8) as pool:
      asked = [
        pool.submit(
          httpx2.post, url, json={**body, 'stream': which % 2 > 0}, timeout=120
        )
        for which in range(8)
      ]
      time.sleep(1)  # until the first have begun
      process.send_signal(signal.SIGTERM)
      answers = [each.result() for each in asked]
    _, err = process.communicate(timeout=60)
  finally:
    process.kill()
  assert process.returncode == 0
  assert 'Traceback' not in err
  assert 'unchanged' in err
  whole, streams = answers[::2], answers[1::2]
  stopped = [each for each in whole if each.status_code == 503]
  assert all(each.status_code in (200, 503) for each in whole), whole[0].text
  assert len(stopped) > 1  # one sequence runs at a time
  for each in stopped:
    assert int(each.headers['retry-after']) > 0
    assert each.json()['error']['code'] == 'stopped'
  for each in streams:
    assert each.status_code == 200
    assert each.text.endswith('data: [DONE]\n\n')
  assert sum('"code": "stopped"' in each.text for each in streams) > 1


# XLA cannot be interrupted: a process that compiles ends without its clean-up.
@pytest.mark.slow
@pytest.mark.parametrize(('replicas', 'code'), [(1, 0), (0, 1)])
def test_a_server_that_still_compiles_stops_at_once(
  model, tmp_path, replicas, code
):
  directory, _ = model
  process = _start(
    f'--model={directory}',
    '--port=0',
    f'--replicas={replicas}',
    f'--compilation_cache={tmp_path / "empty"}',
    '--engine.max_sequences=64',
  )
  try:
    url = _url(process)
    assert httpx2.get(f'{url}/ready').status_code == 503
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
  finally:
    process.kill()
  # Compiling all programs would take a minute or more.
  assert time.monotonic() - start < 10
  assert process.returncode == code
  assert 'Traceback' not in err


def _url(process):
  """Returns the URL of a server, once it listens."""
  seen = []
  for line in process.stderr:
    seen.append(line)
    if found := re.search(r'running on (http://\S+)', line):
      return found[1]
  pytest.fail(''.join(seen))


def _wait_for(url, process):
  for _ in range(1200):
    assert process.poll() is None, process.communicate()
    try:
      if httpx2.get(url).status_code == 200:
        return
    except httpx2.TransportError:
      pass
    time.sleep(0.1)
  pytest.fail(f'{url} did not answer')
