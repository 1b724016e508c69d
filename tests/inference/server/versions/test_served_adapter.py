"""Adapters over HTTP: each is a model that answers beside its base."""

import dataclasses

import httpx2
import numpy as np
import pytest

from frozen import adapters as frozen_adapters
from inference import generate
from inference.server import app as app_lib, server_config, start
from inference.server.receipts import receipts
from inference.server.records import database
from inference.server.versions import loader as loader_lib, served_adapter
from models import transformer
from tests.helpers import commands, frozen_dirs
from tests.helpers.serving import servers
from tests.helpers.training import tiny_adapters
from tests.inference import conftest as life_two
from tests.inference.server.versions import conftest as versions_lib

_CONFIG = dataclasses.replace(
  life_two.ENGINE, max_adapters=2, max_adapter_rank=4
)


@pytest.fixture(scope='module')
def root(frozen_dir, tmp_path_factory):
  root = tmp_path_factory.mktemp('models')
  for seed, name in enumerate(('one', 'two', 'three'), 1):
    tiny_adapters.write(root / name, frozen_dir, seed=seed, rank=seed)
  tiny_adapters.write(root / 'wide', frozen_dir, seed=5, rank=5)
  config = frozen_dirs.config(num_layers=1)
  params = frozen_dirs.params(config, seed=8)
  frozen_dirs.write(root / 'other', config=config, params=params)
  tiny_adapters.write(root / 'of_other', root / 'other', seed=1)
  return root


@pytest.fixture(scope='module')
def adaptable(frozen_dir):
  return generate.load(frozen_dir, _CONFIG)


@pytest.fixture
def versions(adaptable, root, tmp_path, _own_collector):
  loader = loader_lib.Loader(_CONFIG, models_root=str(root))
  records, key = servers.with_admin()
  with (
    servers.running(
      adaptable,
      records=records,
      app={'loader': loader},
      audit_share=1.0,
    ) as served,
    httpx2.Client(base_url=served.url, headers=key, timeout=60) as http,
  ):
    digest = adaptable.frozen.manifest.weights_digest
    yield versions_lib.Versions(
      http, f'{servers.MODEL}@{digest[:16]}', {}, served
    )
  for digest in adaptable.engine.adapters.digests:
    adaptable.engine.adapters.unload(digest)
  adaptable.engine.manager.clear()


def _ask(versions, model, prompt='what does it say?', **fields):
  answer = versions.complete(
    prompt, model=model, logprobs=0, max_tokens=6, **fields
  )
  assert answer.status_code == 200, answer.text
  return answer.json(), answer.headers


def _logprobs(body):
  return np.array(body['choices'][0]['logprobs']['token_logprobs'])


@pytest.mark.slow
def test_each_adapter_is_a_model_that_answers(versions, adaptable, root):
  one, two = versions.load('one', 'sql'), versions.load('two', 'poems')
  assert versions.state(one) == versions.state(two) == 'ready'
  found, prints = {}, set()
  for name in (servers.MODEL, 'sql', 'poems'):
    body, headers = _ask(versions, name)
    assert body['model'] == name
    found[name] = _logprobs(body)
    prints.add(body['system_fingerprint'])
    version = headers['x-model-version']
    assert version.startswith(f'{name}@')
    # The identity answers too.
    pinned, _ = _ask(versions, version)
    assert pinned['choices'][0]['text'] == body['choices'][0]['text']
  assert len(prints) == 3
  base = adaptable.frozen
  for path, name in (('one', 'sql'), ('two', 'poems')):
    offline = generate.load(
      base.directory, _CONFIG, adapters={name: str(root / path)}
    )
    (done,) = offline.adapted(name).generate(
      ['what does it say?'],
      dataclasses.replace(
        offline.defaults, temperature=0.0, max_tokens=6, logprobs=0
      ),
    )
    assert done.logprobs
    expected = [each.chosen for each in done.logprobs]
    np.testing.assert_allclose(found[name], expected, atol=1e-4)
    assert np.abs(found[name] - found[servers.MODEL]).max() > 1e-2


