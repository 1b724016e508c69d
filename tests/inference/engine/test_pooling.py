"""Pooled hidden states are those of the cache-free forward, in any company."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inference.engine import pooling
from inference.requests import requests as requests_lib
from inference.sampling import settings as settings_lib
from models import transformer
from tests.helpers.serving import reference_engine

# As a request for a vector alone: no token is sampled.
_SETTINGS = settings_lib.Settings(temperature=0.0, max_tokens=1)
# A prompt of one token, one of exactly two chunks, one that fills the context.
_LENGTHS = 1, 5, 32, 37, reference_engine.MAX_LENGTH


def _request(length: int, kind: str | None, seed: int = 0, **fields):
  ids = np.random.default_rng(seed).integers(0, 250, length)
  return requests_lib.Request(
    prompt_ids=tuple(map(int, ids)),
    settings=_SETTINGS,
    target=0,
    pooling=kind,
    **fields,
  )


def _expected_D(request, kind: str, model: str) -> np.ndarray:
  decoder = transformer.Transformer(reference_engine.model_config(model))
  hidden_1TD, _ = decoder.apply(
    reference_engine.params(model),
    jnp.array([request.prompt_ids], jnp.int32),
    method='hidden',
  )
  hidden_TD = np.asarray(hidden_1TD[0], np.float64)
  return hidden_TD.mean(0) if kind == 'mean' else hidden_TD[-1]


def _pooled(engine, asked, **chance):
  served = reference_engine.serve(engine, asked, **chance)
  return [completions[0].pooled_D for completions in served.completions]


@pytest.mark.slow
@pytest.mark.parametrize('kind', pooling.KINDS)
@pytest.mark.parametrize('model', ['llama', 'gpt2', 'mixture'])
def test_the_engine_pools_the_hidden_states_of_the_full_forward(model, kind):
  engine = reference_engine.engine(model, **reference_engine.TIGHT)
  asked = [_request(length, kind) for length in _LENGTHS]
  for request, found_D in zip(asked, _pooled(engine, asked), strict=True):
    expected_D = _expected_D(request, kind, model)
    # float32 sums in another order; states are around 1.
    np.testing.assert_allclose(found_D, expected_D, atol=1e-4)
  # The comparison can fail: another prompt has other states.
  assert np.abs(found_D - _expected_D(asked[1], kind, model)).max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize('kind', pooling.KINDS)
def test_a_vector_does_not_depend_on_company_chunks_or_preemption(kind):
  alone = reference_engine.engine(**reference_engine.TIGHT)
  asked = [_request(length, kind, seed=length) for length in (5, 37, 90)]
  expected = [_pooled(alone, [request])[0] for request in asked]
  talk = [
    dataclasses.replace(
      _request(20, None, seed=seed),
      target=None,
      settings=settings_lib.Settings(max_tokens=20, seed=seed, ignore_eos=True),
    )
    for seed in range(4)
  ]
  for layout in (reference_engine.TIGHT, reference_engine.SIX_SHAPES):
    crowd = _pooled(
      reference_engine.engine(**layout),
      [*talk, *asked],
      rng=np.random.default_rng(1),
      spread=4,
      preemptions=(0, 1, 2),
    )
    for found_D, expected_D in zip(crowd[len(talk) :], expected, strict=True):
      np.testing.assert_array_equal(found_D, expected_D)


def test_pooling_changes_no_token_and_other_requests_have_no_vector():
  engine = reference_engine.engine(**reference_engine.TIGHT)
  plain, pooled = (
    dataclasses.replace(
      _request(20, kind),
      target=None,
      settings=settings_lib.Settings(max_tokens=5, seed=1, n=2),
    )
    for kind in (None, 'mean')
  )
  first, second = reference_engine.serve(engine, [plain, pooled]).completions
  assert [c.token_ids for c in first] == [c.token_ids for c in second]
  assert [c.pooled_D is None for c in first] == [True, True]
  assert [c.pooled_D is None for c in second] == [False, True]


@pytest.mark.slow
def test_a_mean_reads_no_cached_prompt_and_a_last_state_may():
  engine = reference_engine.engine(**reference_engine.TIGHT)
  found = {}
  for kind in pooling.KINDS:
    request = _request(40, kind, seed=9)
    for _ in range(2):
      ((completion,),) = reference_engine.serve(engine, [request]).completions
    found[kind] = completion.usage.cached_tokens
    np.testing.assert_allclose(
      completion.pooled_D, _expected_D(request, kind, 'llama'), atol=1e-4
    )
  assert found['mean'] == 0
  assert found['last'] > 0


def test_hidden_states_reach_the_host_only_if_a_request_pools_them(
  monkeypatch,
):
  engine = reference_engine.engine(**reference_engine.TIGHT)
  read = []
  device_get = jax.device_get

  def watched(outputs):
    read.append(outputs.hidden_MD is not None)
    return device_get(outputs)

  monkeypatch.setattr(jax, 'device_get', watched)
  reference_engine.serve(engine, [_request(20, None)])
  assert read
  assert not any(read)
  reference_engine.serve(engine, [_request(20, 'mean')])
  assert any(read)


def test_an_unknown_pooling_is_refused():
  engine = reference_engine.engine(**reference_engine.TIGHT)
  with pytest.raises(ValueError, match="pooling: got 'max', expected one of"):
    engine.submit(_request(3, 'max'))


def test_a_sum_is_the_same_however_it_is_cut():
  rng = np.random.default_rng(0)
  for width in (1, 3, 64):
    rows = rng.normal(size=(100, width)).astype(np.float32)
    whole = pooling.Pool('mean')
    whole.add(rows, 0)
    for cuts in ([1], [50], [3, 4, 99], list(range(1, 100))):
      cut = pooling.Pool('mean')
      for start, stop in zip([0, *cuts], [*cuts, 100], strict=True):
        cut.add(rows[start:stop], start)
      np.testing.assert_array_equal(cut.vector_D(), whole.vector_D())
