"""Prompts computed on devices of their own: the bits of one engine."""

import dataclasses
import gc
import threading
from typing import NamedTuple

import jax
import numpy as np
import pytest

from inference.engine import engine as engine_lib, engine_config
from inference.engine.apart import prefiller
from inference.engine.processes import leader
from inference.requests import requests
from inference.sampling import settings as settings_lib
from tests.helpers import frozen_dirs, tiny_models
from tests.helpers.serving import reference_engine
from tests.helpers.training import tiny_adapters

_LAYOUT = engine_config.EngineConfig(
  max_sequences=4,
  decode_shapes=(4,),
  page_size=16,
  num_pages=64,
  chunk_tokens=16,
  max_chunks=1,
  max_mixed_chunks=1,
  stream_seconds=0,
  numerics='invariant',
)


def _request(length, *, seed=0, **settings):
  rng = np.random.default_rng(length)
  settings = {'max_tokens': 10, 'ignore_eos': True, **settings}
  return requests.Request(
    prompt_ids=tuple(rng.integers(0, 256, length).tolist()),
    settings=settings_lib.Settings(logprobs=2, seed=seed, **settings),
  )


_LONG = _request(100, temperature=0.0)
_REQUESTS = (
  _request(3, temperature=0.0),
  _LONG,
  _request(50, temperature=0.9, n=2),
  _request(70, temperature=1.2, top_k=50, prompt_logprobs=2),
  _request(90, temperature=1.0, repetition_penalty=1.3),
  _request(97, temperature=0.0, max_tokens=25),
)


def _engine(**fields):
  config = frozen_dirs.config(max_length=128)
  return engine_lib.Engine(
    config,
    frozen_dirs.params(config),
    tokenizer=tiny_models.byte_tokenizer(),
    weights_digest='d',
    config=dataclasses.replace(_LAYOUT, **fields),
  )


@pytest.fixture(scope='module')
def apart():
  """Returns an engine whose long prompts are computed by another."""
  engine = _engine(prefill_engines=1)
  yield engine
  engine.release()


@pytest.fixture(scope='module')
def expected():
  """Returns the answers of one engine to `_REQUESTS`."""
  return _answers(_engine(), _REQUESTS)


def _answers(engine, wanted):
  served = reference_engine.serve(engine, list(wanted))
  engine.manager.check()
  return served.completions


def _texts(found):
  return [
    [(each.token_ids, each.logprobs, each.prompt_logprobs) for each in some]
    for some in found
  ]


def _used(found):
  return [
    (
      each.usage.prompt_tokens,
      each.usage.cached_tokens,
      each.usage.prefill_tokens,
      each.usage.flops,
    )
    for some in found
    for each in some
  ]


def _sent(engine, monkeypatch):
  """Returns the list of the prompts that the other engine gets."""
  (other,) = engine._prefillers._prefillers
  lengths, submit = [], other.submit

  def noted(key, request):
    lengths.append(len(request.prompt_ids))
    submit(key, request)

  monkeypatch.setattr(other, 'submit', noted)
  return lengths


@pytest.mark.slow
def test_answers_have_the_bits_of_one_engine(apart, expected, monkeypatch):
  lengths = _sent(apart, monkeypatch)
  found = _answers(apart, _REQUESTS)
  assert _texts(found) == _texts(expected)
  # Whole pages without the last token; not those with logprobs of the prompt.
  assert sorted(lengths) == [48, 80, 96, 96]
  (pool, *_) = jax.tree.leaves(apart.kv_cache)
  (others, *_) = jax.tree.leaves(
    apart._prefillers._prefillers[0].engine.kv_cache
  )
  assert pool.devices().isdisjoint(others.devices())
  for (*tokens, flops), (*of_one, least) in zip(
    _used(found), _used(expected), strict=True
  ):
    assert tokens == of_one
    # The token that the other engine samples and nobody reads.
    assert least <= flops < 1.02 * least
  # Once more: prefixes are found where the answers are, and nothing is sent.
  lengths.clear()
  assert _texts(_answers(apart, _REQUESTS[:3])) == _texts(expected[:3])
  assert not lengths


@pytest.mark.slow
def test_two_engines_that_share_models_over_devices(expected):
  engine = _engine(prefill_engines=2, tensor=2, tensor_parts=2)
  one = _engine(tensor_parts=2)
  try:
    found = _answers(engine, _REQUESTS)
    assert _texts(found) == _texts(_answers(one, _REQUESTS))
  finally:
    engine.release()


@pytest.mark.slow
def test_prompts_of_adapters_are_computed_apart_with_the_same_bits(monkeypatch):
  room = {'max_adapters': 1, 'max_adapter_rank': 2}
  engine, one = _engine(prefill_engines=1, **room), _engine(**room)
  params = frozen_dirs.params(frozen_dirs.config(max_length=128))
  lengths = _sent(engine, monkeypatch)
  (other,) = engine._prefillers._prefillers
  bases = _texts(_answers(one, [_LONG]))
  try:
    # The second one takes the slot of the first.
    for seed, digest in enumerate(('first', 'second'), 1):
      tree = tiny_adapters.tree(params, seed=seed, rank=2)
      wanted = [_LONG, dataclasses.replace(_LONG, adapter=digest)]
      for each in (engine, one):
        each.adapters.load(digest, tree)
      found = _texts(_answers(engine, wanted))
      assert found == _texts(_answers(one, wanted))
      assert found[0] == bases[0] != found[1]
      for each in (engine, one):
        each.adapters.unload(digest)
    # The prompt of the base, once, and that of each adapter.
    assert lengths == [96, 96, 96]
  finally:
    engine.release()
  assert other.engine.adapters.digests == []


