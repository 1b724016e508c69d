"""Keys of the records: hashed, shown once, revoked at once; roles; exposure."""

import asyncio
import contextlib
import re
import sqlite3
import subprocess
import sys

import httpx2
import pytest

from inference.server import app as app_lib
from inference.server.access import api_keys, keys
from inference.server.records import database
from tests.helpers.serving import servers


def _run(*args):
  return subprocess.run(
    [sys.executable, '-m', 'inference.server.keys', *map(str, args)],
    capture_output=True,
    text=True,
    check=False,
  )


def _created(*args):
  done = _run('create', *args)
  assert done.returncode == 0, done.stderr
  (text,) = re.findall(r'^sk-\S+$', done.stdout, re.M)
  return done.stdout.split()[0], text


def test_a_key_is_shown_once_and_stored_as_a_digest(tmp_path):
  path = tmp_path / 'records'
  key_id, text = _created(f'--records={path}', '--name=alice', '--budget=2.5')
  stored = b''.join(each.read_bytes() for each in tmp_path.iterdir())
  assert text.encode() not in stored
  assert text.removeprefix('sk-').encode() not in stored
  listed = _run('list', f'--records={path}').stdout
  assert text not in listed
  assert f'{key_id}  alice' in listed
  assert 'budget=2.5' in listed
  assert len(text) > 40  # guessing is out of reach, so that a plain hash does
  assert _created(f'--records={path}', '--name=alice')[1] != text


@pytest.mark.parametrize(
  ('args', 'message'),
  [
    (('create',), '--name: got none, expected the name of the owner'),
    (('create', '--name= '), "name: got ' ', expected printable text"),
    (('create', '--name=a', '--budget=-1'), 'budget: got -1.0, expected'),
    (('create', '--name=a', '--weight=0'), 'weight: got 0.0, expected'),
    (
      ('create', '--name=a', '--max_concurrent=0'),
      'max_concurrent: got 0, expected at least 1',
    ),
    (('revoke',), '--id: got none, expected'),
    (('change', '--budget=3'), '--id: got none, expected'),
    (
      ('change', '--id=key_x', '--budget=3'),
      "id: got 'key_x', expected the id of a key",
    ),
    (('change', '--id=key_x'), 'change: got no new value, expected a limit'),
    (
      ('change', '--id=key_x', '--role=admin'),
      '--role: got one for a key that exists, expected none',
    ),
    (
      ('change', '--id=key_x', '--unlimited=money'),
      '--unlimited: got money, expected names of requests_per_minute',
    ),
    (
      ('change', '--id=key_x', '--budget=3', '--unlimited=budget'),
      '--unlimited: got budget, which --budget limits',
    ),
    (('revoke', '--id=key_x'), "id: got 'key_x', expected the id of a key"),
  ],
)
def test_a_wrong_command_is_one_line_and_changes_nothing(
  tmp_path, args, message
):
  path = tmp_path / 'records'
  _created(f'--records={path}', '--name=alice')
  done = _run(*args, f'--records={path}')
  assert done.returncode == 2
  assert message in done.stderr
  assert done.stderr.count('\n') == 1
  assert len(_run('list', f'--records={path}').stdout.splitlines()) == 2


