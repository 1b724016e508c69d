"""The engine: isolation, ends of sequences, usage, weights, contracts."""

import dataclasses
import functools
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inference.engine import engine as engine_lib, flight, metrics
from inference.requests import answer, requests
from inference.sampling import settings as settings_lib
from models import layout
from tests.helpers.serving import reference_engine

_Settings = settings_lib.Settings
_GREEDY = {'temperature': 0.0, 'max_tokens': 8, 'logprobs': 0}
_PROMPT = tuple(range(40, 90))  # three whole pages of 16, and two tokens
# A bias so large that only a..h, in ASCII, are sampled.
_LETTERS = tuple((i, 60.0) for i in range(97, 105))


@pytest.fixture
def engine():
  return reference_engine.engine(**reference_engine.TIGHT)


@functools.cache
def _reference():
  return reference_engine.Reference()


def _request(prompt=_PROMPT, *, principal='', priority=0, **settings):
  return requests.Request(
    prompt_ids=tuple(prompt),
    settings=_Settings(**{**_GREEDY, **settings}),
    principal=principal,
    priority=priority,
  )


def _serve(engine, *wanted, **how):
  """Returns the first completion of each request."""
  served = reference_engine.serve(engine, wanted, **how)
  return [completions[0] for completions in served.completions]


def _pages(engine):
  """Returns the pages of each sequence, by id."""
  return {sequence.id: set(sequence.pages) for sequence in engine._live}


def _sequence(engine, request_id):
  """Returns the first sequence of a request."""
  return next(each for each in engine._live if each.id == (request_id, 0))


def _work(engine):
  """Returns the work that a client could measure: steps and their tokens."""
  names = 'engine_steps', 'prefill_tokens', 'decode_tokens'
  return np.array([engine.metrics.value(f'{name}_total') for name in names])


# ------------------------------------------------------------------------------
# Isolation: principals know nothing of each other's prompts.


@pytest.mark.slow
def test_principals_share_no_page_while_one_and_its_samples_do(engine):
  long = {'principal': 'a', 'max_tokens': 30}
  first = engine.submit(_request(**long, n=2, seed=1))
  while len(_sequence(engine, first).tokens) == len(_PROMPT):
    engine.step()
  # Its prompt is computed, and other sequences could find its pages.
  second = engine.submit(_request(principal='b'))
  third = engine.submit(_request(principal='a'))
  has_shared = False
  while engine.has_work:
    engine.step()
    pages = _pages(engine)
    of_a = [pages.get((first, index), set()) for index in range(2)]
    of_a.append(pages.get((third, 0), set()))
    assert not set.union(*of_a) & pages.get((second, 0), set())
    has_shared |= len(set.intersection(*of_a)) >= 3
  assert has_shared


@pytest.mark.slow
def test_another_principals_prompt_is_as_much_work_as_a_new_one(engine):
  before = _work(engine)
  (miss,) = _serve(engine, _request(principal='a'))
  miss_work = _work(engine) - before
  (other,) = _serve(engine, _request(principal='b'))
  np.testing.assert_array_equal(_work(engine) - before - miss_work, miss_work)
  assert miss.usage.cached_tokens == other.usage.cached_tokens == 0
  assert miss.usage.prefill_tokens == other.usage.prefill_tokens == 50
  (hit,) = _serve(engine, _request(principal='a'))
  assert hit.usage.cached_tokens == 48
  assert hit.usage.prefill_tokens == 2
  assert hit.logprobs == miss.logprobs == other.logprobs


def test_sharing_between_principals_is_for_who_opts_in(engine, monkeypatch):
  shared = dataclasses.replace(engine.config, share_prefixes=True)
  monkeypatch.setattr(engine._entrance, '_config', shared)
  _serve(engine, _request(principal='a'))
  (hit,) = _serve(engine, _request(principal='b'))
  assert hit.usage.cached_tokens == 48


def test_a_cache_that_is_off_is_not_read(engine, monkeypatch):
  without = dataclasses.replace(engine.config, prefix_cache=False)
  monkeypatch.setattr(engine._entrance, '_config', without)
  for _ in range(2):
    (completion,) = _serve(engine, _request())
    assert completion.usage.cached_tokens == 0


