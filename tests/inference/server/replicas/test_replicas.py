"""A server with two replicas: processes that compute, die and come back."""

import concurrent.futures
import contextlib
import dataclasses
import gc
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import httpx2
import numpy as np
import pytest

from frozen import manifest as manifest_lib
from hardware import compilation_cache
from inference import generate
from inference.search.routing import router as router_lib
from inference.server import app as app_lib, server_config
from inference.server.records import database
from inference.server.replicas import fleet as fleet_lib
from inference.server.versions import loader as loader_lib
from tests.helpers import frozen_dirs, tiny_models
from tests.helpers.serving import effort_predictors, servers
from tests.helpers.training import tiny_adapters
from tests.inference import conftest as life_two

_ROOT = pathlib.Path(__file__).parents[4]
# That of the tests of adapters, whose programs replicas find compiled.
_ENGINE = dataclasses.replace(
  life_two.ENGINE, max_adapters=2, max_adapter_rank=4
)
pytestmark = pytest.mark.slow  # processes start, import JAX and read programs
_LONG = {'max_tokens': 50, 'min_tokens': 50, 'ignore_eos': True}


@dataclasses.dataclass
class _Served:
  http: httpx2.Client
  fleet: fleet_lib.Fleet
  loop: object
  records: database.Database

  def ask(self, prompt='hello', **fields):
    """Returns the answer to a completion."""
    body = {**servers.GREEDY, 'prompt': prompt, **fields}
    return self.http.post('/v1/completions', json=body)

  def metric(self, name, **labels):
    """Returns the sum of a metric over its samples."""
    text = self.http.get('/metrics').text
    return sum(
      servers.metric(text, name, replica=str(index), **labels)
      for index in range(2)
    )

  def num_ready(self):
    """Returns how many replicas answer."""
    return self.metric('replica_ready')

  def bills(self):
    """Returns (outcome, tokens) of all rows of the ledger."""
    return self.records.submit(
      lambda connection: [
        tuple(row)
        for row in connection.execute(
          'SELECT outcome, completion_tokens FROM ledger ORDER BY rowid'
        )
      ]
    ).result()


@pytest.fixture(scope='module')
def root(frozen_dir, tmp_path_factory):
  root = tmp_path_factory.mktemp('models')
  config = frozen_dirs.config(num_layers=1)
  params = frozen_dirs.params(config, seed=2)
  frozen_dirs.write(root / 'v2', params=params, config=config)
  tiny_adapters.write(root / 'sql', frozen_dir, seed=1, rank=2)
  return root


@pytest.fixture(scope='module')
def _own_collector():
  """The collector as serve.py leaves it; a loader tells it what stays."""
  threshold = gc.get_threshold()
  gc.disable()
  yield
  gc.set_threshold(*threshold)
  gc.unfreeze()
  gc.enable()


@pytest.fixture(scope='module')
def served(frozen_dir, root, _own_collector):
  with _serving(frozen_dir, _ENGINE, models_root=str(root)) as found:
    yield found


@contextlib.contextmanager
def _serving(frozen_dir, engine, *, models_root=''):
  """Serves a model on two replicas; yields them once both are ready."""
  config = server_config.ServerConfig(audit_share=1.0)
  directory = compilation_cache.directory()
  fleet = fleet_lib.Fleet(
    2,
    num_devices=engine.tensor,
    environment=os.environ,  # the flags of XLA are in the keys of programs
    compilation_cache=str(directory) if directory else None,
  )
  loader = loader_lib.Loader(engine, models_root=models_root, fleet=fleet)
  model = loader.load(frozen_dir, servers.MODEL)
  records, headers = servers.with_admin()
  manifest = manifest_lib.read(frozen_dir)
  digest, width = manifest.weights_digest, manifest.model['model_width']
  router = router_lib.Router(
    effort_predictors.of_length(width, digest, least=30), budget=1e12
  )
  app = app_lib.create_app(
    [model],
    None,
    config,
    records=records,
    loader=loader,
    routers={digest: router},
    on_end=fleet.close,
  )
  with (
    servers.running_app(app, config) as url,
    httpx2.Client(base_url=url, headers=headers, timeout=120) as http,
  ):
    found = _Served(http, fleet, model.engine_loop, records)
    servers.until(lambda: found.http.get('/ready').status_code == 200, 240)
    servers.until(lambda: found.num_ready() == 2, 240)
    yield found
    pids = fleet.pids()
  assert not any(map(_lives, pids))


def _lives(pid):
  with contextlib.suppress(OSError):
    os.kill(pid, 0)
    return True
  return False