def test_a_change_is_of_what_is_given_alone(tmp_path):
  path = tmp_path / 'records'
  key_id, _ = _created(
    f'--records={path}', '--name=alice', '--budget=2', '--weight=3',
    '--tokens_per_minute=50',
  )  # fmt: skip
  done = _run(
    'change', f'--records={path}', f'--id={key_id}', '--budget=9.5',
    '--unlimited=tokens_per_minute', '--allows_feedback',
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  line = _run('list', f'--records={path}').stdout.splitlines()[1]
  assert line.endswith('yes       budget=9.5 weight=3')
  wrong = _run('change', f'--records={path}', f'--id={key_id}', '--weight=-1')
  assert 'weight: got -1.0, expected' in wrong.stderr
  assert _run('list', f'--records={path}').stdout.splitlines()[1] == line


def test_a_list_of_no_file_makes_none(tmp_path):
  done = _run('list', f'--records={tmp_path / "none"}')
  assert (done.returncode, list(tmp_path.iterdir())) == (2, [])
  assert 'which does not exist, expected' in done.stderr


# ------------------------------------------------------------------------------
# The server


def _ask(url, text=None, path='/v1/models'):
  headers = {'authorization': f'Bearer {text}'} if text else {}
  return httpx2.get(f'{url}{path}', headers=headers, timeout=60)


def _create(connection_of, **fields):
  return connection_of.submit(
    lambda connection: keys.create(connection, **{'name': 'alice', **fields})
  ).result()


@pytest.fixture
def records(tmp_path):
  return database.Database(tmp_path / 'records', tables=app_lib.TABLES)


def test_keys_come_and_go_while_the_server_runs(generator, records, tmp_path):
  other = database.Database(tmp_path / 'records')  # as the command opens it
  with servers.running(generator, records=records) as served:
    assert _ask(served.url).status_code == 200
    key, text = _create(other)
    # The first key closes the server, within a second.
    servers.until(lambda: _ask(served.url).status_code == 401, seconds=1)
    assert _ask(served.url, text).status_code == 200
    assert _ask(served.url, f'{text}x').status_code == 401
    newer, newer_text = _create(other)
    servers.until(
      lambda: _ask(served.url, newer_text).status_code == 200, seconds=1
    )
    other.submit(keys.revoke, key.id).result()
    servers.until(lambda: _ask(served.url, text).status_code == 401, seconds=1)
    assert _ask(served.url, newer_text).status_code == 200
    # Without any valid key the server is closed, not open.
    other.submit(keys.revoke, newer.id).result()
    servers.until(
      lambda: _ask(served.url, newer_text).status_code == 401, seconds=1
    )
    assert _ask(served.url).status_code == 401
    for path in api_keys.OPEN_PATHS:
      assert _ask(served.url, path=path).status_code == 200
  other.close()


def test_after_a_quiet_hour_no_revoked_key_passes(records):
  async def ask():
    key, text = _create(records)
    keyring = keys.Keyring(records)
    assert await keyring.find(text) == key
    records.submit(keys.revoke, key.id).result()
    keyring._looked -= 3600
    found = await asyncio.gather(*(keyring.find(text) for _ in range(5)))
    assert found == [None] * 5

  asyncio.run(ask())
  records.close()


def test_keys_stay_valid_while_the_records_cannot_be_read(records, caplog):
  async def ask():
    key, text = _create(records)
    keyring = keys.Keyring(records)

    async def run(*_):
      raise sqlite3.OperationalError('disk I/O error')

    keyring._records = type('Broken', (), {'run': staticmethod(run)})()
    keyring._looked -= 3600
    assert await keyring.find(text) == key
    assert await keyring.find('other') is None

  asyncio.run(ask())
  assert 'the keys that were read before stay valid' in caplog.text
  records.close()


def test_all_keys_are_compared(records, monkeypatch):
  texts = [_create(records)[1] for _ in range(3)]
  keyring = keys.Keyring(records)
  compared = []

  def compare(a, b):
    compared.append((a, b))
    return a == b

  monkeypatch.setattr(keys.hmac, 'compare_digest', compare)
  found = asyncio.run(keyring.find(texts[0]))
  assert found is not None
  assert found.name == 'alice'
  assert len(compared) == 3
  records.close()


def test_a_key_says_whom_a_request_comes_from(generator, records, tmp_path):
  (tmp_path / 'keys').write_text('bob:key-of-bob')
  file = api_keys.read(tmp_path / 'keys')
  key, text = _create(records, allows_feedback=True, weight=2.0)
  keyring = keys.Keyring(records, file)

  async def find():
    return [await keyring.find(each) for each in (text, 'key-of-bob', '')]

  mine, of_file, nobody = asyncio.run(find())
  assert mine == key
  assert (of_file.name, of_file.is_admin, of_file.budget) == (
    'bob',
    False,
    None,
  )
  assert nobody is None
  with servers.running(generator, file, records=records) as served:
    assert _ask(served.url, text).status_code == 200
    assert _ask(served.url, 'key-of-bob').status_code == 200
    assert _ask(served.url).status_code == 401


def test_admin_routes_need_an_admin_key_in_any_case(generator, records):
  paths = '/admin', '/admin/models', '/admin/x/y'

  def statuses(url, text=None):
    return {_ask(url, text, path).status_code for path in paths}

  with servers.running(generator, records=records) as served:
    assert statuses(served.url) == {401}  # the server has no keys at all
    assert _ask(served.url, path='/administer').status_code == 404
    user, admin = (
      _create(records, name=f'{is_admin}', is_admin=is_admin)[1]
      for is_admin in (False, True)
    )
    servers.until(lambda: _ask(served.url).status_code == 401, seconds=1)
    assert statuses(served.url) == {401}
    assert statuses(served.url, user) == {403}
    assert statuses(served.url, admin) == {200, 404}  # some do not exist
    error = _ask(served.url, user, '/admin/models').json()['error']
    assert error['code'] == 'insufficient_permissions'
    assert 'expected a key of an admin' in error['message']


@pytest.mark.parametrize('is_public', [False, True])
def test_metrics_need_a_key_unless_they_are_public(
  generator, records, is_public
):
  _create(records)
  with servers.running(
    generator, records=records, public_metrics=is_public
  ) as served:
    status = _ask(served.url, path='/metrics').status_code
    assert status == (200 if is_public else 401)
    assert _ask(served.url).status_code == 401


def test_the_document_follows_the_first_key(generator, records):
  with servers.running(generator, records=records) as served:
    document = _ask(served.url, path='/openapi.json').json()
    assert 'securitySchemes' not in document['components']
    _, text = _create(records)
    servers.until(lambda: _ask(served.url).status_code == 401, seconds=1)
    document = _ask(served.url, text, '/openapi.json').json()
    assert document['components']['securitySchemes']
    assert '401' in document['paths']['/metrics']['get']['responses']


@pytest.mark.parametrize(
  ('host', 'is_loopback'),
  [
    ('127.0.0.1', True),
    ('127.8.8.8', True),
    ('::1', True),
    ('[::1]', True),
    ('localhost', True),
    ('0.0.0.0', False),
    ('::', False),
    ('10.0.0.1', False),
    ('example.com', False),
    ('localhost.example.com', False),
  ],
)
def test_without_keys_only_this_machine_is_answered(host, is_loopback):
  assert keys.is_loopback(host) == is_loopback
  for has_keys, is_insecure in ((True, False), (False, True)):
    keys.check_exposure(host, has_keys=has_keys, is_insecure=is_insecure)
  refused = (
    contextlib.nullcontext()
    if is_loopback
    else pytest.raises(ValueError, match='--host: got .*, expected a loopback')
  )
  with refused:
    keys.check_exposure(host, has_keys=False, is_insecure=False)
