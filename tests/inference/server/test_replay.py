"""Receipts and their replay: is it the weights, or is it the server?"""

import base64
import contextlib
import dataclasses
import json
import secrets
import sqlite3

import httpx2
import jax
import numpy as np
import pytest

from inference import generate
from inference.server import app as app_lib, start
from inference.server.access import api_keys
from inference.server.receipts import receipts, sealing
from inference.server.records import database
from tests.helpers import commands, frozen_dirs
from tests.helpers.serving import servers
from tests.inference import conftest as life_two

_BODY = {
  'model': servers.MODEL,
  'prompt': 'a receipt of this',
  'max_tokens': 16,
  'temperature': 0.8,
  'top_p': 0.9,
  'repetition_penalty': 1.1,
  'frequency_penalty': 0.3,
  'min_tokens': 16,
  'logit_bias': {'97': 1.5},
  'stop': ['never to be seen'],
}


@contextlib.contextmanager
def _recording(generator, path, seal=None, keys=None):
  records = database.Database(path, tables=app_lib.TABLES)
  recorder = receipts.Recorder(records, seal)
  app = {'observers': [recorder]}
  with servers.running(
    generator, keys, records=records, app=app, audit_share=0
  ) as served:
    yield served


def _ask(served, headers=None, **fields):
  answer = httpx2.post(
    f'{served.url}/v1/completions',
    json={**_BODY, **fields},
    headers=headers,
    timeout=60,
  )
  assert answer.status_code == 200, answer.text
  return answer


def _replay(request_id, path, model, *flags):
  done = commands.run(
    'inference/server/replay.py',
    request_id,
    f'--records={path}',
    f'--model={model}',
    *flags,
  )
  return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope='module')
def recorded(generator, tmp_path_factory):
  """Returns the file of records, and answers whose receipts it holds."""
  path = tmp_path_factory.mktemp('records') / 'records.db'
  with _recording(generator, path) as served:
    answers = {
      'plain': _ask(served),
      'again': _ask(served),  # its prompt is in the prefix cache
      'greedy': _ask(served, temperature=0, prompt='x'),
      'several': _ask(served, n=2, prompt=['one', 'two'], top_k=7, min_p=0.01),
      'scored': _ask(served, max_tokens=0, min_tokens=0, echo=True, logprobs=1),
      'stream': _ask(served, stream=True, logprobs=2),
      'constrained': _ask(
        served,
        min_tokens=0,
        structured_outputs={'json': {'type': 'array', 'minItems': 2}},
      ),
    }
  return path, answers


@pytest.mark.fast_cases(4)
@pytest.mark.parametrize(
  'name',
  ['plain', 'again', 'greedy', 'several', 'scored', 'stream', 'constrained'],
)
def test_an_answer_of_the_weights_is_a_training_problem(
  recorded, frozen_dir, name
):
  path, answers = recorded
  request_id = answers[name].headers['x-request-id']
  code, out, err = _replay(request_id, path, frozen_dir)
  assert (code, err) == (0, ''), out
  choices = 4 if name == 'several' else 1
  assert out.count('a training problem') == choices
  assert 'the weights say it' in out
  assert 'an inference problem' not in out


def test_the_id_of_the_answer_names_the_receipt_too(recorded, frozen_dir):
  path, answers = recorded
  answer = answers['several']
  (one,) = (_replay(answer.json()['id'], path, frozen_dir, '--choice=2'),)
  assert one[0] == 0
  assert 'choice 2' in one[1]
  assert 'choice 1' not in one[1]
  assert answer.headers['x-request-id'] in one[1]


def test_a_client_sees_no_difference(recorded):
  _, answers = recorded
  assert answers['plain'].json()['choices'][0]['logprobs'] is None
  event = servers.events(answers['stream'].content)[0]
  # Two alternatives, and the token itself if it is neither.
  assert len(event['choices'][0]['logprobs']['top_logprobs'][0]) in (2, 3)