def test_replicas_answer_as_an_engine_in_this_process(served, generator):
  fields = {'n': 2, 'seed': 5, 'temperature': 1.0, 'logprobs': 1}
  prompts = ['hello', [3, 4, 5], 'a longer prompt']
  with servers.running(generator) as here, httpx2.Client() as http:
    for prompt in prompts:
      body = {**servers.GREEDY, 'prompt': prompt, **fields}
      expected = http.post(f'{here.url}/v1/completions', json=body).json()
      found = served.ask(prompt, **fields).json()
      for one, other in zip(expected['choices'], found['choices'], strict=True):
        assert one['text'] == other['text']
        # The programs have places for adapters: other shapes, other rounding.
        np.testing.assert_allclose(
          one['logprobs']['token_logprobs'],
          other['logprobs']['token_logprobs'],
          atol=1e-4,
        )
        assert one['seed'] == other['seed']
      assert (
        found['usage']['prompt_tokens'] == (expected['usage']['prompt_tokens'])
      )
  whole = served.ask('hello', **fields).json()['choices'][0]['text']
  stream = served.ask('hello', **fields, stream=True)
  texts = [
    choice['text']
    for event in servers.events(stream.content)
    for choice in event['choices']
    if choice['index'] == 0
  ]
  assert ''.join(texts) == whole


def test_garbage_is_collected_once_a_replica_is_ready(served):
  assert served.num_ready()
  # Else each request would leave its cycles: 1 MiB per second under load.
  assert gc.isenabled()
  assert gc.get_freeze_count()


def test_constraints_embeddings_and_refusals_work_across_processes(served):
  chosen = served.ask(
    'x', structured_outputs={'choice': ['red', 'blue']}, max_tokens=20
  )
  assert chosen.status_code == 200, chosen.text
  assert chosen.json()['choices'][0]['text'] in ('red', 'blue')
  body = {'model': servers.MODEL, 'input': ['a', 'bc']}
  answer = served.http.post('/v1/embeddings', json=body).json()
  assert len(answer['data']) == 2
  for wrong, word in (
    ({'max_tokens': 1000}, 'context'),
    ({'prompt': [10**6]}, 'token id'),
  ):
    refused = served.ask(**{'prompt': 'x', **wrong})
    assert (refused.status_code, word in refused.text) == (400, True)


@pytest.mark.parametrize(
  ('text', 'asked', 'num_samples'),
  [
    ('hi', {'reasoning_effort': 'auto'}, 1),
    ('Tell me of a way there.', {'reasoning_effort': 'auto'}, 4),
    ('hi', {'strategy': {'name': 'best_of_n', 'n': 3}}, 3),
    ('hi', {'strategy': {'name': 'beam', 'n': 4}}, 4),
  ],
)
def test_strategies_and_predicted_efforts_run_on_replicas(
  served, text, asked, num_samples
):
  body = {
    'model': servers.MODEL,
    'messages': [{'role': 'user', 'content': text}],
    'max_tokens': 6,
    'seed': 1,
  }
  answer = served.http.post('/v1/chat/completions', json=body | asked)
  assert answer.status_code == 200, answer.text
  assert answer.json()['usage']['receipt']['num_samples'] == num_samples


def test_a_conversation_stays_on_its_replica_and_finds_its_prefix(served):
  before = served.metric('replica_submissions_total', prefix='known')
  prompt = 'the beginning of a prompt, and more'
  cached = [
    served.ask(prompt + end, max_tokens=4).json()['usage'][
      'prompt_tokens_details'
    ]['cached_tokens']
    for end in ('', ' a', ' b')
  ]
  assert cached[0] == 0
  assert min(cached[1:]) >= 32
  after = served.metric('replica_submissions_total', prefix='known')
  assert after == before + 2


def test_metrics_version_and_audit_are_those_of_the_replicas(served):
  served.ask('count me', max_tokens=3)
  assert served.metric('sampled_tokens_total') > 0
  version = served.http.get('/version').json()
  assert version['platform'] == 'cpu'
  assert served.http.get('/v1/models').json()['data'][0]['digests']['numerics']
  servers.until(
    lambda: (
      served.metric('audited_sequences_total')
      + served.metric('audit_skipped_total', reason='busy')
      > 0
    ),
    60,
  )
  assert served.metric('audit_alarms_total') == 0


def test_versions_and_adapters_are_on_all_replicas(served):
  http = served.http
  made = []
  for path, name in (('v2', 'second'), ('sql', 'sql')):
    answer = http.post('/admin/models', json={'path': path, 'name': name})
    assert answer.status_code == 202, answer.text
    made.append(answer.json()['id'])
  for version in made:
    servers.until(
      lambda v=version: (
        http.get(f'/admin/models/{v}').json()['state'] == 'ready'
      ),
      240,
    )
  texts = {
    name: served.ask('what is it', model=name).json()['choices'][0]['text']
    for name in (servers.MODEL, 'second', 'sql')
  }
  assert len(set(texts.values())) == 3
  memory = http.get(f'/admin/models/{made[0]}').json()['memory']
  assert memory['total'] > 0
  # Both replicas have the adapter: many prompts reach both.
  for index in range(4):
    answer = served.ask(f'{index} what is it', model='sql')
    assert answer.status_code == 200, answer.text
  off = {'name': 'second', 'weights': {made[0]: 0}}
  assert http.post('/admin/traffic', json=off).status_code == 200
  for version in reversed(made):
    assert http.delete(f'/admin/models/{version}').status_code == 202
    servers.until(
      lambda v=version: http.get(f'/admin/models/{v}').status_code == 404, 60
    )