def test_prompt_logprobs_do_not_read_the_cache_and_others_read_theirs(engine):
  _serve(engine, _request())
  scored = _request(prompt_logprobs=2, n=2, seed=5, temperature=1.0)
  served = reference_engine.serve(engine, [scored])
  first, second = served.completions[0]
  assert first.usage.cached_tokens == 0
  assert first.usage.prefill_tokens == len(_PROMPT)
  expected = _reference().answer(scored)
  assert first.prompt_logprobs == expected.prompt_logprobs
  assert first.prompt_logprobs[0] is None
  assert len(first.prompt_logprobs) == len(_PROMPT)
  # The first sequence computes the prompt for both.
  assert second.prompt_logprobs is None
  assert second.usage.cached_tokens == len(_PROMPT) - 1
  engine.manager.clear()
  _serve(engine, scored)
  assert _serve(engine, _request())[0].usage.cached_tokens == 48


# ------------------------------------------------------------------------------
# Ends of sequences.


def test_n_samples_have_seeds_of_their_own(engine):
  (together,) = reference_engine.serve(
    engine, [_request(n=5, seed=2**32 - 2, temperature=1.0)]
  ).completions
  seeds = [completion.seed for completion in together]
  assert seeds == [settings_lib.sample_seed(2**32 - 2, i) for i in range(5)]
  assert seeds[0] == 2**32 - 2
  assert len({tuple(each.token_ids) for each in together}) == 5
  for completion in together:
    (alone,) = _serve(
      engine, _request(seed=completion.seed, temperature=1.0, principal='new')
    )
    assert alone.token_ids == completion.token_ids
    assert alone.logprobs == completion.logprobs


def test_neighbouring_and_long_seeds_share_no_sample(engine):
  seeds = (0, 1, 2**32, 2**32 + 1, 2**63 - 1, -(2**63), -1)
  served = reference_engine.serve(
    engine, [_request(n=6, seed=seed, temperature=1.0) for seed in seeds]
  ).completions
  texts = [tuple(each.token_ids) for group in served for each in group]
  # Eight tokens of a nearly even distribution: no two alike by chance.
  assert len(set(texts)) == 6 * len(seeds)
  assert [group[0].seed for group in served] == list(seeds)


def test_a_seed_that_nobody_gave_is_drawn_and_reported(engine):
  first, other = _serve(engine, *[_request(temperature=1.0)] * 2)
  assert first.seed != other.seed  # equal once in 2**53 runs
  (again,) = _serve(engine, _request(temperature=1.0, seed=first.seed))
  assert again.token_ids == first.token_ids


def test_eos_ends_after_the_least_tokens_and_costs_no_further_one(engine):
  eos_id = engine.tokenizer.eos_id
  wish = {'logit_bias': ((eos_id, 100.0),), 'min_tokens': 3, 'max_tokens': 9}
  before = engine.metrics.value('sampled_tokens_total')
  (ended,) = _serve(engine, _request(**wish))
  assert (ended.finish_reason, ended.stop_reason) == ('stop', None)
  assert ended.token_ids[3] == eos_id
  assert eos_id not in ended.token_ids[:3]
  assert len(ended.token_ids) == len(ended.logprobs) == 4
  # Three decodes for the second to fourth token. When the fourth was read, the
  # device had the next step already, and knew that the sequence has no token.
  assert ended.usage.decode_tokens == 3
  assert engine.metrics.value('sampled_tokens_total') - before == 4
  (ignored,) = _serve(engine, _request(**wish, ignore_eos=True))
  assert ignored.finish_reason == 'length'
  assert ignored.token_ids == ended.token_ids + [eos_id] * 5
  # An end by length is known beforehand: no token is computed in vain.
  assert ignored.usage.decode_tokens == 8


def test_a_stop_id_ends_after_the_least_tokens(engine):
  wish = {'logit_bias': ((65, 100.0),), 'stop_ids': (65, 66)}
  (ended,) = _serve(engine, _request(**wish))
  assert (ended.finish_reason, ended.stop_reason) == ('stop', 65)
  assert (ended.token_ids, ended.text) == ([65], '')
  (later,) = _serve(engine, _request(**wish, min_tokens=5))
  assert later.token_ids.index(65) == len(later.token_ids) - 1 == 5


