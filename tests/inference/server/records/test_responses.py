"""Stored responses: their owner alone reads them, and deleted is gone."""

import asyncio
import contextlib

import pytest

from inference.server.records import database, responses


@contextlib.contextmanager
def _open(path=None, *, days=30, most_bytes=10_000):
  records = database.Database(path, tables=[responses.TABLES])
  try:
    yield responses.Store(records, days=days, most_bytes=most_bytes)
  finally:
    records.close()


def _row(text, answer='answer', size=0):
  item = {'type': 'message', 'role': 'user', 'content': text + 'x' * size}
  output = [{'type': 'message', 'role': 'assistant', 'content': answer}]
  return responses.Row.of({'output': output}, [item])


async def _put(store, name, text, *, owner='alice', previous=None, **fields):
  await store.put(owner, name, _row(text, **fields), previous)


def _texts(rows):
  return [item['content'] for item in responses.items(rows)]


def test_a_response_is_what_was_stored_and_its_owner_s_alone():
  async def run(store):
    await _put(store, 'r1', 'ü')
    assert await store.get('alice', 'r1') == _row('ü')
    for owner, name in (('bob', 'r1'), ('', 'r1'), ('alice', 'r2')):
      with pytest.raises(responses.Missing):
        await store.get(owner, name)
      with pytest.raises(responses.Missing):
        await store.delete(owner, name)
      with pytest.raises(responses.Missing):
        await store.conversation(owner, name, most_bytes=10_000)
    assert await store.get('alice', 'r1')

  with _open() as store:
    asyncio.run(run(store))


def test_a_conversation_has_all_items_in_their_order():
  async def run(store):
    await _put(store, 'r1', 'one', answer='1')
    await _put(store, 'r2', 'two', answer='2', previous='r1')
    await _put(store, 'r2b', 'other', answer='x', previous='r1')
    await _put(store, 'r3', 'three', answer='3', previous='r2')
    rows = await store.conversation('alice', 'r3', most_bytes=10_000)
    assert _texts(rows) == ['one', '1', 'two', '2', 'three', '3']
    most = sum(row.size for row in rows)
    assert await store.conversation('alice', 'r3', most_bytes=most)
    with pytest.raises(responses.TooLong):
      await store.conversation('alice', 'r3', most_bytes=most - 1)
    await store.delete('alice', 'r1')
    with pytest.raises(responses.Missing, match='r1'):
      await store.conversation('alice', 'r3', most_bytes=10_000)
    assert await store.get('alice', 'r3')

  with _open() as store:
    asyncio.run(run(store))


def test_what_is_deleted_or_too_old_is_on_no_disk(tmp_path, monkeypatch):
  path = tmp_path / 'records'

  def is_on_disk(text):
    return any(text in each.read_bytes() for each in tmp_path.iterdir())

  async def run(store):
    await _put(store, 'r1', 'a secret', size=5000)
    await _put(store, 'r2', 'another one', previous='r1')
    assert is_on_disk(b'a secret')
    await store.delete('alice', 'r1')
    assert not is_on_disk(b'a secret')
    assert is_on_disk(b'another one')
    now = responses.time.time()
    monkeypatch.setattr(responses.time, 'time', lambda: now + 31 * 86400)
    with pytest.raises(responses.Missing):
      await store.get('alice', 'r2')
    await store.expire()
    assert not is_on_disk(b'another one')

  with _open(path) as store:
    asyncio.run(run(store))


def test_new_responses_make_room_among_their_owner_s_oldest(monkeypatch):
  clock = iter(range(10**9, 10**9 + 100))
  monkeypatch.setattr(responses.time, 'time', lambda: next(clock))

  async def run(store):
    await _put(store, 'other', 'bob has his own', owner='bob', size=900)
    for n in range(6):
      await _put(store, f'r{n}', f'text {n}', size=900)
    kept = []
    for n in range(6):
      with contextlib.suppress(responses.Missing):
        await store.get('alice', f'r{n}')
        kept.append(n)
    assert kept == [4, 5]
    assert await store.get('bob', 'other')

  with _open(most_bytes=3000) as store:
    asyncio.run(run(store))


def test_responses_outlive_the_process(tmp_path):
  with _open(tmp_path / 'records') as store:
    asyncio.run(_put(store, 'r1', 'one'))
  with _open(tmp_path / 'records') as store:
    assert asyncio.run(store.get('alice', 'r1')) == _row('one')
