"""One function: whatever happens to a sequence, it is the reference's.

Cache layouts, page sizes, prefix hits, chunks, company, slots, preemptions and
numbers of decode steps per dispatch, against a reference that computes one
token at a time. With invariant numerics tokens and log-probabilities are the
same to the bit; without, they are within a bound that is measured here, and
tests that the comparison can fail.
"""

import dataclasses
import functools

import numpy as np
import pytest

from hardware import hlo
from inference.engine import steps
from inference.requests import requests
from inference.sampling import settings as settings_lib
from tests.helpers.serving import guesses, reference_engine

_Settings = settings_lib.Settings
_DENSE = {
  'max_sequences': 4,
  'decode_shapes': (4,),
  'page_size': 0,
  'num_pages': 8,  # one per sequence, and one that is kept for growth
  'chunk_tokens': 128,  # a whole prompt in one chunk
  'max_chunks': 1,
  'max_mixed_chunks': 1,
  'numerics': 'invariant',
  'stream_seconds': 0,
}
_PAGE_1 = {
  'max_sequences': 3,
  'decode_shapes': (3,),
  'page_size': 1,
  'chunk_tokens': 32,  # a whole prompt in several chunks of one step
  'max_chunks': 4,
  'max_mixed_chunks': 1,
  'numerics': 'invariant',
  'decode_steps': 3,
  'stream_seconds': 0,
}
_PAGE_64 = {
  'max_sequences': 5,
  'decode_shapes': (5,),
  'page_size': 64,
  'num_pages': 6,
  'chunk_tokens': 5,  # prompts take up to 20 steps, and cross tiles anywhere
  'max_chunks': 1,
  'max_mixed_chunks': 1,
  'numerics': 'invariant',
  'decode_steps': 1,
}
_CROWD = {
  'max_sequences': 32,
  'decode_shapes': (4, 32),
  'page_size': 16,
  'num_pages': 80,
  'chunk_tokens': 24,
  'max_chunks': 3,
  'max_mixed_chunks': 2,
  'numerics': 'invariant',
}
_SIMPLE = {
  'max_sequences': 4,
  'decode_shapes': (4,),
  'page_size': 16,
  'num_pages': 14,
  'chunk_tokens': 16,
  'max_chunks': 1,
  'max_mixed_chunks': 1,
  'stream_seconds': 0,
}
_INVARIANT = {**_SIMPLE, 'numerics': 'invariant'}


@functools.cache
def _reference(kind='llama'):
  return reference_engine.Reference(kind)


@functools.cache
def _requests():
  """Prompts that share prefixes, of lengths around pages, chunks and tiles."""
  rng = np.random.default_rng(1)
  base = rng.integers(0, 259, 100).tolist()

  def request(num_shared, length, *, target=None, **settings):
    tail = rng.integers(0, 259, length - num_shared).tolist()
    return requests.Request(
      prompt_ids=(*base[:num_shared], *tail),
      target=target,
      settings=_Settings(**{'max_tokens': 9, 'logprobs': 3, **settings}),
    )

  greedy = {'temperature': 0.0}
  filters = {'top_k': 50, 'top_p': 0.9, 'min_p': 0.02}
  penalties = {
    'repetition_penalty': 1.3,
    'presence_penalty': 0.5,
    'frequency_penalty': 0.4,
    'logit_bias': ((7, 3.0), (8, -5.0)),
    'min_tokens': 4,
  }
  return (
    request(0, 1, **greedy, max_tokens=20),
    request(0, 5, seed=3, temperature=0.9),
    request(16, 17, **greedy, **penalties),
    request(32, 33, seed=4, **filters, max_tokens=14),
    request(20, 31, seed=5, n=3),
    request(40, 48, seed=2**40 + 6, n=2, prompt_logprobs=2),
    request(64, 64, **greedy),
    request(64, 65, seed=7, temperature=1.3, **filters, **penalties),
    request(80, 90, **greedy, prompt_logprobs=0),
    request(60, 100, seed=-(2**63), max_tokens=20, ignore_eos=True),
    request(30, 40, **penalties, seed=8, target=33),
    request(100, 128, **greedy, max_tokens=1, target=0, prompt_logprobs=1),
  )