def test_a_stop_string_ends_and_no_part_of_it_is_ever_released(engine):
  free_request = _request(logit_bias=_LETTERS, seed=3, temperature=8.0)
  (free,) = _serve(engine, free_request)
  assert free.text.isascii()
  assert len(set(free.text)) > 2
  stop = free.text[3:6]
  ended_request = dataclasses.replace(
    free_request,
    settings=dataclasses.replace(free_request.settings, stop=('zz', stop)),
  )
  engine_request = engine.submit(ended_request)
  released, completion = [], None
  while engine.has_work:
    for update in engine.step():
      assert update.request_id == engine_request
      released.append((update.text, update.token_ids))
      completion = completion or update.completion
  end = free.text.index(stop)
  assert (completion.finish_reason, completion.stop_reason) == ('stop', stop)
  assert completion.text == free.text[:end]
  assert ''.join(text for text, _ in released) == free.text[:end]
  ids = [token for _, some in released for token in some]
  assert ids == completion.token_ids == free.token_ids[: end + 3]


def test_text_and_ids_are_one_cursor(engine):
  wanted = [_request(seed=seed, temperature=1.0) for seed in range(4)]
  served = reference_engine.serve(engine, wanted)
  for number, (completion,) in enumerate(served.completions):
    assert served.texts[number, 0] == completion.text
    assert completion.text == engine.tokenizer.decode(completion.token_ids)


# ------------------------------------------------------------------------------
# Usage.


def test_tokens_and_flops_are_counted_one_by_one(engine):
  model = engine.model_config
  padding = engine.metrics.value('engine_rows_total', kind='padding')
  real = engine.metrics.value('engine_rows_total', kind='real')
  (done,) = _serve(engine, _request(_PROMPT[:13], max_tokens=4))
  usage = done.usage
  assert (usage.prefill_tokens, usage.decode_tokens) == (13, 3)
  assert usage.cached_tokens == usage.preemptions == 0
  width, ff = model.model_width, model.mlp_width
  query, key = (
    heads * model.head_width for heads in (model.num_heads, model.num_kv_heads)
  )
  layer = width * (2 * query + 2 * key) + 3 * width * ff
  attention = sum(4 * query * context for context in range(1, 17))
  head = 2 * width * model.vocab_size
  assert usage.flops == 16 * 2 * layer + attention + 4 * head
  # 13 tokens in a chunk of 16, then a step of 8 decodes three times.
  engine_rows = engine.metrics.value
  assert engine_rows('engine_rows_total', kind='real') - real == 16
  assert engine_rows('engine_rows_total', kind='padding') - padding == 3 + 3 * 7


def test_time_and_memory_are_charged_to_who_has_them(engine, monkeypatch):
  clock = types.SimpleNamespace(now=1000.0)
  clock.perf_counter = lambda: clock.now
  for module in (engine_lib, answer, flight):
    monkeypatch.setattr(module, 'time', clock)
  monkeypatch.setattr(engine._accounts, '_last_charged', 0.0)  # idle for long
  engine.submit(_request(_PROMPT[:14], max_tokens=4))
  completion, held = None, []
  for seconds in (5, 1, 2, 4, 8):
    clock.now += seconds
    for update in engine.step():
      completion = completion or update.completion
    held.append(engine.manager.gauges().pages_used)
  usage = completion.usage
  assert usage.queue_seconds == 5  # before the first step
  assert usage.prefill_seconds == 1  # then until its token was read
  assert usage.decode_seconds == 2 + 4 + 8
  # Positions 0 to 16, of two pages; the last token is never computed.
  assert held == [1, 1, 1, 2, 0]
  page_bytes = 16 * 2 * engine.model_config.num_kv_heads * 6 * 4
  assert engine.page_bytes == page_bytes
  assert usage.kv_byte_seconds == page_bytes * (1 + 2 + 4 + 2 * 8)


def test_gauges_say_what_pages_hold(engine, monkeypatch):
  monkeypatch.setattr(engine_lib, '_GAUGE_SECONDS', 0)
  first = engine.submit(_request(principal='a'))
  while len(_sequence(engine, first).pages) != 4:
    engine.step()
  value = engine.metrics.value
  assert value('running') == 1
  assert value('kv_pages_used') == 4
  held = engine.manager.gauges().tokens_held
  assert 48 < held < 64
  assert value('kv_waste') == pytest.approx(1 - held / 64)
  free = value('kv_pages_free') + value('kv_pages_idle')
  assert free == engine.config.num_pages - 4
  engine.cancel(first)
  engine.step()
  assert value('kv_pages_used') == value('running') == value('kv_waste') == 0


