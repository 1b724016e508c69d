"""The thread that owns the engine, with an engine that a test can hold."""

import asyncio
import gc
import threading
import types
import weakref

import pytest

from inference.engine import engine as engine_lib
from inference.requests import requests
from inference.sampling import settings
from inference.server import engine_loop as engine_loop_lib

_WAIT = 20  # seconds until a test gives up


def _generator(engine):
  return types.SimpleNamespace(
    engine=engine,
    memory_text=lambda: 'KV cache',
    products_text=lambda: '',
  )


class _Engine:
  """Counts to max_tokens for each request, a token per step."""

  def __init__(self):
    self.open: dict[int, requests.Request] = {}
    self.made: dict[int, int] = {}
    self.cancelled: list[int] = []
    self.threads: set[str] = set()
    self.may_step = threading.Event()
    self.may_step.set()
    self.is_burning = False
    self.num_steps = 0

  @property
  def has_work(self):
    return bool(self.open)

  def compile_rest(self):
    pass

  def submit_all(self, asked):
    self.threads.add(threading.current_thread().name)
    for request in asked:
      if request.settings.seed == 13:
        raise ValueError('prompt: unlucky')
      if request.settings.seed == 14:
        raise engine_lib.Overloaded('try again later')
    request_ids = [len(self.made) + which for which in range(len(asked))]
    for request_id, request in zip(request_ids, asked, strict=True):
      self.open[request_id], self.made[request_id] = request, 0
    return request_ids

  def cancel(self, request_id):
    self.cancelled.append(request_id)
    request = self.open.pop(request_id)
    return [
      requests.Update(request_id, index, '', (), (), f'at {self.num_steps}')
      for index in range(request.settings.n)
    ]

  def step(self):
    self.threads.add(threading.current_thread().name)
    assert self.may_step.wait(_WAIT)
    self.num_steps += 1
    if self.is_burning:
      raise RuntimeError('the device is on fire')
    updates = []
    for request_id, request in list(self.open.items()):
      self.made[request_id] += 1
      is_last = self.made[request_id] == request.settings.max_tokens
      if is_last:
        del self.open[request_id]
      for index in range(request.settings.n):
        updates.append(
          requests.Update(
            request_id, index, 'x', (1,), (), 'done' if is_last else None
          )
        )
    return updates


def _request(max_tokens=3, **fields):
  return requests.Request(
    prompt_ids=(1,),
    settings=settings.Settings(max_tokens=max_tokens, **fields),
  )


def _run(test, engine=None, load=None, **kwargs):
  """Runs a coroutine function of (engine, loop), and closes the loop."""
  engine = engine or _Engine()
  loop = engine_loop_lib.EngineLoop(
    load or (lambda: _generator(engine)), **kwargs
  )

  async def main():
    loop.start()
    try:
      await test(engine, loop)
    finally:
      engine.may_step.set()
      await asyncio.wait_for(loop.close(), _WAIT)

  asyncio.run(asyncio.wait_for(main(), 2 * _WAIT))
  assert not loop._thread.is_alive()
  return engine


async def _count(updates):
  return len([item async for item in updates])


async def _until(condition):
  async with asyncio.timeout(_WAIT):
    while not condition():
      await asyncio.sleep(0.001)


def test_updates_arrive_in_order_from_one_thread():
  async def test(_, loop):
    updates = await loop.submit([_request(), _request(max_tokens=1, n=2)])
    got = [(which, update.index) async for which, update in updates]
    assert got == [(0, 0), (1, 0), (1, 1), (0, 0), (0, 0)]
    assert [item async for item in updates] == []  # there is no further update
    assert loop.state == engine_loop_lib.READY

  engine = _run(test)
  assert engine.threads == {'engine'}
  assert engine.cancelled == []


def test_requests_join_a_batch_that_runs_and_leave_it():
  async def test(engine, loop):
    engine.may_step.clear()
    first = await loop.submit([_request(max_tokens=10**6)])
    asked = asyncio.create_task(loop.submit([_request()]))
    await asyncio.sleep(0)
    engine.may_step.set()
    second = await asked
    assert await _count(second) == 3
    assert len(engine.open) == 1  # the first request is still open
    first.close()
    first.close()  # a second close has no effect
    await _until(lambda: engine.cancelled)
    assert [item async for item in first] == []

  engine = _run(test)
  assert engine.cancelled == [0]
  assert engine.num_steps < 10**6


