"""A cancelled request reports what it has used, wherever it was."""

import pytest

from inference import generate
from inference.requests import requests
from inference.sampling import settings
from inference.server.access import admission

_PRICES = admission.Prices(prompt=1.0, cached=0.5, completion=2.0)


@pytest.fixture
def engine(generator):
  generator.engine.manager.clear()
  yield generator.engine
  while generator.engine.has_work:
    generator.engine.step()


def _request(length=40, **fields):
  return requests.Request(
    prompt_ids=tuple(range(length)),
    settings=settings.Settings(
      **{'max_tokens': 8, 'ignore_eos': True, **fields}
    ),
  )


def _used(engine, request, request_id, updates=()):
  ended = [each for each in updates if each.completion]
  ended += engine.cancel(request_id)
  used = admission.used_by([request], [(0, each) for each in ended], _PRICES)
  reasons = [each.completion.finish_reason for each in ended]
  return used, reasons


@pytest.mark.slow
def test_before_its_first_step_it_has_used_nothing(engine):
  request = _request(n=2)
  used, reasons = _used(engine, request, engine.submit(request))
  assert reasons == ['cancelled'] * 2
  assert (used.prompt_tokens, used.completion_tokens) == (0, 0)
  assert (used.flops, used.price_nanos) == (0, 0)
  assert used.queue_ms > 0
  assert not engine.has_work


def test_in_its_prompt_it_has_used_the_chunks_that_were_read(engine):
  counted = engine.metrics.value
  before = counted('prefill_tokens_total'), counted('flops_total')
  request = _request()
  request_id = engine.submit(request)
  for _ in range(2):  # the second chunk of 16 is in flight
    engine.step()
  used, _ = _used(engine, request, request_id)
  engine.step()
  assert used.prompt_tokens == used.prefill_tokens == 16
  assert used.completion_tokens == 0
  assert used.prefill_ms > 0
  assert used.kv_byte_seconds > 0
  # The chunk in flight is charged to nobody, in the metrics too.
  assert counted('prefill_tokens_total') - before[0] == 16
  assert counted('flops_total') - before[1] == pytest.approx(used.flops)


def test_in_its_answer_it_has_used_the_tokens_that_were_sampled(engine):
  request = _request(n=2)
  request_id = engine.submit(request)
  made = []
  while len(made) < 6:
    made += [token for each in engine.step() for token in each.token_ids]
  used, reasons = _used(engine, request, request_id)
  engine.step()
  assert reasons == ['cancelled'] * 2
  # The prompt counts once, although two completions continue it.
  assert (used.prompt_tokens, used.cached_tokens) == (40, 0)
  assert used.completion_tokens >= 6
  assert used.price_nanos == 40 * 1000 + used.completion_tokens * 2000


def test_a_sequence_that_ended_before_keeps_its_end(engine):
  request = _request(n=1, max_tokens=1)
  request_id = engine.submit(request)
  updates = [each for each in engine.run() if each.completion]
  used, reasons = _used(engine, request, request_id, updates)
  assert reasons == ['length']
  assert (used.prompt_tokens, used.completion_tokens) == (40, 1)


def test_cached_tokens_are_cheaper_and_part_of_the_prompt(engine):
  for cached in (0, 32):
    request = _request(max_tokens=2)
    request_id = engine.submit(request)
    used, _ = _used(engine, request, request_id, list(engine.run()))
    assert (used.prompt_tokens, used.cached_tokens) == (40, cached)
    money = (40 - cached) * 1000 + cached * 500 + 2 * 2000
    assert used.price_nanos == money


@pytest.mark.slow
def test_a_preempted_sequence_is_billed_once(frozen_dir):
  config = generate.engine_config.EngineConfig(
    max_sequences=4,
    decode_shapes=(4,),
    chunk_tokens=16,
    max_chunks=1,
    max_mixed_chunks=1,
    page_size=8,
    decode_steps=1,
    num_pages=9,  # for one sequence of 64 tokens, and not for two
  )
  engine = generate.load(frozen_dir, config).engine
  asked = [_request(30, max_tokens=30), _request(29, max_tokens=30)]
  ids = engine.submit_all(asked)
  last = [
    (ids.index(each.request_id), each)
    for each in engine.run()
    if each.completion
  ]
  used = admission.used_by(asked, last, _PRICES)
  assert used.preemptions > 0
  assert (used.prompt_tokens, used.completion_tokens) == (59, 60)
  assert used.price_nanos == (59 - used.cached_tokens) * 1000 + (
    used.cached_tokens * 500 + 60 * 2000
  )