def test_latencies_are_observed_once_per_token(engine):
  names = 'time_to_first_token_seconds', 'inter_token_seconds', 'queue_seconds'

  def counts():
    return [engine.metrics.value(f'{name}_count') for name in names]

  before = counts()
  _serve(engine, _request(max_tokens=6), _request(max_tokens=3))
  after = counts()
  assert [b - a for a, b in zip(before, after, strict=True)] == [2, 7, 2]


# ------------------------------------------------------------------------------
# Weights.


@pytest.fixture
def other_params(engine):
  yield reference_engine.params(seed=1)
  engine.set_params(reference_engine.params(), 'first')


def test_new_weights_are_served_and_find_nothing_of_the_old(
  engine, other_params, monkeypatch
):
  (old,) = _serve(engine, _request())
  # Even if the cache is not emptied: its scope has the old digest.
  monkeypatch.setattr(engine.manager, 'clear', lambda: None)
  engine.set_params(other_params, 'second')
  (new,) = _serve(engine, _request())
  assert new.usage.cached_tokens == 0
  expected = _reference().answer(_request(), weights=other_params)
  assert new.logprobs == expected.logprobs
  assert new.logprobs != old.logprobs
  engine.set_params(reference_engine.params(), 'first')
  (again,) = _serve(engine, _request())
  assert again.usage.cached_tokens == 48
  assert again.logprobs == old.logprobs
  monkeypatch.undo()
  engine.set_params(reference_engine.params(), 'first')
  assert _serve(engine, _request())[0].usage.cached_tokens == 0


def test_stacked_weights_are_taken_apart(engine, other_params):
  stacked, _ = layout.stack(other_params, engine.model_config)
  engine.set_params(stacked, 'second')
  (new,) = _serve(engine, _request())
  expected = _reference().answer(_request(), weights=other_params)
  assert new.token_ids == expected.token_ids


def test_weights_change_only_between_sequences_and_keep_their_shapes(
  engine, other_params
):
  request_id = engine.submit(_request())
  with pytest.raises(ValueError, match='new ones while 1 sequences run'):
    engine.set_params(other_params, 'second')
  engine.step()
  engine.cancel(request_id)
  # A step is still in flight.
  with pytest.raises(ValueError, match='while 0 sequences run'):
    engine.set_params(other_params, 'second')
  engine.step()
  wrong = jax.tree.map(lambda x: x.astype(jnp.bfloat16), other_params)
  with pytest.raises(ValueError, match='other names, shapes or dtypes'):
    engine.set_params(wrong, 'second')
  assert engine.weights_digest == 'first'


# ------------------------------------------------------------------------------
# Contracts.


def test_what_compiles_in_a_step_is_counted(engine, monkeypatch):
  # Its own metrics, since those of the engine must stay at 0.
  monkeypatch.setattr(engine, 'metrics', metrics.Metrics())
  step = engine._programs.step

  def compiling(*args):
    jax.jit(lambda x: x * 3 + time.perf_counter())(np.ones(7))
    return step(*args)

  monkeypatch.setattr(engine._programs, 'step', compiling)
  engine.submit(_request(_PROMPT[:3], max_tokens=1))
  engine.step()
  assert engine.metrics.value('compilations_after_ready_total') == 1
  assert len(engine.step()) == 1  # reads the outputs of the first
  assert engine.metrics.value('compilations_after_ready_total') == 1


@pytest.mark.parametrize(
  ('wanted', 'message'),
  [
    ({'prompt': ()}, 'prompt: got no token ids'),
    ({'prompt': (5, 259)}, 'got token id 259, expected 0 <= id < 259'),
    ({'prompt': (-1,)}, 'got token id -1'),
    ({'max_tokens': 100}, 'got 50 tokens and 100 to generate, expected at m'),
    ({'prompt': [1] * 128, 'max_tokens': None}, 'got 128 tokens and 1 to gene'),
    ({'stop_ids': (259,)}, 'stop_ids: got 259'),
    ({'logit_bias': ((260, 1.0),)}, 'logit_bias: got 260'),
  ],
)
def test_what_could_never_be_answered_is_refused(engine, wanted, message):
  with pytest.raises(ValueError, match=message):
    engine.submit(_request(**wanted))
  assert not engine.has_work


def test_without_a_length_a_completion_fills_the_context(engine):
  (done,) = _serve(
    engine, _request(range(120), max_tokens=None, ignore_eos=True)
  )
  assert done.finish_reason == 'length'
  assert len(done.token_ids) == engine.model_config.max_length - 120