def _of(request, principal):
  return dataclasses.replace(request, principal=principal)


def _check(kind, wanted, served):
  """Asserts that completions equal the reference, to the bit."""
  for request, completions in zip(wanted, served.completions, strict=True):
    for index, completion in enumerate(completions):
      expected = _reference(kind).answer(request, index)
      assert completion.token_ids == expected.token_ids
      # Python floats that came out of float32: equal only if their bits are.
      assert completion.logprobs == expected.logprobs
      assert completion.prompt_logprobs == expected.prompt_logprobs


def _check_alone(kind, engine):
  """Serves each request alone: without a prefix hit, then with one."""
  hits = []
  for number, request in enumerate(_requests()):
    for is_hit in (False, True):
      wanted = [_of(request, f'alone {number}')]
      served = reference_engine.serve(engine, wanted)
      _check(kind, wanted, served)
      (first, *forks), settings = served.completions[0], request.settings
      num_prompt = len(request.prompt_ids)
      whole = (num_prompt - 1) // engine.page_tokens * engine.page_tokens
      may_hit = is_hit and settings.prompt_logprobs is None
      assert first.usage.cached_tokens == (whole if may_hit else 0)
      for fork in forks:
        assert fork.usage.cached_tokens == num_prompt - 1
      hits.append(first.usage.cached_tokens > 0)
  assert any(hits) == bool(engine.config.page_size)


def _check_crowds(kind, engine, *, num_crowds, num_requests):
  """Serves all requests together, in random order, with preemptions."""
  preemptions, slots, num_cached = [], {}, []
  for crowd in range(num_crowds):
    rng = np.random.default_rng(crowd)
    order = rng.permutation(np.arange(num_requests) % len(_requests()))
    wanted = [
      _of(_requests()[number], f'{crowd} {rng.integers(2)}') for number in order
    ]
    served = reference_engine.serve(
      engine,
      wanted,
      rng=rng,
      spread=int(rng.integers(40)),
      preemptions=(0, 1, 3),
    )
    _check(kind, wanted, served)
    assert served.num_running >= min(engine.config.max_sequences, 4) - 1
    for number, completions in enumerate(served.completions):
      for index, completion in enumerate(completions):
        preemptions.append(served.preemptions[number, index])
        num_cached.append(completion.usage.cached_tokens)
        key = order[number], index
        slots.setdefault(key, set()).update(served.slots[number, index])
  # The crowds had preemptions (0, 1 and more), hits, misses and other slots.
  assert {0, 1} < {*preemptions}
  assert 0 in num_cached
  assert not engine.config.page_size or max(num_cached) >= 16
  assert max(map(len, slots.values())) >= 3


def _check_everything(kind, layout, *, num_crowds=2, num_requests=24):
  engine = reference_engine.engine(kind, **layout)
  _check_alone(kind, engine)
  _check_crowds(kind, engine, num_crowds=num_crowds, num_requests=num_requests)


@pytest.mark.parametrize('layout', [reference_engine.SIX_SHAPES, _DENSE])
def test_one_function_paged_and_dense(layout):
  _check_everything('llama', layout)


def _check_drafted(layout, **crowds):
  """Serves everything with drafts that are right, wrong, or of other texts."""
  engine = reference_engine.engine(**layout, speculation='ngram')
  texts = (
    (*request.prompt_ids, *_reference().answer(request, index).token_ids)
    for request in _requests()
    for index in range(request.settings.n)
  )
  guesses.install(engine, guesses.Guesses(texts))
  _check_alone('llama', engine)
  with guesses.verified_beside(engine) as beside:
    _check_crowds('llama', engine, **crowds)
  assert min(beside[shape] for shape in engine._programs.keys_beside) > 2
  assert min(guesses.counted(engine)) > 50


