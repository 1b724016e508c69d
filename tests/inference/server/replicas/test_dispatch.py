"""Submissions between replicas that die, are full, or are left."""

import asyncio

import pytest

from inference.engine import engine as engine_lib
from inference.requests import requests as requests_lib
from inference.sampling import settings
from inference.server import engine_loop as engine_loop_lib, engine_thread
from inference.server.replicas import (
  dispatch as dispatch_lib,
  place as place_lib,
  placement,
  submission as submission_lib,
  values,
)


class _Replica:
  """A replica that notes what it is sent."""

  def __init__(self, index):
    self.index, self.link, self.sent = index, self, []

  def send(self, message):
    self.sent.append(message)

  def fail(self, why):
    raise AssertionError(why)

  @property
  def numbers(self):
    return [each[2] for each in self.sent if each[0] == 'submit']


def _request(n=1, prompt=(1, 2, 3), **fields):
  return requests_lib.Request(
    prompt_ids=prompt, settings=settings.Settings(n=n, **fields), room=9
  )


def _completion(ids, reason='stop'):
  return requests_lib.Completion(
    text='x',
    token_ids=list(ids),
    num_text_ids=len(ids),
    finish_reason=reason,
    stop_reason=None,
    num_prompt_tokens=3,
    seed=0,
    logprobs=None,
    prompt_logprobs=None,
    usage=requests_lib.Usage(prompt_tokens=3, decode_tokens=len(ids)),
  )


class _Arena:
  """Two replicas and what clients saw."""

  def __init__(self, num=2):
    self.places = [place_lib.Place(_Replica(i)) for i in range(num)]
    for each in self.places:
      each.state, each.known = place_lib.READY, placement.Known(10**4)
    self.dispatch = dispatch_lib.Dispatch(
      lambda: [x for x in self.places if x.state == place_lib.READY],
      place_lib.Metrics(),
      max_sequences=4,
    )
    self.dispatch.flops = lambda start, length, logits: float(length)
    self.ends = []

  def submit(self, *requests, is_stream=True):
    found = submission_lib.Submission(
      submission_lib.seeded(requests),
      engine_loop_lib.Updates(
        sum(each.settings.n for each in requests),
        lambda _: self.dispatch.leave(found),
        self.ends.append,
      ),
      asyncio.get_running_loop().create_future(),
      is_stream,
      placement.blocks((), requests[0].prompt_ids),
    )
    self.dispatch.place(found)
    return found

  def accept(self, found):
    self.dispatch.accepted(found.place, found.number)

  def update(self, found, *ids, which=0, index=0, cached=0, last=False):
    done = _completion(ids) if last else None
    update = (which, index, 'x', ids, (), cached, done)
    self.dispatch.take(found.place, found.number, update)

  def kill(self, place):
    place.state = place_lib.LOST
    self.dispatch.lose(place)

  @property
  def end(self):
    (ended,) = self.ends
    return ended


def _run(test, **kwargs):
  async def main():
    await test(_Arena(**kwargs))

  asyncio.run(asyncio.wait_for(main(), 20))


async def _texts(updates):
  return [item[1].text async for item in updates]


def test_an_answer_that_no_client_has_seen_moves_and_ends_once():
  async def test(arena):
    for is_stream in (True, False):
      arena.ends.clear()
      for place in arena.places:
        place.state = place_lib.READY
      found = arena.submit(_request(n=2), is_stream=is_stream)
      first = found.place
      arena.accept(found)
      if not is_stream:  # it is whole later: the client has not seen it
        arena.update(found, 1, 2, index=1, last=True)
      old = found.number
      arena.kill(first)
      assert found.place not in (None, first)
      assert found.requests[0].settings.seed is not None  # the same samples
      # What the dead one had sent comes too late.
      arena.dispatch.take(first, old, (0, 0, 'y', (9,), (), 0, None))
      arena.accept(found)
      arena.update(found, 4, index=1, last=True)
      assert arena.ends == []
      arena.update(found, 5, last=True)
      assert await _texts(found.updates) == ['x', 'x']
      ids = [u.completion.token_ids for _, u in arena.end.updates]
      assert sorted(ids) == [[4], [5]]
      assert arena.end.error is None
      assert not any(each.open or each.num_open for each in arena.places)

  _run(test)


def test_a_stream_that_has_begun_ends_with_an_error_and_its_counts():
  async def test(arena):
    found = arena.submit(_request(n=2))
    arena.accept(found)
    arena.update(found, 1, 2, index=0, cached=2)
    arena.update(found, 3, index=0, cached=2)
    arena.update(found, 7, index=1, last=True)
    arena.kill(found.place)
    with pytest.raises(engine_loop_lib.Failed):
      await _texts(found.updates)
    done, cut = (update.completion for _, update in arena.end.updates)
    assert done.token_ids == [7]
    assert cut.token_ids == [1, 2, 3]
    assert cut.finish_reason == 'cancelled'
    usage = cut.usage
    assert (usage.prompt_tokens, usage.cached_tokens) == (3, 2)
    assert (usage.prefill_tokens, usage.decode_tokens) == (1, 2)
    assert usage.flops == 3
    assert isinstance(arena.end.error, engine_loop_lib.Failed)

  _run(test)


