"""POST /admin/models and /admin/traffic: what they refuse, and for whom."""

from concurrent import futures
import math
import os
import shutil
import threading

import httpx2
import pytest

from frozen import format as frozen_format, manifest as manifest_lib
from hardware import host_memory
from inference.server.access import api_keys
from inference.server.api import shapes
from inference.server.versions import loader as loader_lib, memory
from tests.helpers import frozen_dirs
from tests.helpers.serving import servers
from tests.inference import conftest as life_two

_ROUTES = (
  ('GET', '/admin/models', None),
  ('POST', '/admin/models', {'name': 'a', 'path': 'b'}),
  ('GET', f'/admin/models/{servers.MODEL}@00000000', None),
  ('DELETE', f'/admin/models/{servers.MODEL}@00000000', None),
  ('GET', '/admin/traffic', None),
  ('POST', '/admin/traffic', {'name': servers.MODEL, 'weights': {}}),
)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  root = tmp_path_factory.mktemp('root') / 'models'
  config = frozen_dirs.config(num_layers=1)
  params = frozen_dirs.params(config, seed=5)
  frozen_dirs.write(root / 'good', config=config, params=params)
  shutil.copytree(root / 'good', root.parent / 'outside')
  os.symlink(root.parent / 'outside', root / 'link')
  shutil.copytree(root / 'good', root / 'altered')
  manifest = root / 'altered' / 'manifest.json'
  manifest.write_text(manifest.read_text().replace('"step": 7', '"step": 8'))
  shutil.copytree(root / 'good', root / 'damaged')
  # Other weights under the same manifest.
  largest = max(
    (p for p in (root / 'damaged' / 'params').rglob('*') if p.is_file()),
    key=lambda path: path.stat().st_size,
  )
  data = bytearray(largest.read_bytes())
  data[len(data) // 2] ^= 1
  largest.write_bytes(data)
  # The same weights, a tokenizer with another file.
  tokenizer_dir = root.parent / 'other_tokenizer'
  shutil.copytree(root / 'good' / 'tokenizer', tokenizer_dir)
  (tokenizer_dir / 'notes.txt').write_text('another')
  frozen_format.write(
    root / 'retokenized',
    params=frozen_dirs.params(config, seed=6),
    config=config,
    dtype='float32',
    provenance=frozen_dirs.provenance(),
    tokenizer_dir=tokenizer_dir,
    generation={},
  )
  return root


@pytest.fixture(scope='module')
def http(generator, root):
  loader = loader_lib.Loader(life_two.ENGINE, models_root=str(root))
  records, key = servers.with_admin()
  with (
    servers.running(
      generator, records=records, app={'loader': loader}
    ) as served,
    httpx2.Client(base_url=served.url, headers=key, timeout=60) as http,
  ):
    yield http


def _refused(answer, status, code=None):
  assert answer.status_code == status, answer.text
  shapes.Error.model_validate(answer.json())
  error = answer.json()['error']
  assert '\n' not in error['message']
  if code:
    assert error['code'] == code
  return error['message']


def _load(http, path, name='new', **fields):
  return http.post('/admin/models', json={'name': name, 'path': path, **fields})


@pytest.mark.parametrize(
  ('path', 'status', 'code', 'message'),
  [
    ('nowhere', 404, 'path_not_found', 'got no such file, expected a frozen'),
    ('', 400, 'path_outside_root', 'not below --server.models_root'),
    ('.', 400, 'path_outside_root', 'not below --server.models_root'),
    ('../outside', 400, 'path_outside_root', 'not below'),
    ('good/../../outside', 400, 'path_outside_root', 'not below'),
    ('link', 400, 'path_outside_root', 'not below'),
    ('/etc', 400, 'path_outside_root', 'not below'),
    ('a\0b', 400, 'path_outside_root', 'not below'),
    ('good/params', 404, 'path_not_found', 'expected a frozen directory'),
    ('altered', 400, 'cannot_load', 'it was altered'),
  ],
)
def test_a_wrong_path_is_refused_in_one_line(http, path, status, code, message):
  assert message in _refused(_load(http, path), status, code)


def test_an_existing_path_outside_looks_like_one_that_does_not_exist(http):
  there, not_there = (
    _refused(_load(http, path), 400) for path in ('../outside', '../nothing')
  )
  assert there == not_there


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'name': ''}, 'name: got'),
    ({'name': 'a@b'}, 'printable characters without @'),
    ({'name': 'a\nb'}, 'printable characters without @'),
    ({'name': 'x' * 129}, 'name: got'),
    ({'kv_memory': 'much'}, 'engine.kv_memory: got'),
    ({'kv_memory': '1kB'}, 'engine.kv_memory: got 1kB, expected at least'),
    ({'other': 1}, 'other: got a parameter that this server does not know'),
    ({'path': 5}, 'path: '),
  ],
)
def test_a_wrong_field_is_refused(http, fields, message):
  body = {'name': 'new', 'path': 'good', **fields}
  assert message in _refused(http.post('/admin/models', json=body), 400)