@pytest.mark.slow
def test_one_function_with_drafts():
  layout = {**reference_engine.SIX_SHAPES, 'decode_shapes': (8,)}
  _check_drafted(layout, num_crowds=2, num_requests=24)


@pytest.mark.slow
@pytest.mark.parametrize('layout', [_DENSE, _PAGE_1, _PAGE_64])
def test_one_function_with_drafts_for_every_page_size(layout):
  _check_drafted(layout, num_crowds=3, num_requests=24)


@pytest.mark.slow
@pytest.mark.parametrize('layout', [_PAGE_1, _PAGE_64])
def test_one_function_for_every_page_size(layout):
  _check_everything('llama', layout, num_crowds=3)


@pytest.mark.slow
def test_one_function_in_a_crowd_of_32():
  engine = reference_engine.engine(**_CROWD)
  _check_crowds('llama', engine, num_crowds=4, num_requests=60)
  # More pages copied in one step than one call copies.
  forked = requests.Request(
    prompt_ids=tuple(range(40)),
    settings=_Settings(seed=1, n=25, max_tokens=4, logprobs=3),
  )
  served = reference_engine.serve(engine, [forked])
  _check('llama', [forked], served)
  assert served.num_running >= 24


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['gpt2', 'mixture'])
def test_one_function_for_every_kind_of_model(kind):
  _check_everything(kind, _INVARIANT)


# ------------------------------------------------------------------------------
# Decode steps of a dispatch.


_ENDS = {  # settings that end a sequence on the device, on the host, or both
  'length': {},
  'EOS': {'logit_bias': ((257, 9.0),), 'min_tokens': 2},
  'ignored EOS': {'logit_bias': ((257, 9.0),), 'ignore_eos': True},
  'stop id': {'stop_ids': (40, 41), 'logit_bias': ((40, 8.0), (41, 8.0))},
  'stop string': {'stop': ('a', 'ab', 'zz'), 'logit_bias': ((97, 7.0),)},
  'penalties': {'repetition_penalty': 1.4, 'frequency_penalty': 0.6},
}


@functools.cache
def _ended_requests():
  rng = np.random.default_rng(3)
  return [
    requests.Request(
      prompt_ids=tuple(rng.integers(0, 256, length).tolist()),
      settings=_Settings(
        max_tokens=40, seed=length, n=num, logprobs=num, temperature=1.5, **ends
      ),
    )
    for ends in _ENDS.values()
    for length, num in ((1, 1), (15, 2), (33, 1))
  ]


def _without_times(completion):
  usage = {
    name: value
    for name, value in dataclasses.asdict(completion.usage).items()
    if 'seconds' not in name
  }
  return {**dataclasses.asdict(completion), 'usage': usage}


@pytest.mark.slow
def test_decode_steps_of_a_dispatch_change_no_answer_and_no_account():
  found, reasons = [], set()
  for num in (1, 2, 32):
    layout = {**_SIMPLE, 'num_pages': 40, 'decode_steps': num}
    engine = reference_engine.engine(**layout, prefix_cache=False)
    value = engine.metrics.value
    before = value('engine_steps_total'), value('engine_dispatches_total')
    # One after another, so that the shapes of the steps are the same, too.
    served = [
      [_without_times(each) for each in completions]
      for request in _ended_requests()
      for completions in reference_engine.serve(engine, [request]).completions
    ]
    num_steps = value('engine_steps_total') - before[0]
    num_dispatches = value('engine_dispatches_total') - before[1]
    # A dispatch that finds all sequences ended has no step.
    assert num_dispatches < (4 if num == 1 else 1.1 / num**0.5) * num_steps
    found.append(served)
    reasons |= {
      (each['finish_reason'], type(each['stop_reason']).__name__)
      for completions in served
      for each in completions
    }
    usages = [each['usage'] for completions in served for each in completions]
    assert engine.metrics.value('flops_total') == sum(
      usage['flops'] for usage in usages
    )
    # Forks decode the last token of their prompt, too.
    assert all(usage['decode_tokens'] <= 40 for usage in usages)
  assert found[0] == found[1] == found[2]
  assert reasons == {
    ('length', 'NoneType'), ('stop', 'NoneType'), ('stop', 'int'),
    ('stop', 'str'),
  }  # fmt: skip