def _tampered(recorded, tmp_path, change):
  """Returns a copy of the records in which a receipt is changed."""
  path, answers = recorded
  request_id = answers['plain'].headers['x-request-id']
  connection = sqlite3.connect(path)
  (receipt,) = receipts.find(connection, receipts.digits(request_id), None)
  connection.close()
  other = tmp_path / 'records.db'
  records = database.Database(other, tables=app_lib.TABLES)
  recorder = receipts.Recorder(records, None)
  records.submit(recorder._insert, change(receipt)).result()
  records.close()
  return request_id, other


def test_another_token_is_an_inference_problem_with_its_place(
  recorded, frozen_dir, tmp_path
):
  def change(receipt):
    ids = list(receipt.token_ids)
    ids[5] = (ids[5] + 7) % 256
    return dataclasses.replace(receipt, token_ids=tuple(ids))

  request_id, path = _tampered(recorded, tmp_path, change)
  code, out, _ = _replay(request_id, path, frozen_dir)
  assert code == 1
  assert 'wrong     first at new token 5 ' in out
  assert 'verdict   an inference problem' in out


def test_another_logprob_is_an_inference_problem_with_its_place(
  recorded, frozen_dir, tmp_path
):
  def change(receipt):
    found = list(receipt.logprobs)
    found[3] -= 0.25
    return dataclasses.replace(receipt, logprobs=tuple(found))

  request_id, path = _tampered(recorded, tmp_path, change)
  code, out, _ = _replay(request_id, path, frozen_dir)
  assert code == 1
  assert 'largest   at new token 3 ' in out
  assert 'difference 0.25' in out
  # What may be rounding is the operator's to say.
  code, out, _ = _replay(request_id, path, frozen_dir, '--tolerance=0.5')
  assert code == 0
  assert 'within rounding' in out


def test_a_sampler_that_took_another_seed_is_an_inference_problem(
  recorded, frozen_dir, tmp_path
):
  request_id, path = _tampered(
    recorded,
    tmp_path,
    lambda receipt: dataclasses.replace(receipt, seed=receipt.seed + 1),
  )
  code, out, _ = _replay(request_id, path, frozen_dir)
  assert code == 1
  assert 'the replay takes id ' in out


def test_a_wrong_page_is_found_by_the_replay(generator, frozen_dir, tmp_path):
  path, engine = tmp_path / 'records.db', generator.engine
  original = engine.step

  def step():
    updates = original()
    # By NumPy: the engine's thread is to compile nothing.
    engine._state = engine._state._replace(
      kv_cache=jax.tree.map(
        lambda x: jax.device_put(np.array(x) * np.float32(0.9)),
        engine._state.kv_cache,
      )
    )
    return updates

  with _recording(generator, path) as served:
    engine.step = step
    try:
      answer = _ask(served, prompt='pages')
    finally:
      del engine.step
  engine.manager.clear()
  code, out, _ = _replay(answer.headers['x-request-id'], path, frozen_dir)
  assert code == 1
  assert 'verdict   an inference problem' in out
  assert 'had part  attention was ' in out


@pytest.mark.slow
def test_invariant_numerics_replay_bit_for_bit(frozen_dir, tmp_path):
  config = dataclasses.replace(life_two.ENGINE, numerics='invariant')
  generator = generate.load(frozen_dir, config)
  path = tmp_path / 'records.db'
  with _recording(generator, path) as served:
    answers = [_ask(served, n=3), _ask(served)]
  for answer in answers:
    code, out, _ = _replay(answer.headers['x-request-id'], path, frozen_dir)
    assert code == 0
    assert 'differs   nowhere' in out
    assert 'bit for bit' in out