def test_a_killed_replica_loses_no_answer_and_comes_back(served):
  """Whole answers move; a stream ends with an error; each has one bill."""
  first = len(served.bills())
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    asked = [
      pool.submit(served.ask, f'{index} hello', **_LONG) for index in range(6)
    ]
    body = {**servers.GREEDY, 'prompt': 'x', **_LONG, 'n': 4, 'stream': True}
    with served.http.stream('POST', '/v1/completions', json=body) as stream:
      chunks = stream.iter_bytes()
      start = next(chunks)
      # The replica of the stream.
      place = max(served.loop._places.values(), key=lambda each: each.num_open)
      os.kill(place.replica.link.pid, signal.SIGKILL)
      rest = start + b''.join(chunks)
    answers = [each.result() for each in asked]
  for answer in answers:
    assert answer.status_code == 200, answer.text
    assert answer.json()['usage']['completion_tokens'] == 50
  *_, last, done, _ = rest.split(b'\n\n')
  assert done == b'data: [DONE]'
  event = json.loads(last.removeprefix(b'data: '))
  servers.until(lambda: len(served.bills()) == first + 7)
  bills = served.bills()[first:]
  assert bills.count(('finished', 50)) == 6
  (streamed,) = (each for each in bills if each != ('finished', 50))
  if 'error' in event:  # else it was on the other replica, or had ended
    assert streamed[0] == 'error'
    assert 0 < streamed[1] < 200
  else:
    assert streamed == ('finished', 200)
  assert served.http.get('/health').status_code == 200
  # All answers may have ended before the kill.
  servers.until(lambda: served.metric('replica_deaths_total') == 1)
  servers.until(lambda: served.num_ready() == 2, 240)
  assert served.ask('again').status_code == 200


@pytest.mark.usefixtures('_own_collector')
def test_replicas_of_two_devices_each_have_the_bits_of_one(frozen_dir):
  """`--replicas=2 --engine.tensor=2`; a replica that dies is replaced."""
  engine = dataclasses.replace(
    life_two.ENGINE, numerics='invariant', tensor_parts=2
  )
  prompts = [f'{index} hello' for index in range(4)]
  fields = {'seed': 5, 'temperature': 1.0, 'logprobs': 1}
  alone = generate.load(frozen_dir, engine)
  with servers.running(alone) as here, httpx2.Client() as http:
    expected = [
      http.post(
        f'{here.url}/v1/completions',
        json={**servers.GREEDY, 'prompt': prompt, **fields},
      ).json()['choices'][0]
      for prompt in prompts
    ]
  both = dataclasses.replace(engine, tensor=2)
  with _serving(frozen_dir, both) as served:
    assert served.http.get('/version').json()['num_devices'] >= 2

    def choices():
      answers = [served.ask(prompt, **fields) for prompt in prompts]
      return [each.json()['choices'][0] for each in answers]

    for each, wanted in zip(choices(), expected, strict=True):
      assert each['text'] == wanted['text']
      assert each['logprobs'] == wanted['logprobs']
    assert min(each.num_served for each in served.loop._places.values()) > 0
    os.kill(served.fleet.pids()[0], signal.SIGKILL)
    assert choices()[0]['logprobs'] == expected[0]['logprobs']
    servers.until(lambda: served.num_ready() == 2, 240)


_FRONT = """
import asyncio, os, sys
from inference.server.replicas import link, values
setup = values.Setup(name='replica 0', compilation_cache=None,
                     audit_threshold=0.0)
async def main():
  found = link.Link(setup, os.environ, on_message=print, on_death=print)
  found.start()
  try:
    await found.call('unknown', 3)
  except Exception:
    print(found.pid, flush=True)
  await asyncio.sleep(60)
asyncio.run(main())
"""


def test_a_server_that_is_killed_leaves_no_replica_behind():
  with subprocess.Popen(
    [sys.executable, '-c', _FRONT],
    cwd=_ROOT,
    env=tiny_models.subprocess_env(),
    stdout=subprocess.PIPE,
    text=True,
  ) as front:
    assert front.stdout
    pid = int(front.stdout.readline())
    # A supervisor may signal all processes: only the server's end is theirs.
    for each in (signal.SIGTERM, signal.SIGINT):
      os.kill(pid, each)
    time.sleep(0.2)
    assert _lives(pid)
    front.kill()
  servers.until(lambda: not _lives(pid))