def test_without_work_nothing_is_done():
  async def test(engine, loop):
    assert await _count(await loop.submit([_request()])) == 3
    await asyncio.sleep(0.05)
    assert engine.num_steps == 3

  _run(test)


def test_a_refusal_of_the_engine_reaches_who_asked():
  async def test(engine, loop):
    with pytest.raises(ValueError, match='unlucky'):
      await loop.submit([_request(), _request(seed=13)])
    with pytest.raises(engine_lib.Overloaded, match='try again later'):
      await loop.submit([_request(), _request(seed=14)])
    assert engine.open == {}
    assert loop._open == {}
    assert await _count(await loop.submit([_request(n=3)])) == 3 * 3

  engine = _run(test)
  assert len(engine.made) == 1


def test_who_leaves_before_being_taken_in_is_cancelled():
  async def test(engine, loop):
    engine.may_step.clear()
    first = await loop.submit([_request(max_tokens=1000)])
    asked = asyncio.create_task(loop.submit([_request(max_tokens=1000)]))
    await asyncio.sleep(0)
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
      await asked
    engine.may_step.set()
    await _until(lambda: engine.cancelled == [1])
    first.close()

  _run(test)


def test_a_failed_step_fails_everything_and_nothing_hangs(caplog):
  async def test(engine, loop):
    asked = [_request(max_tokens=10**6)]
    open_ones = [await loop.submit(asked) for _ in range(2)]
    engine.is_burning = True
    for updates in open_ones:
      with pytest.raises(engine_loop_lib.Failed, match='the engine has failed'):
        await asyncio.wait_for(_count(updates), _WAIT)
      updates.close()
    assert loop.state == engine_loop_lib.FAILED
    for _ in range(2):
      with pytest.raises(engine_loop_lib.Failed):
        await loop.submit(asked)

  _run(test)
  assert 'the device is on fire' in caplog.text


def test_a_failed_submission_is_a_failed_engine():
  async def test(engine, loop):
    engine.submit_all = lambda _: 1 / 0
    with pytest.raises(engine_loop_lib.Failed):
      await loop.submit([_request()])
    await _until(lambda: loop.state == engine_loop_lib.FAILED)
    assert isinstance(loop.failure, ZeroDivisionError)

  _run(test)


def test_closing_cancels_what_is_open():
  async def test(engine, loop):
    updates = await loop.submit([_request(max_tokens=10**6)])
    await loop.close()
    assert engine.open == {}
    with pytest.raises(engine_loop_lib.Stopped, match='the server is stopping'):
      await _count(updates)
    with pytest.raises(engine_loop_lib.Stopped):
      await loop.submit([_request()])
    assert loop.state == engine_loop_lib.STOPPED

  _run(test)


def test_it_is_loading_until_it_is_ready():
  may_load = threading.Event()
  engine = _Engine()

  def load():
    assert may_load.wait(_WAIT)
    return _generator(engine)

  async def test(_, loop):
    assert (loop.state, loop.is_loading) == (engine_loop_lib.LOADING, True)
    asked = asyncio.create_task(loop.submit([_request()]))
    await asyncio.sleep(0.01)
    assert not asked.done()
    may_load.set()
    assert await _count(await asked) == 3
    assert (loop.state, loop.is_loading) == (engine_loop_lib.READY, False)

  _run(test, engine, load)


def test_closing_does_not_wait_for_what_cannot_be_interrupted():
  may_load = threading.Event()

  def load():
    assert may_load.wait(_WAIT)
    return _generator(_Engine())

  async def main():
    loop = engine_loop_lib.EngineLoop(load)
    loop.start()
    await asyncio.wait_for(loop.close(), 5)
    assert loop.is_loading
    return loop

  loop = asyncio.run(main())
  may_load.set()
  loop._thread.join(_WAIT)
  assert not loop._thread.is_alive()


def test_a_failed_load_is_told():
  told = []

  def load():
    raise ValueError('engine.page_size: got 7')

  async def test(_, loop):
    await _until(lambda: told)
    assert 'got 7' in str(loop.failure)
    assert (loop.state, loop.is_loading) == (engine_loop_lib.FAILED, False)
    with pytest.raises(engine_loop_lib.Failed):
      await loop.submit([_request()])

  _run(test, load=load, on_load_failure=lambda: told.append(True))