def test_what_cannot_fit_is_refused_before_it_is_read(http, root, monkeypatch):
  monkeypatch.setattr(host_memory, 'available_bytes', lambda: 10_000)
  message = _refused(_load(http, 'good'), 400, 'cannot_load')
  assert message.startswith('memory: got a need of ')
  assert 'give this one less kv_memory' in message
  assert len(http.get('/admin/models').json()['data']) == 1


@pytest.mark.slow
def test_of_two_that_are_asked_for_at_once_one_fits(http, root, monkeypatch):
  manifest = manifest_lib.read(root / 'good')
  need = memory.plan(manifest, life_two.ENGINE).total
  monkeypatch.setattr(
    host_memory, 'available_bytes', lambda: math.ceil(1.5 * need)
  )
  both = threading.Barrier(2)
  load_asked = loader_lib.Loader.load_asked

  def asked(*args, **kwargs):
    model = load_asked(*args, **kwargs)
    both.wait(30)  # both plans are made before a version is added
    return model

  monkeypatch.setattr(loader_lib.Loader, 'load_asked', asked)
  ended = threading.Event()

  def load(*args, **kwargs):
    ended.wait(30)
    raise ValueError('ended')

  monkeypatch.setattr(loader_lib.generate, 'load', load)
  with futures.ThreadPoolExecutor(2) as pool:
    answers = list(pool.map(lambda name: _load(http, 'good', name), 'ab'))
  (loaded,) = (each for each in answers if each.status_code == 202)
  (refused,) = (each for each in answers if each.status_code != 202)
  message = _refused(refused, 400, 'cannot_load')
  assert 'MiB promised to others' in message
  ended.set()
  version = f'/admin/models/{loaded.json()["id"]}'
  assert http.delete(version).status_code == 202
  servers.until(lambda: http.get(version).status_code == 404)


def test_damaged_weights_are_a_state_and_not_a_crash(http):
  answer = _load(http, 'damaged', 'hurt')
  assert answer.status_code == 202
  shapes.ModelVersion.model_validate(answer.json())
  version = answer.json()['id']

  def described():
    return http.get(f'/admin/models/{version}').json()

  servers.until(lambda: described()['state'] == 'failed')
  shapes.ModelVersion.model_validate(described())
  assert 'expected SHA-256' in described()['error']
  assert '\n' not in described()['error']
  body = {**servers.GREEDY, 'prompt': 'a'}
  assert http.post('/v1/completions', json=body).status_code == 200
  for name, status in ((version, 503), ('hurt', 404)):
    answer = http.post('/v1/completions', json={**body, 'model': name})
    assert answer.status_code == status, answer.text
  assert http.get('/ready').status_code == 200
  assert http.delete(f'/admin/models/{version}').status_code == 202
  servers.until(lambda: http.get(f'/admin/models/{version}').status_code == 404)