def test_a_submission_that_many_replicas_died_with_is_not_tried_again():
  async def test(arena):
    found = arena.submit(_request())
    for _ in range(dispatch_lib._MOST_TRIES):
      arena.kill(found.place)
    assert found.place is None
    with pytest.raises(engine_loop_lib.Failed):
      await found.accepted
    assert list(arena.end.updates) == []
    tried = sum(len(each.replica.numbers) for each in arena.places)
    assert tried == dispatch_lib._MOST_TRIES

  _run(test, num=dispatch_lib._MOST_TRIES + 1)


def test_a_failed_engine_is_as_a_dead_one():
  async def test(arena):
    found, streamed = arena.submit(_request()), arena.submit(_request())
    for each in (found, streamed):
      arena.accept(each)
    arena.update(streamed, 1)
    last = [values.update((0, requests_lib.Update(0, 0, '', (), (), 'counts')))]
    for each in (found, streamed):
      arena.dispatch.ended(each.place, each.number, last, 'Failed')
    assert found.place is not None  # another one, or the same anew
    (ended,) = arena.ends
    assert [update.completion for _, update in ended.updates] == ['counts']
    with pytest.raises(engine_loop_lib.Failed):
      await _texts(streamed.updates)

  _run(test)


def test_submissions_wait_while_no_replica_is_ready():
  async def test(arena):
    found, left = arena.submit(_request()), arena.submit(_request())
    for each in arena.places:  # both at once
      each.state = place_lib.LOST
    for each in arena.places:
      arena.kill(each)
    assert found.place is None
    left.updates.close()
    assert arena.end.updates == []
    assert arena.end.error is None
    arena.places[0].state = place_lib.READY
    arena.dispatch.place_pending()
    assert found.place is arena.places[0]
    assert left.place is None
    arena.ends.clear()
    for _ in range(dispatch_lib._MOST_TRIES - 1):  # after the first death
      assert not arena.ends
      arena.kill(arena.places[0])
      arena.places[0].state = place_lib.READY
      arena.dispatch.place_pending()
    assert len(arena.ends) == 1

  _run(test)


def test_a_full_replica_is_passed_over_and_an_accepted_request_is_kept():
  full = engine_lib.Overloaded('try again later')

  async def test(arena):
    found = arena.submit(_request())
    first = found.place
    arena.dispatch.refused(first, found.number, full, is_failed=False)
    assert found.place is not first
    arena.dispatch.refused(found.place, found.number, full, is_failed=False)
    with pytest.raises(engine_lib.Overloaded):
      await found.accepted
    assert len(arena.ends) == 1
    kept = arena.submit(_request())
    arena.accept(kept)
    arena.kill(kept.place)
    arena.dispatch.refused(kept.place, kept.number, full, is_failed=False)
    assert kept.place is None
    while kept.place is None:
      await asyncio.sleep(0.01)
    assert len(arena.ends) == 1

  _run(test)


def test_a_refusal_and_a_client_that_leaves_end_once():
  async def test(arena):
    found = arena.submit(_request())
    wrong = ValueError('prompt: got none')
    arena.dispatch.refused(found.place, found.number, wrong, is_failed=False)
    with pytest.raises(ValueError, match='got none'):
      await found.accepted
    assert arena.end.error is wrong
    arena.ends.clear()
    found = arena.submit(_request())
    arena.accept(found)
    arena.update(found, 1)
    place, number = found.place, found.number
    found.updates.close()
    assert place.replica.sent[-1] == ('cancel', -1, number)
    assert arena.ends == []  # until the replica has told the counts
    last = values.update((0, requests_lib.Update(0, 0, '', (), (), 'counts')))
    arena.dispatch.ended(place, number, [last], '')
    arena.dispatch.ended(place, number, [last], '')
    assert [u.completion for _, u in arena.end.updates] == ['counts']
    # If the replica dies meanwhile, what was received counts.
    arena.ends.clear()
    found = arena.submit(_request())
    arena.update(found, 1, 2)
    place = found.place
    found.updates.close()
    arena.kill(place)
    (update,) = (update for _, update in arena.end.updates)
    assert update.completion.token_ids == [1, 2]
    assert arena.end.error is None

  _run(test)


def test_the_end_of_the_server_ends_what_is_open_and_what_waits():
  async def test(arena):
    found = arena.submit(_request())
    arena.update(found, 1)
    for each in arena.places:
      each.state = place_lib.LOST
    waiting = arena.submit(_request())
    arena.dispatch.end_all(arena.places, engine_thread.stopping())
    for each in (found, waiting):
      with pytest.raises(engine_loop_lib.Stopped):
        await each.accepted
    assert [len(each.updates) for each in arena.ends] == [0, 1]

  _run(test)