@pytest.mark.slow
def test_pages_that_find_no_room_are_computed_again(expected):
  # 8 pages: a prompt of 100 tokens and its answer take 7 of them.
  engine = _engine(prefill_engines=1, num_pages=9)
  try:
    assert _texts(_answers(engine, _REQUESTS)) == _texts(expected)
  finally:
    engine.release()


class _Held:
  """Holds the thread of the other engine before its next step."""

  def __init__(self, engine, monkeypatch):
    (self.other,) = engine._prefillers._prefillers
    self.go_on, self.is_held = threading.Event(), threading.Event()
    step = self.other.engine.step

    def held():
      self.is_held.set()
      assert self.go_on.wait(60)
      return step()

    monkeypatch.setattr(self.other.engine, 'step', held)


@pytest.mark.slow
def test_answers_go_on_while_a_prompt_is_computed(apart, monkeypatch):
  apart.manager.clear()
  held = _Held(apart, monkeypatch)
  long = apart.submit(_LONG)
  assert held.is_held.wait(60)
  short = apart.submit(_REQUESTS[0])
  done = []
  while not done:
    done = [u for u in apart.step() if u.completion]
  assert [update.request_id for update in done] == [short]
  held.go_on.set()
  updates = list(apart.run())
  assert {update.request_id for update in updates} == {long}
  apart.manager.check()


@pytest.mark.slow
def test_a_request_that_is_cancelled_meanwhile_leaves_nothing(
  apart, expected, monkeypatch
):
  apart.manager.clear()
  held = _Held(apart, monkeypatch)
  cancelled = apart.submit(_LONG)
  assert held.is_held.wait(60)
  (update,) = apart.cancel(cancelled)
  assert update.completion.finish_reason == 'cancelled'
  assert not apart.has_work
  held.go_on.set()
  apart.manager.check()
  assert not apart.manager.tables.allocator.num_used
  assert _texts(_answers(apart, [_LONG])) == _texts(expected[1:2])


@pytest.mark.slow
def test_a_prompt_that_is_refused_elsewhere_is_computed_where_its_answer_is(
  apart, expected, monkeypatch
):
  apart.manager.clear()

  def refuse(request):
    raise ValueError('no room')

  (other,) = apart._prefillers._prefillers
  monkeypatch.setattr(other.engine, 'submit', refuse)
  assert _texts(_answers(apart, [_LONG])) == _texts(expected[1:2])


@pytest.mark.slow
def test_an_engine_ends_with_the_one_that_computes_its_prompts(monkeypatch):
  engine = _engine(prefill_engines=1)
  (other,) = engine._prefillers._prefillers

  def fail():
    raise FloatingPointError('a device is lost')

  monkeypatch.setattr(other.engine, 'step', fail)
  engine.submit(_LONG)
  with pytest.raises(prefiller.Failed, match='prefill engine') as raised:
    list(engine.run())
  assert 'a device is lost' in str(raised.value.__cause__)
  # Nothing else refers to the thread of an engine that is gone.
  thread = other._thread
  del engine, raised
  gc.collect()
  thread.join(60)
  assert not thread.is_alive()


@pytest.mark.parametrize(
  ('fields', 'text'),
  [
    ({'prefix_cache': False}, r'prefix_cache: got False .* expected True'),
    ({'page_size': 0}, 'page_size: got 0 .* expected pages of a number'),
    (
      {'speculation': 'head', 'draft_head': 'd'},
      'speculation: got head .* expected off or ngram',
    ),
    ({'prefill_engines': -1}, 'prefill_engines: got -1, expected at least 0'),
  ],
)
def test_fields_that_do_not_fit_are_refused(fields, text):
  with pytest.raises(ValueError, match=f'engine.{text}'):
    dataclasses.replace(_LAYOUT, **{'prefill_engines': 1, **fields})


@pytest.mark.slow
def test_more_engines_than_devices_and_new_weights_are_refused(apart):
  num = jax.local_device_count()
  with pytest.raises(
    ValueError,
    match=f'prefill_engines: got {num} .* takes {num + 1} devices, expected at'
    f' most {num}',
  ):
    _engine(prefill_engines=num)
  with pytest.raises(ValueError, match=r'set engine\.prefill_engines = 0'):
    apart.set_params(apart.params, 'e')


class _Device(NamedTuple):
  id: int
  process_index: int


def test_each_engine_for_prompts_takes_as_many_devices_of_each_process():
  config = dataclasses.replace(_LAYOUT, tensor=4, prefill_engines=1)
  assert config.num_devices == 8
  found = [_Device(n, n // 4) for n in range(8)]
  shared = leader.devices_of(config, found)
  # First those of the engine that answers; a part and its copy are neighbours.
  assert [each.id for each in shared] == [0, 1, 4, 5, 2, 3, 6, 7]
  alone = dataclasses.replace(config, tensor=8, prefill_engines=0)
  assert leader.devices_of(alone, found) == found
  uneven = [_Device(n, n // 5) for n in range(8)]
  for given, message in (
    (found[:6], 'got 4 with prefill_engines = 1, which takes 8 devices, exp'),
    (uneven, 'got 1 over processes of 3, 5 devices, expected as many devices'),
    ([_Device(n, n) for n in range(8)], 'of 1 devices, .* a multiple of 2: pa'),
  ):
    with pytest.raises(ValueError, match=message):
      leader.devices_of(config, given)