@pytest.mark.slow
def test_a_page_that_the_last_token_fills_is_not_cached():
  """The device computes no keys for a token that ends its sequence."""
  engine = reference_engine.engine(**_INVARIANT)
  eos_id = engine.tokenizer.eos_id
  for num_prompt in (10, 26):
    prompt = tuple(range(60, 60 + num_prompt))
    settings = _Settings(
      temperature=0.0, logprobs=1, max_tokens=20, min_tokens=5,
      logit_bias=((eos_id, 100.0),),
    )  # fmt: skip
    asked = requests.Request(prompt_ids=prompt, settings=settings)
    ((ended,),) = reference_engine.serve(engine, [asked]).completions
    tokens = (*prompt, *ended.token_ids)
    assert ended.token_ids.index(eos_id) == 5
    assert (
      len(tokens)
      == num_prompt + 6
      == engine.page_tokens * (len(tokens) // engine.page_tokens)
    )
    again = requests.Request(
      prompt_ids=(*tokens, 65, 66),
      settings=_Settings(temperature=0.0, logprobs=2, max_tokens=3),
    )
    served = reference_engine.serve(engine, [again])
    _check('llama', [again], served)
    cached = served.completions[0][0].usage.cached_tokens
    assert cached == len(tokens) - engine.page_tokens


@pytest.mark.slow
def test_decode_steps_end_when_a_request_waits_or_pages_are_short():
  layout = {**_SIMPLE, 'prefix_cache': False}
  engine = reference_engine.engine(**layout)
  assert engine.config.decode_steps == 32

  def lengths(*wanted):
    """Serves requests at once; returns the decode steps of each dispatch."""
    for max_tokens in wanted:
      settings = _Settings(max_tokens=max_tokens, ignore_eos=True)
      engine.submit(requests.Request(prompt_ids=(1, 2), settings=settings))
    found = []
    while engine.has_work:
      engine.step()
      if engine._flight:
        spans = engine._flight.step.decodes
        found.append(tuple(span.length for span in spans))
      engine.manager.check()
    return found

  # Two prompts, a chunk each; then the first decodes beside the second.
  assert lengths(40) == [(), (32,), (7,)]
  assert lengths(3, 40) == [(), (1,), (32, 1), (7,)]
  # A fifth one waits for a slot: 8 steps at most.
  waiting = lengths(2, 30, 30, 30, 5)
  assert all(max(each, default=0) <= 8 for each in waiting[:-4])
  # 14 pages hold no four sequences of 100 tokens: the last pages are given out
  # one by one.
  short = lengths(90, 90, 90, 90)
  assert {32, 1} <= {max(each, default=0) for each in short}


# ------------------------------------------------------------------------------
# Bounds, where bits may differ.


def _errors(engine, kind='llama'):
  """Returns errors of log-probabilities; checks greedy ids."""
  wanted = [*_requests(), *_requests()]
  served = reference_engine.serve(engine, wanted, preemptions=(0, 1), spread=9)
  errors = []
  for request, completions in zip(wanted, served.completions, strict=True):
    for index, completion in enumerate(completions):
      expected = _reference(kind).answer(request, index)
      if engine.config.kv_dtype == 'model' and not request.settings.temperature:
        assert completion.token_ids == expected.token_ids
      scored = zip(completion.logprobs, expected.logprobs, strict=False)
      ids = zip(completion.token_ids, expected.token_ids, strict=False)
      for (got, right), (token, right_token) in zip(scored, ids, strict=True):
        if token != right_token:
          break  # from here on, the texts differ
        errors.append(got.chosen - right.chosen)
      if completion.prompt_logprobs:
        errors += [
          got.chosen - right.chosen
          for got, right in zip(
            completion.prompt_logprobs[1:],
            expected.prompt_logprobs[1:],
            strict=True,
          )
        ]
  assert len(errors) > 400
  return np.abs(errors)


def test_fast_numerics_are_within_their_bound_and_do_differ():
  errors = _errors(reference_engine.engine(**_SIMPLE))
  # Without invariant numerics, bits differ: so the matrix can fail. Measured: a
  # quarter of the values differ.
  assert (errors > 0).mean() > 0.01
  # Measured: 1.4e-6, an ulp or two of a log-probability around -10.
  assert errors.max() < 1e-5


@pytest.mark.slow
def test_int8_pages_are_within_their_bound_and_do_round():
  errors = _errors(reference_engine.engine(**_SIMPLE, kv_dtype='int8'))
  # A channel is off by up to 1/254 of its vector's largest, and this model's
  # logits are large. Measured: 0.015 and 0.063.
  assert 1e-3 < np.sqrt(np.mean(errors**2)) < 0.03
  assert errors.max() < 0.15


@pytest.mark.slow
def test_fp8_pages_are_within_their_bound_and_do_round():
  errors = _errors(reference_engine.engine(**_SIMPLE, kv_dtype='fp8'))
  # A channel has 4 bits: it is off by up to 1/16 of itself.
  assert 1e-3 < np.sqrt(np.mean(errors**2)) < 0.15
  assert errors.max() < 0.8


# ------------------------------------------------------------------------------
# Several devices.


@pytest.mark.slow
@pytest.mark.parametrize(
  ('kind', 'num_devices'),
  [
    ('odd_heads', 2),
    *(
      pytest.param(*each, marks=pytest.mark.slow)
      for each in (
        ('odd_heads', 4), ('odd_heads', 8), ('llama', 4), ('gpt2', 8),
        ('mixture', 4),
      )
    ),
  ],
)  # fmt: skip
def test_devices_that_share_a_model_are_within_the_bound(kind, num_devices):
  engine = reference_engine.engine(kind, **_SIMPLE, tensor=num_devices)
  # As for one device: sums over devices are rounded in another order.
  assert _errors(engine, kind).max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(('num_devices', 'experts'), [(2, 2), (4, 2), (4, 4)])
def test_devices_that_share_experts_are_within_the_bound(num_devices, experts):
  engine = reference_engine.engine(
    'mixture', **_SIMPLE, tensor=num_devices, experts=experts
  )
  assert _errors(engine, 'mixture').max() < 1e-5
  # Each device has whole experts: 8 of them, of width 20.
  kernel = engine.params['params']['layer_0']['moe']['expert_up']['kernel']
  shape = kernel.sharding.shard_shape(kernel.shape)
  assert shape[::2] == (8 // experts, 20 * experts // num_devices)


def test_devices_exchange_sums_and_candidates_alone():
  engine = reference_engine.engine('odd_heads', **_SIMPLE, tensor=2)
  layers, width = (
    engine.model_config.num_layers,
    engine.model_config.model_width,
  )
  text = engine._programs._compiled[steps.Shape(4, 0)].as_text()
  found = hlo.traffic(hlo.parse(text)).collectives
  # A step has a sum of the stream of 4 tokens after the embedding, after `out`
  # and after `down`. All else is of the sampler: at most 20 candidates a row.
  sums = [x for x in found if x.payload_bytes == 4 * 4 * width]
  assert sum(x.count for x in sums) == 1 + 2 * layers
  assert {x.kind for x in sums} == {'all-reduce'}
  rest = [x.payload_bytes for x in found if x not in sums]
  assert 0 < max(rest) <= 4 * 4 * 20