def test_other_weights_or_no_receipt_are_refused(
  recorded, frozen_dir, tmp_path
):
  path, answers = recorded
  request_id = answers['plain'].headers['x-request-id']
  config = frozen_dirs.config(num_layers=1)
  params = frozen_dirs.params(config, seed=9)
  frozen_dirs.write(tmp_path / 'other', config=config, params=params)
  (tmp_path / 'text').write_text('no database')
  empty = database.Database(tmp_path / 'empty.db')
  empty.close()
  for asked, records, model, message in (
    (request_id, path, tmp_path / 'other', '--model: got'),
    (
      request_id,
      path,
      tmp_path / 'none',
      'got no such file, expected a frozen',
    ),
    ('req_' + '0' * 32, path, frozen_dir, 'got no receipt in'),
    ('hello', path, frozen_dir, "id: got 'hello', expected one such as"),
    (request_id, tmp_path / 'none', frozen_dir, '--records: got'),
    (request_id, tmp_path / 'text', frozen_dir, 'which has no receipts'),
    (request_id, tmp_path / 'empty.db', frozen_dir, 'which has no receipts'),
  ):
    code, out, err = _replay(asked, records, model)
    assert (code, out) == (2, ''), err
    assert err.startswith('error: ')
    assert message in err
    assert err.count('\n') == 1


# ------------------------------------------------------------------------------
# Private


def _key(tmp_path):
  path = tmp_path / 'key'
  path.write_bytes(base64.b64encode(secrets.token_bytes(32)))
  path.chmod(0o600)
  return path


def test_sealed_receipts_are_read_with_the_key_alone(
  generator, frozen_dir, tmp_path
):
  pytest.importorskip('cryptography')
  key, path = _key(tmp_path), tmp_path / 'records.db'
  seal = sealing.read(key, flag='--receipts_key')
  (tmp_path / 'keys').write_text('alice:key')
  keys = api_keys.read(tmp_path / 'keys')
  with _recording(generator, path, seal, keys) as served:
    answer = _ask(served, headers={'authorization': 'Bearer key'})
  request_id = answer.headers['x-request-id']
  ids = list(b'a receipt of this')
  data = b''.join(each.read_bytes() for each in tmp_path.glob('records.db*'))
  assert json.dumps(ids).encode()[1:-1] not in data
  code, _, err = _replay(request_id, path, frozen_dir)
  assert code == 2
  assert 'key_file: got none' in err
  code, out, _ = _replay(request_id, path, frozen_dir, f'--key_file={key}')
  assert (code, 'a training problem' in out) == (0, True)


def test_a_tenant_without_a_seal_is_not_recorded(generator, tmp_path):
  """Keys may be made while a server without keys runs."""
  (tmp_path / 'keys').write_text('alice:key')
  keys, path = api_keys.read(tmp_path / 'keys'), tmp_path / 'records.db'
  with _recording(generator, path, None, keys) as served:
    _ask(served, headers={'authorization': 'Bearer key'})
  rows = sqlite3.connect(path).execute('SELECT count(*) FROM receipts')
  assert rows.fetchone() == (0,)


@pytest.mark.parametrize(
  ('fields', 'has_keys', 'message'),
  [
    ({'has_receipts': True}, False, '--receipts: got no --records'),
    (
      {'has_receipts': True, 'records': 'r'},
      True,
      '--receipts: got API keys and no --receipts_key',
    ),
    ({'receipts_key': 'k'}, False, '--receipts_key: got k without --receipts'),
  ],
)
def test_receipts_that_would_be_lost_or_open_are_refused(
  fields, has_keys, message
):
  options = start.Options(
    directory='d',
    name='n',
    engine=life_two.ENGINE,
    limits=app_lib.server_config.ServerConfig(),
    host='127.0.0.1',
    port=0,
    **fields,
  )
  with pytest.raises(ValueError, match=message):
    start._seal(options, has_keys=has_keys)


def test_a_damaged_receipt_is_refused():
  for data in (b'', b'x', receipts.zlib.compress(b'{"format": 1}')):
    with pytest.raises(ValueError, match='receipt: got one that cannot be'):
      receipts.unpacked(data)
  with pytest.raises(ValueError, match='got format 2, expected 1'):
    receipts.unpacked(receipts.zlib.compress(b'{"format": 2}'))