@pytest.mark.slow
def test_models_name_the_base_and_the_lineage_of_an_adapter(versions, root):
  version = versions.load('one', 'sql')
  cards = versions.http.get('/v1/models').json()['data']
  card = {each['id']: each for each in cards}['sql']
  base = {each['id']: each for each in cards}[servers.MODEL]
  assert versions.http.get('/v1/models/sql').json() == card
  assert card['version'] == version
  assert (card['root'], card['parent']) == (servers.MODEL, versions.first)
  assert card['digests']['adapter'].startswith(version.rpartition('@')[2])
  assert card['digests']['weights'] == base['digests']['weights']
  lineage = card['lineage']
  assert lineage['adapter_digest'] == card['digests']['adapter']
  assert lineage['weights_digest'] == base['lineage']['weights_digest']
  assert lineage['parents']['base'] == base['lineage']['weights_digest']
  assert (lineage['experiment'], lineage['step']) == ('adapter 1', 1)
  assert 'root' not in base
  described = versions.http.get(f'/admin/models/{version}').json()
  assert described['base'] == versions.first
  assert described['memory'] is None


def test_other_weights_under_a_name_are_another_version(versions):
  first = versions.load('one', 'sql')
  a, _ = _ask(versions, 'sql')
  again, _ = _ask(versions, 'sql')
  assert again['usage']['prompt_tokens_details']['cached_tokens'] > 0
  second = versions.load('two', 'sql')  # no traffic yet
  assert (
    _ask(versions, 'sql')[0]['choices'][0]['text'] == (a['choices'][0]['text'])
  )
  versions.send({second: 1}, name='sql')
  b, headers = _ask(versions, 'sql')
  assert headers['x-model-version'] == second
  assert b['usage']['prompt_tokens_details']['cached_tokens'] == 0
  assert np.abs(_logprobs(a) - _logprobs(b)).max() > 1e-2
  versions.unload(first)
  # The same directory again, in a slot that may be another.
  first = versions.load('one', 'sql')
  versions.send({first: 1}, name='sql')
  np.testing.assert_allclose(
    _logprobs(_ask(versions, 'sql')[0]), _logprobs(a), atol=1e-4
  )


def test_an_adapter_is_unloaded_and_its_base_waits_for_it(versions):
  version = versions.load('one', 'sql')
  refused = versions.http.delete(f'/admin/models/{versions.first}')
  assert refused.status_code == 409
  assert 'unload its adapters first' in refused.json()['error']['message']
  versions.unload(version)
  answer = versions.complete(model='sql')
  assert answer.status_code == 404
  assert versions.served.generator.engine.adapters.digests == []
  body, _ = _ask(versions, servers.MODEL)
  assert body['choices'][0]['text']


def test_what_cannot_be_loaded_is_refused(versions):
  def refused(path, status, message, name='new', **fields):
    answer = versions.http.post(
      '/admin/models', json={'path': path, 'name': name, **fields}
    )
    assert answer.status_code == status, answer.text
    assert message in answer.json()['error']['message']

  refused('wide', 400, 'got rank 5')
  refused('of_other', 400, 'expected one of a version that is loaded')
  refused('of_other', 400, 'with weights', base=versions.first)
  refused('one', 400, 'load its base first', base='nobody@0123456789')
  refused('other', 400, 'only an adapter has a base', base=versions.first)
  refused('one', 400, 'kv_memory', kv_memory='1MiB')
  refused('../one', 400, 'below --server.models_root')
  versions.load('one', 'a')
  refused('one', 409, 'which is loaded already', name='a')
  # Under a second name it takes no second slot.
  versions.load('one', 'b')
  versions.load('two', 'c')
  refused('three', 400, 'expected at most 2 (engine.max_adapters)')
  answer = versions.complete(model='nobody')
  assert answer.status_code == 404
  assert "'a' or 'b' or 'c'" in answer.json()['error']['message']