@pytest.mark.slow
def test_a_new_name_answers_when_it_is_ready_and_can_be_taken_away(http):
  answer = _load(http, 'good', 'org/new')
  version = answer.json()['id']
  assert _refused(_load(http, 'good', 'org/new'), 409, 'version_exists')

  def state():
    return http.get(f'/admin/models/{version}').json()

  servers.until(lambda: state()['state'] == 'ready' and state()['share'] == 1.0)
  body = {**servers.GREEDY, 'prompt': 'a', 'model': 'org/new'}
  assert http.post('/v1/completions', json=body).status_code == 200
  listed = http.get('/v1/models').json()['data']
  assert [each['id'] for each in listed] == [servers.MODEL, 'org/new']
  # The last answer to a name is not taken away by mistake.
  answer = http.delete(f'/admin/models/{version}')
  assert 'move the traffic first' in _refused(answer, 409, 'version_in_use')
  traffic = {'name': 'org/new', 'weights': {}}
  assert http.post('/admin/traffic', json=traffic).status_code == 200
  assert http.post('/v1/completions', json=body).status_code == 404
  assert http.delete(f'/admin/models/{version}').status_code == 202
  servers.until(lambda: http.get(f'/admin/models/{version}').status_code == 404)
  names = [each['name'] for each in http.get('/admin/traffic').json()['data']]
  assert names == [servers.MODEL]


@pytest.mark.parametrize(
  ('fields', 'status', 'message'),
  [
    ({'name': 'other', 'weights': {'12345678': 1}}, 404, 'model: got'),
    ({'weights': {'00000000': 1}}, 404, 'model: got'),
    ({'weights': {'0': 1}}, 404, 'model: got'),
    ({'weights': {'first': -1}}, 400, 'weights: got -1.0'),
    ({'weights': {'first': 1}, 'shadows': {'first': 2}}, 400, 'shadows: got'),
    ({'weights': {'first': 'x'}}, 400, 'weights'),
    ({'weights': {'first': 1}, 'kind': 1}, 400, 'kind: got a parameter'),
  ],
)
def test_wrong_traffic_is_refused_and_changes_nothing(
  http, generator, fields, status, message
):
  before = http.get('/admin/traffic').json()
  shapes.TrafficList.model_validate(before)
  digest = generator.frozen.manifest.weights_digest
  for part in ('weights', 'shadows'):
    if value := fields.get(part):
      fields = {**fields, part: {digest if k == 'first' else k: v
                                 for k, v in value.items()}}  # fmt: skip
  body = {'name': servers.MODEL, **fields}
  answer = http.post('/admin/traffic', json=body)
  assert message in _refused(answer, status)
  assert http.get('/admin/traffic').json() == before


def test_a_shadow_reads_the_same_tokens(http, generator):
  version = _load(http, 'retokenized', servers.MODEL).json()['id']
  servers.until(
    lambda: http.get(f'/admin/models/{version}').json()['state'] == 'ready'
  )
  digest = generator.frozen.manifest.weights_digest
  body = {
    'name': servers.MODEL,
    'weights': {digest: 1},
    'shadows': {version: 1},
  }
  message = _refused(http.post('/admin/traffic', json=body), 400)
  assert 'another tokenizer' in message
  assert http.delete(f'/admin/models/{version}').status_code == 202
  servers.until(lambda: http.get(f'/admin/models/{version}').status_code == 404)


# ------------------------------------------------------------------------------
# Who may


def _ask(http, **headers):
  return [
    http.request(method, path, json=body, headers=headers)
    for method, path, body in _ROUTES
  ]


def test_a_server_without_a_directory_of_models_loads_none(generator):
  for loader in (None, loader_lib.Loader(life_two.ENGINE)):
    records, key = servers.with_admin()
    app = {'loader': loader}
    with servers.running(generator, records=records, app=app) as served:
      answer = httpx2.post(
        f'{served.url}/admin/models',
        json={'name': 'a', 'path': 'good'},
        headers=key,
      )
      _refused(answer, 403, 'no_models_root')


def test_a_directory_of_models_must_exist(tmp_path):
  with pytest.raises(ValueError, match='server.models_root: got'):
    loader_lib.Loader(life_two.ENGINE, models_root=str(tmp_path / 'nothing'))


def test_only_the_key_of_an_admin_is_taken(generator, tmp_path):
  with (
    servers.running(generator) as served,
    httpx2.Client(base_url=served.url) as http,
  ):
    # Also where all other routes need none.
    assert {each.status_code for each in _ask(http)} == {401}
  (tmp_path / 'keys').write_text('alice:key')
  keys = api_keys.read(tmp_path / 'keys')
  with (
    servers.running(generator, keys) as served,
    httpx2.Client(base_url=served.url) as http,
  ):
    assert {each.status_code for each in _ask(http)} == {401}
    for answer in _ask(http, authorization='Bearer key'):
      _refused(answer, 403, 'insufficient_permissions')