# ------------------------------------------------------------------------------
# Whatever ends a submission, its end is told once, with all counts.


def _told(loop, requests):
  """Submits; returns the coroutine of the updates and the list of ends."""
  ends = []
  return loop.submit(requests, ends.append), ends


def _completions(ended):
  return [update.completion for _, update in ended.updates]


def test_a_finish_is_told_before_the_last_update_is_handed_out():
  async def test(_, loop):
    may_end = asyncio.Event()
    ends = []

    def on_end(ended):
      ends.append(ended)
      return may_end.wait()

    updates = await loop.submit([_request(max_tokens=2)], on_end)
    assert (await anext(updates))[1].completion is None
    last = asyncio.create_task(anext(updates))
    await _until(lambda: ends)
    await asyncio.sleep(0.01)
    assert not last.done()
    may_end.set()
    assert (await last)[1].completion == 'done'
    (ended,) = ends
    assert (_completions(ended), ended.error) == (['done'], None)

  _run(test)


def test_a_cancel_tells_what_ended_before_it_and_what_it_ended():
  async def test(_, loop):
    coroutine, ends = _told(loop, [_request(1), _request(10**6, n=2)])
    updates = await coroutine
    assert (await anext(updates))[1].completion == 'done'
    updates.close()
    await _until(lambda: ends)
    await loop.close()
    (ended,) = ends
    assert [which for which, _ in ended.updates] == [0, 1, 1]
    assert _completions(ended)[0] == 'done'
    assert ended.error is None

  _run(test)


@pytest.mark.parametrize('seed', [13, 14])
def test_a_refusal_is_told_also_if_nobody_waits_for_it(seed):
  async def test(engine, loop):
    coroutine, ends = _told(loop, [_request(seed=seed)])
    with pytest.raises((ValueError, engine_lib.Overloaded)):
      await coroutine
    engine.may_step.clear()
    held = await loop.submit([_request(max_tokens=10**6)])
    coroutine, others = _told(loop, [_request(seed=seed)])
    asked = asyncio.create_task(coroutine)
    await asyncio.sleep(0)
    asked.cancel()
    engine.may_step.set()
    await _until(lambda: others)
    held.close()
    for (ended,) in (ends, others):
      assert list(ended.updates) == []
      assert isinstance(ended.error, (ValueError, engine_lib.Overloaded))

  _run(test)


def test_a_failure_and_a_stop_tell_the_counts_and_the_error():
  async def test(engine, loop):
    coroutine, ends = _told(loop, [_request(max_tokens=10**6)])
    updates = await coroutine
    engine.is_burning = True
    await _until(lambda: ends)
    with pytest.raises(engine_loop_lib.Failed):
      await _count(updates)
    (ended,) = ends
    assert isinstance(ended.error, engine_loop_lib.Failed)
    assert len(ended.updates) == 1
    coroutine, ends = _told(loop, [_request()])
    with pytest.raises(engine_loop_lib.Failed):
      await coroutine
    assert [each.updates for each in ends] == [[]]

  async def stop(_, loop):
    coroutine, ends = _told(loop, [_request(max_tokens=10**6)])
    await coroutine
    await loop.close()
    (ended,) = ends
    assert isinstance(ended.error, engine_loop_lib.Stopped)
    assert len(ended.updates) == 1
    coroutine, ends = _told(loop, [_request()])
    with pytest.raises(engine_loop_lib.Stopped):
      await coroutine
    assert [each.updates for each in ends] == [[]]

  _run(test)
  _run(stop)


def test_an_end_that_fails_is_that_of_one_request_alone():
  def fail(_):
    raise RuntimeError('no ledger')

  async def test(engine, loop):
    engine.may_step.clear()
    broken = await asyncio.wait_for(loop.submit([_request()], fail), _WAIT)
    asked = asyncio.create_task(loop.submit([_request()]))
    await asyncio.sleep(0)
    engine.may_step.set()
    with pytest.raises(RuntimeError, match='no ledger'):
      await _count(broken)
    assert await _count(await asked) == 3

  _run(test)


def test_ended_updates_do_not_wait_for_the_garbage_collector():
  def ended():
    found = engine_loop_lib.Updates(1, lambda _: found.close())
    found.put((0, requests.Update(0, 0, '', (), (), completion=object())))  # pyright: ignore
    return weakref.ref(found)

  gc.disable()
  try:
    assert ended()() is None
  finally:
    gc.enable()
