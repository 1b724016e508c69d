"""A server that is killed under load keeps an exact ledger."""

import contextlib
import sqlite3

import pytest

from tests.survival import replica_kills, server_kills


def _check(tmp_path, count, **options):
  told, faults = server_kills.run(tmp_path, count, **options)
  assert not faults, '\n'.join(faults)
  assert len(told.answered) > count  # it was busy
  return told


@pytest.mark.slow
def test_a_server_that_is_killed_loses_and_doubles_no_bill(tmp_path):
  told = _check(tmp_path, 2)
  # The audit can fail: a lost row, a changed count, a second row, an open one.
  path = tmp_path / 'records'
  name = next(each.request_id for each in told.answered if not each.is_replayed)
  for sql, fault in (
    (
      'UPDATE ledger SET completion_tokens = 99 WHERE request_id = ?',
      'got the',
    ),
    ('UPDATE ledger SET outcome = NULL WHERE request_id = ?', 'is open'),
    (
      "INSERT INTO ledger SELECT 'x' || id, request_id, idempotency, key_id,"
      ' principal, model, weights_digest, opened_at, reserved_tokens,'
      " reserved_nanos, 'finished', settled_at, prompt_tokens, cached_tokens,"
      ' completion_tokens, accepted_tokens, rejected_tokens, prefill_tokens,'
      ' decode_tokens, preemptions, flops, kv_byte_seconds, queue_ms,'
      ' prefill_ms, decode_ms, price_nanos FROM ledger WHERE request_id = ?',
      'has 2 rows',
    ),
    ('DELETE FROM ledger WHERE request_id = ?', 'got the row'),
  ):
    with contextlib.closing(sqlite3.connect(path)) as connection:
      connection.execute(sql, (name,))
      connection.commit()
    assert any(fault in each for each in server_kills.audit(path, told)), sql


@pytest.mark.slow
def test_a_server_that_is_killed_often(tmp_path):
  _check(tmp_path, 12, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize('num_processes', [1, 2])
def test_replicas_that_die_or_hang_lose_and_double_nothing(
  num_processes, tmp_path
):
  """Two replicas, and one replica over two processes."""
  told, faults = replica_kills.run(tmp_path, 2, num_processes=num_processes)
  assert not faults, '\n'.join(faults)
  assert len(told.answered) > 2