def test_records_and_metrics_name_the_adapter(versions):
  version = versions.load('one', 'sql')
  _ask(versions, 'sql')
  _ask(versions, servers.MODEL)
  records = versions.served.app.state.keyring._records
  rows = records.submit(
    lambda connection: connection.execute(
      'SELECT model, weights_digest, completion_tokens FROM ledger'
      " WHERE outcome = 'finished'"
    ).fetchall()
  ).result()
  (row,) = [tuple(row) for row in rows if row[0] == 'sql']
  assert row[1].startswith(version.rpartition('@')[2])
  assert row[2] == 6
  text = versions.http.get('/metrics').text
  value = servers.metric(
    text, 'adapter_sampled_tokens_total', model='sql', version=version
  )
  assert value == 6
  whole = servers.metric(text, 'sampled_tokens_total', model=servers.MODEL)
  assert whole >= 12
  ended = servers.metric(
    text, 'adapter_finished_total', model='sql', reason='length'
  )
  assert ended == 1
  for name, num in (
    ('time_to_first_token_seconds', 1),
    ('inter_token_seconds', 5),
  ):
    name = f'adapter_{name}_count'
    assert servers.metric(text, name, model='sql') == num


def test_the_self_audit_knows_the_adapter(versions):
  versions.load('one', 'sql')
  _ask(versions, 'sql')
  _ask(versions, servers.MODEL)

  def metric(name):
    return servers.metric(versions.http.get('/metrics').text, name)

  servers.until(lambda: metric('audited_sequences_total') >= 2, 60)
  assert metric('audit_alarms_total') == 0
  assert metric('audit_largest_difference') < 1e-3


def test_an_embedding_is_that_of_the_adapter(versions, adaptable, root):
  versions.load('one', 'sql')

  def vector(model):
    answer = versions.http.post(
      '/v1/embeddings', json={'model': model, 'input': 'a text'}
    )
    assert answer.status_code == 200, answer.text
    return np.array(answer.json()['data'][0]['embedding'])

  base, adapted = vector(servers.MODEL), vector('sql')
  assert np.abs(base - adapted).max() > 1e-2
  frozen = adaptable.frozen
  merged = tiny_adapters.merged(
    frozen.read_params(),
    frozen_adapters.read(root / 'one', frozen).tree,
  )
  hidden_1TD, _ = transformer.Transformer(frozen.config).apply(
    merged, np.array([adaptable.prompt_ids('a text')]), method='hidden'
  )
  mean_D = np.asarray(hidden_1TD[0], np.float64).mean(0)
  cosine = adapted @ mean_D / np.linalg.norm(adapted) / np.linalg.norm(mean_D)
  assert cosine > 1 - 1e-6


def test_a_copy_for_a_shadow_is_answered_by_its_own_weights(versions):
  first, second = versions.load('one', 'sql'), versions.load('two', 'sql')
  versions.send({first: 1}, shadows={second: 1.0}, name='sql')
  _ask(versions, 'sql', prompt='a copy of this prompt')

  def shadows():
    text = versions.http.get('/metrics').text
    return servers.metric(
      text, 'shadow_requests_total', version=second, outcome='finished'
    )

  servers.until(lambda: shadows() == 1)
  # Its pages are those of its own adapter: no base is asked here.
  body, _ = _ask(versions, second, prompt='a copy of this prompt')
  assert body['usage']['prompt_tokens_details']['cached_tokens'] > 0


