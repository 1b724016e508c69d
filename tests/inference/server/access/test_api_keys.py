"""API keys: their principals, refusals, and separate tenants."""

import hashlib
import os
import pathlib

import httpx2
import openai
import pytest

from inference.server.access import api_keys
from tests.helpers.serving import servers

_FILE = """\
# who: what
alice:key-of-alice

  bob : key:of:bob
alice:newer-key
"""


def _read(tmp_path, text):
  (tmp_path / 'keys').write_text(text, encoding='utf-8')
  return api_keys.read(tmp_path / 'keys')


def test_a_key_belongs_to_a_principal(tmp_path):
  keys = _read(tmp_path, _FILE)
  assert keys.principal('key-of-alice') == 'alice'
  assert keys.principal('newer-key') == 'alice'
  assert keys.principal('key:of:bob') == 'bob'
  for nobody in ('', 'alice', 'key-of-alic', 'key-of-alice ', '\u00e9', 'who'):
    assert keys.principal(nobody) is None


def test_keys_are_kept_as_digests_and_all_of_them_are_compared(
  tmp_path, monkeypatch
):
  keys = _read(tmp_path, _FILE)
  assert 'key-of-alice' not in str(vars(keys))
  compared = []

  def compare(a, b):
    compared.append((a, b))
    return a == b

  monkeypatch.setattr(api_keys.hmac, 'compare_digest', compare)
  assert keys.principal('key-of-alice') == 'alice'
  # The first key fits, and the others are compared all the same.
  assert len(compared) == 3
  assert {len(digest) for pair in compared for digest in pair} == {
    hashlib.sha256().digest_size
  }


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('alice', 'keys:1: got a line that is not name:key'),
    ('# a\n:key', 'keys:2: got a line that is not name:key'),
    ('alice:', 'keys:1: got a line that is not name:key'),
    ('alice:caf\u00e9', 'a key of printable ASCII'),
    ('al\x00ice:key', 'expected a printable name'),
    ('a:same\nb:same', "keys:2: got the key of 'a' for 'b' too"),
    ('# nobody\n', 'got no key, expected at least one line name:key'),
  ],
)
def test_a_bad_file_is_refused_and_tells_no_key(tmp_path, text, message):
  with pytest.raises(ValueError, match=message) as caught:
    _read(tmp_path, text)
  assert 'same' not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match='does not exist, expected a'):
    api_keys.read(tmp_path / 'nowhere')


@pytest.mark.parametrize('path', ['', ' ', '.', '/dev/null'])
def test_no_file_of_keys_does_not_mean_no_keys(path):
  with pytest.raises(ValueError, match='--api_keys: got .*, expected a file'):
    api_keys.KeysFile(path)


def test_a_file_that_is_not_utf_8_is_named(tmp_path):
  (tmp_path / 'keys').write_bytes(b'alice:caf\xe9')
  with pytest.raises(ValueError, match=r'keys, which is not UTF-8 at byte 9'):
    api_keys.read(tmp_path / 'keys')
  (tmp_path / 'keys').write_bytes(b'\xef\xbb\xbfalice:key')
  assert api_keys.read(tmp_path / 'keys').principal('key') == 'alice'


def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
  (tmp_path / 'keys').write_text('alice:key')

  def read_text(*_):
    raise PermissionError(13, 'Permission denied')

  monkeypatch.setattr(pathlib.Path, 'read_text', read_text)
  with pytest.raises(ValueError, match='keys, which cannot be read'):
    api_keys.read(tmp_path / 'keys')


@pytest.mark.parametrize(
  ('mode', 'is_warned'),
  [(0o600, False), (0o640, False), (0o644, True), (0o602, True)],
)
def test_a_file_that_everybody_can_read_is_warned_of(
  tmp_path, caplog, mode, is_warned
):
  (tmp_path / 'keys').write_text('alice:key')
  (tmp_path / 'keys').chmod(mode)
  api_keys.read(tmp_path / 'keys')
  assert ('every user of this machine' in caplog.text) == is_warned
  assert ':key' not in caplog.text


def test_a_file_that_changes_is_read_again(tmp_path, caplog, monkeypatch):
  path = tmp_path / 'keys'
  path.write_text('alice:old')
  keys = api_keys.KeysFile(path)
  monkeypatch.setattr(api_keys, '_LOOK_SECONDS', 0.0)
  path.write_text('alice:newer')
  assert keys.principal('newer') == 'alice'
  assert keys.principal('old') is None
  # A mistake does not lock everybody out, and opens nothing.
  for text in ('nonsense', '', 'a:same\nb:same'):
    path.write_text(text)
    assert keys.principal('newer') == 'alice'
    assert keys.principal('') is None
  path.unlink()
  assert keys.principal('newer') == 'alice'
  assert caplog.text.count('the keys that were read before stay valid') == 4
  path.write_text('alice:last')
  assert keys.principal('newer') is None
  assert keys.principal('last') == 'alice'


def test_a_signal_has_the_file_read_again(tmp_path):
  path = tmp_path / 'keys'
  path.write_text('alice:old')
  keys = api_keys.KeysFile(path)
  before = path.stat()
  path.write_text('alice:new')
  os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
  assert keys.principal('old') == 'alice'  # same size, same time stamp
  keys.expire()
  assert keys.principal('new') == 'alice'


