"""Numbers that are not finite: an error of their own sequence, of no other."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from inference import model_port
from inference.requests import requests
from inference.sampling import settings as settings_lib
from tests.helpers.serving import reference_engine, simulated_device

BAD = 200  # the token whose embedding is NaN in `spoilt`
_LAYOUTS = {
  'chunks of a page': reference_engine.TIGHT,
  'chunks below a page': {
    **reference_engine.TIGHT,
    'page_size': 64,
    'num_pages': 6,
    'chunk_tokens': 5,
  },
  'fast, in int8': {
    **reference_engine.TIGHT,
    'numerics': 'fast',
    'kv_dtype': 'int8',
  },
  'fast, in fp8': {
    **reference_engine.TIGHT,
    'numerics': 'fast',
    'kv_dtype': 'fp8',
  },
}


def _spoilt(kind='llama', name="'embed'", value=np.nan):
  """Returns weights whose row of token BAD is not finite."""

  def leaf(path, leaf):
    if name in jax.tree_util.keystr(path) and leaf.ndim == 2:
      axis = leaf.shape.index(261)
      index = (slice(None),) * axis + (BAD,)
      return leaf.at[index].set(value)
    return leaf

  return jax.tree_util.tree_map_with_path(leaf, reference_engine.params(kind))


@pytest.fixture
def serve_with():
  """Returns a function that serves requests with other weights."""
  used = []

  def serve_with(engine, weights, wanted, **how):
    used.append(engine)
    engine.set_params(weights, 'spoilt')
    served = reference_engine.serve(engine, wanted, **how)
    return served.completions

  yield serve_with
  for engine in used:
    engine.set_params(reference_engine.params(_kind(engine)), 'first')


def _kind(engine):
  return 'mixture' if engine.model_config.num_experts else 'llama'


def _request(prompt, **settings):
  chosen = {'temperature': 0.0, 'max_tokens': 8, 'logprobs': 2, **settings}
  return requests.Request(
    prompt_ids=tuple(prompt), settings=settings_lib.Settings(**chosen)
  )


@functools.cache
def _crowd():
  """Returns clean prompts, and prompts that share their beginnings with BAD."""
  rng = np.random.default_rng(4)
  base = rng.integers(0, 190, 100).tolist()
  clean = [_request(base[:length]) for length in (3, 16, 33, 70, 99)]
  bad = [
    _request([*base[:at], BAD, *base[at : at + more]], n=n)
    for at, more, n in ((0, 0, 1), (2, 40, 1), (40, 30, 2), (69, 0, 1))
  ]
  return clean, bad


def _check_clean(engine, wanted, completions):
  reference = _reference(_kind(engine))
  for request, (completion,) in zip(wanted, completions, strict=True):
    assert completion.finish_reason != 'error'
    if engine.config.numerics == 'invariant':
      expected = reference.answer(request)
      assert completion.token_ids == expected.token_ids
      assert completion.logprobs == expected.logprobs


@functools.cache
def _reference(kind):
  return reference_engine.Reference(kind)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('kind', 'layout'),
  [*(('llama', each) for each in _LAYOUTS), ('mixture', 'chunks of a page')],
)
def test_only_the_sequences_that_see_it_end_with_an_error(
  kind, layout, serve_with
):
  engine = reference_engine.engine(kind, **_LAYOUTS[layout])
  before = engine.metrics.value('finished_total', reason='error')
  clean, bad = _crowd()
  order = [clean[0], bad[0], clean[1], bad[1], bad[2], *clean[2:], bad[3]]
  served = serve_with(
    engine,
    _spoilt(kind),
    order,
    rng=np.random.default_rng(0),
    spread=6,
    preemptions=(0, 1),
  )
  failed = [c for r, c in zip(order, served, strict=True) if r in bad]
  _check_clean(
    engine, clean, [c for r, c in zip(order, served, strict=True) if r in clean]
  )
  for completions in failed:
    for completion in completions:
      assert completion.finish_reason == 'error'
      assert completion.token_ids == completion.logprobs == []
      with pytest.raises(requests.NotFinite, match='after 0 new tokens'):
        completion.check()
  after = engine.metrics.value('finished_total', reason='error')
  assert after == before + sum(map(len, failed)) == before + 5
  # The pages that are cached now are clean: the next requests find them.
  again = serve_with(engine, reference_engine.params(kind), clean)
  _check_clean(engine, clean, again)


@pytest.mark.slow
@pytest.mark.parametrize('layout', _LAYOUTS.values(), ids=_LAYOUTS)
def test_pages_that_are_not_finite_are_never_cached(layout, serve_with):
  engine = reference_engine.engine(**layout)
  prompt = [BAD, *range(99)]
  ((first,),) = serve_with(engine, _spoilt(), [_request(prompt)])
  ((second,),) = serve_with(engine, _spoilt(), [_request(prompt)])
  assert first.finish_reason == second.finish_reason == 'error'
  assert second.usage.cached_tokens == 0
  assert engine.manager.gauges().pages_idle == 0
  # Nor those of one that loses its pages, or ends, before it is known.
  for ends in (True, False):
    engine.set_params(_spoilt(), 'spoilt')
    request_id = engine.submit(_request(prompt))
    while not any(each.num_computed for each in engine.manager.running()):
      engine.step()
    (sequence,) = engine.manager.running()
    if ends:
      engine.cancel(request_id)
    else:
      simulated_device.preempt(engine.manager, sequence)
    updates = list(engine.run())
    assert len(updates) == (not ends)
    assert engine.manager.gauges().pages_idle == 0


def test_a_token_that_was_sampled_ends_what_follows_it(serve_with):
  engine = reference_engine.engine(**reference_engine.TIGHT)
  forced = _request(range(20), logit_bias=((BAD, 100.0),), max_tokens=8)
  ((completion,),) = serve_with(engine, _spoilt(), [forced])
  assert completion.finish_reason == 'error'
  assert completion.token_ids == [BAD]
  assert np.isfinite(completion.logprobs[0].chosen)
  with pytest.raises(requests.NotFinite, match='after 1 new tokens, expected'):
    completion.check()


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_a_single_logit_is_enough(value, serve_with):
  engine = reference_engine.engine(**reference_engine.TIGHT)
  weights = _spoilt(name="'head'", value=value)
  ((completion,),) = serve_with(engine, weights, [_request(range(9))])
  assert completion.finish_reason == 'error'


def test_a_prompt_that_is_scored(serve_with):
  engine = reference_engine.engine(**reference_engine.TIGHT)
  scored = {'prompt_logprobs': 1, 'max_tokens': 1}
  wanted = [_request([*range(30), BAD, 7], **scored), _request(range(9))]
  (failed,), (clean,) = serve_with(engine, _spoilt(), wanted)
  assert failed.finish_reason == 'error'
  assert failed.prompt_logprobs is None
  assert clean.finish_reason == 'length'
  score = model_port.scorer(engine)
  engine.set_params(_spoilt(), 'spoilt')
  with pytest.raises(requests.NotFinite, match='expected finite ones; the we'):
    score([((1, 2), (3, 4)), ((1, BAD), (3, 4))])
  assert not [*engine.run()]


@pytest.mark.slow
def test_a_token_behind_every_window_is_found(serve_with):
  # The last token of its chunk does not see it, in the only layer.
  config = dataclasses.replace(
    reference_engine.model_config(), window=3, layer_pattern='l'
  )
  windows = reference_engine.engine_of(config, **reference_engine.TIGHT)
  prompt = [1, BAD, *range(40)]
  windows.set_params(_spoilt(), 'spoilt')
  windows.submit(_request(prompt))
  (update,) = windows.run()
  assert update.completion.finish_reason == 'error'
  assert windows.manager.gauges().pages_idle == 0
