"""Requests begin in turns, and threads beside the event loop give way to it."""

import asyncio
import os
import sys
import threading

import pytest

from inference.server.http import thread_priority, turns


def _begun(paths, leaves=()):
  """Returns the paths that have begun after each turn of the event loop."""
  begun = []

  async def app(scope, receive, send):
    begun.append(scope['path'])

  async def run():
    middleware = turns.Turns(app)
    tasks = [
      asyncio.create_task(
        middleware({'type': 'http', 'path': path}, None, None)
      )
      for path in paths
    ]
    after = []
    for turn in range(25):
      await asyncio.sleep(0)
      if turn == 0:
        for index in leaves:
          tasks[index].cancel()
      after.append(list(begun))
    await asyncio.gather(*tasks, return_exceptions=True)
    return after

  return asyncio.run(run())


def test_a_probe_does_not_wait_for_a_hundred_requests():
  most = turns.PER_TURN
  paths = [f'/{number}' for number in range(20 * most)] + ['/health', '/ready']
  first, *_, last = _begun(paths)
  assert {'/health', '/ready'} < set(first)
  assert len(first) == most + 2
  # The others begin first come first.
  assert [each for each in last if each not in paths[-2:]] == paths[:-2]


def test_requests_begin_at_once_while_few_ask():
  assert _begun(['/a', '/b'])[0] == ['/a', '/b']


def test_a_client_that_leaves_takes_no_turn():
  most = turns.PER_TURN
  paths = [f'/{number}' for number in range(3 * most)]
  after = _begun(paths, leaves=range(most, 2 * most))
  assert after[0] == paths[:most]
  assert after[-1] == paths[:most] + paths[2 * most :]


@pytest.mark.skipif(sys.platform != 'linux', reason='threads have priorities')
def test_a_thread_and_its_threads_have_a_lower_priority():
  found = []

  def look():
    found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

  def run():
    thread_priority.lower()
    inner = threading.Thread(target=look)
    inner.start()
    inner.join()

  look()
  thread = threading.Thread(target=run)
  thread.start()
  thread.join()
  look()
  own, lowered, own_after = found
  assert own_after == own
  assert lowered > own or own == 19