@pytest.mark.slow
def test_a_receipt_of_an_adapter_replays_bit_for_bit(
  frozen_dir, root, tmp_path
):
  config = dataclasses.replace(_CONFIG, numerics='invariant')
  generator = generate.load(frozen_dir, config)
  path = tmp_path / 'records.db'
  records = database.Database(path, tables=app_lib.TABLES)
  adapter = frozen_adapters.read(root / 'two', generator.frozen)
  with servers.running(
    generator,
    records=records,
    app={'observers': [receipts.Recorder(records, None)]},
    audit_share=0,
  ) as served:
    versions = served.app.state.versions
    model = served_adapter.ServedAdapter(
      'sql', adapter, versions.default(servers.MODEL)
    )
    loop = served.engine_loop._event_loop
    loop.call_soon_threadsafe(versions.load, model)
    servers.until(lambda: 'sql' in versions.names())
    answer = httpx2.post(
      f'{served.url}/v1/completions',
      json={'model': 'sql', 'prompt': 'receipt', 'max_tokens': 12, 'n': 2},
      timeout=60,
    )
    assert answer.status_code == 200, answer.text
  flags = (
    answer.headers['x-request-id'],
    f'--records={path}',
    f'--model={frozen_dir}',
  )

  def replay(*more):
    return commands.run('inference/server/replay.py', *flags, *more)

  done = replay(f'--adapter={root}/two')
  assert done.returncode == 0, done.stdout + done.stderr
  assert done.stdout.count('bit for bit') == 2
  for more, message in (
    ((), '--adapter: got none, expected the directory of'),
    ((f'--adapter={root}/one',), 'expected ' + model.digest),
  ):
    done = replay(*more)
    assert (done.returncode, message in done.stderr) == (2, True), done.stderr


def _options(frozen_dir, adapters, **fields):
  return start.Options(
    directory=str(frozen_dir),
    name=servers.MODEL,
    engine=life_two.ENGINE,
    limits=server_config.ServerConfig(),
    host='127.0.0.1',
    port=0,
    adapters=adapters,
    **fields,
  )


@pytest.mark.slow
@pytest.mark.usefixtures('_own_collector')
def test_adapters_of_the_command_line_answer_as_soon_as_the_server_is_ready(
  frozen_dir, root, monkeypatch
):
  """As `serve.py --port --adapters` starts it, but for the signals."""
  found = {}

  def run(server, versions, first):
    app = server.config.app
    with servers.running_app(app) as url:
      servers.until(lambda: httpx2.get(f'{url}/ready').status_code == 200, 120)
      for name in (servers.MODEL, 'sql', 'poems'):
        body = {**servers.GREEDY, 'model': name, 'prompt': 'hello', 'seed': 1}
        answer = httpx2.post(f'{url}/v1/completions', json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        found[name] = answer.json()['system_fingerprint']
      cards = httpx2.get(f'{url}/v1/models').json()['data']
      found['names'] = [card['id'] for card in cards]

  monkeypatch.setattr(start, '_run', run)
  named = [f'sql={root}/one', f'poems={root}/three']
  start.serve(_options(frozen_dir, named))
  assert found['names'] == [servers.MODEL, 'sql', 'poems']
  assert len({found[name] for name in found['names']}) == 3


@pytest.mark.parametrize(
  ('adapters', 'engine', 'message'),
  [
    (['{name}={root}/one'], {}, "got the name 'tiny', expected another"),
    (['a={root}/of_other'], {}, 'take the base that it was trained on'),
    (['a={root}/nothing'], {}, 'expected an adapter directory'),
    (['a={root}/other'], {}, 'expected one of an adapter'),
    (
      ['a={root}/one', 'b={root}/two'],
      {'max_adapters': 1},
      r'got 2 adapters, expected at most 1 \(engine.max_adapters\)',
    ),
    (
      ['a={root}/three'],
      {'max_adapter_rank': 2},
      r'got one of rank 3, expected at most 2 \(engine.max_adapter_rank\)',
    ),
  ],
)
def test_a_server_does_not_start_with_wrong_adapters(
  frozen_dir, root, adapters, engine, message
):
  adapters = [each.format(root=root, name=servers.MODEL) for each in adapters]
  options = _options(frozen_dir, adapters)
  options = dataclasses.replace(
    options, engine=dataclasses.replace(life_two.ENGINE, **engine)
  )
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    start.serve(options)