# ------------------------------------------------------------------------------
# Over HTTP


@pytest.fixture(scope='module')
def keyed(generator, tmp_path_factory):
  keys = _read(tmp_path_factory.mktemp('keys'), _FILE)
  with (
    servers.running(generator, keys) as served,
    httpx2.Client(base_url=served.url, timeout=60) as http,
  ):
    yield http


def _headers(key):
  return {'authorization': f'Bearer {key}'}


@pytest.mark.parametrize(
  'headers',
  [
    {},
    _headers('wrong'),
    {'authorization': 'Bearer'},
    {'authorization': 'key-of-alice'},
    {'authorization': 'Basic key-of-alice'},
  ],
)
def test_who_has_no_key_is_refused_before_anything_is_read(keyed, headers):
  for path in ('/v1/models', '/metrics', '/tokenizer_info', '/v1/nowhere'):
    assert keyed.get(path, headers=headers).status_code == 401
  answer = keyed.post('/v1/completions', content=b'{', headers=headers)
  assert answer.status_code == 401
  assert answer.headers['www-authenticate'] == 'Bearer'
  assert answer.headers['x-request-id'].startswith('req_')
  error = answer.json()['error']
  assert error['type'] == 'authentication_error'
  assert error['code'] == 'invalid_api_key'


def test_probes_want_no_key(keyed):
  assert keyed.get('/health').status_code == 200
  assert keyed.get('/ready').status_code == 200


def test_a_key_opens_in_any_spelling_of_the_scheme(keyed):
  for scheme in ('Bearer', 'bearer', 'BEARER '):
    headers = {'authorization': f'{scheme} key-of-alice'}
    assert keyed.get('/v1/models', headers=headers).status_code == 200
  assert keyed.get('/metrics', headers=_headers('newer-key')).status_code == 200


def test_openais_client_sends_its_key(keyed):
  with openai.OpenAI(base_url=f'{keyed.base_url}/v1', api_key='no') as client:
    with pytest.raises(openai.AuthenticationError, match='got no key that'):
      client.models.list()
    client.api_key = 'key-of-alice'
    assert client.models.list().data[0].id == servers.MODEL


def _cached(http, key, prompt, **fields):
  body = {'prompt': prompt, **servers.GREEDY, **fields}
  answer = http.post('/v1/completions', json=body, headers=_headers(key))
  assert answer.status_code == 200, answer.text
  answer = answer.json()
  cached = answer['usage']['prompt_tokens_details']['cached_tokens']
  assert answer['choices'][0]['accounting']['cached_tokens'] == cached
  return cached, answer['choices'][0]['text']


def test_one_principals_prompts_never_speed_up_anothers(keyed):
  prompt = 'a secret of several pages of tokens'
  first, text = _cached(keyed, 'key-of-alice', prompt)
  assert first == 0
  again, same = _cached(keyed, 'key-of-alice', prompt)
  other, _ = _cached(keyed, 'key:of:bob', prompt)
  newer, _ = _cached(keyed, 'newer-key', prompt)
  # 36 tokens with BOS: four full pages of eight.
  assert (again, other, newer) == (32, 0, 32)
  assert same == text


def test_anothers_prompt_costs_what_an_unknown_one_costs(keyed, generator):
  """What takes time is counted, so that no clock is needed."""
  known, unknown = 'known to alice alone: several pages', 'x' * 35
  assert len(known) == len(unknown)
  for _ in range(2):
    _cached(keyed, 'key-of-alice', known)

  def num_steps():
    servers.until(lambda: not generator.engine.has_work)
    return generator.engine.metrics.value('engine_steps_total')

  def cost(key, prompt):
    steps = num_steps()
    body = {'prompt': prompt, **servers.GREEDY, 'ignore_eos': True}
    answer = keyed.post('/v1/completions', json=body, headers=_headers(key))
    counts = answer.json()['choices'][0]['accounting']
    return (
      num_steps() - steps,
      counts['prefill_tokens'],
      counts['decode_tokens'],
      counts['flops'],
    )

  assert cost('key:of:bob', known) == cost('key:of:bob', unknown)
  assert cost('key-of-alice', known)[1] < cost('key-of-alice', unknown)[1]


def test_the_body_does_not_say_who_asks(keyed):
  prompt = 'another secret of several pages'
  assert _cached(keyed, 'key-of-alice', prompt, user='alice')[0] == 0
  assert _cached(keyed, 'key:of:bob', prompt, user='alice')[0] == 0
  body = {'prompt': prompt, 'principal': 'alice', **servers.GREEDY}
  answer = keyed.post(
    '/v1/completions', json=body, headers=_headers('key:of:bob')
  )
  assert answer.status_code == 400


def test_among_principals_nobody_comes_first_on_their_own_word(keyed):
  body = {'prompt': 'a', **servers.GREEDY}
  for priority, status in ((-1, 400), (0, 200), (5, 200)):
    answer = keyed.post(
      '/v1/completions',
      json={**body, 'priority': priority},
      headers=_headers('key-of-alice'),
    )
    assert answer.status_code == status
