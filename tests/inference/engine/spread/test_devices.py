"""Engines of several devices: the bits of one, drafts and grammars."""

import functools

import jax
import numpy as np
import pytest

from inference.constraints import constraint as constraint_lib
from inference.requests import requests
from inference.sampling import settings as settings_lib
from tests.helpers.serving import guesses, reference_engine

_LAYOUT = {
  'max_sequences': 4,
  'decode_shapes': (4,),
  'page_size': 16,
  'num_pages': 14,
  'chunk_tokens': 16,
  'max_chunks': 1,
  'max_mixed_chunks': 1,
  'stream_seconds': 0,
}


def _request(length, *, seed=0, constraint=None, **settings):
  rng = np.random.default_rng(length)
  return requests.Request(
    prompt_ids=tuple(rng.integers(0, 256, length).tolist()),
    settings=settings_lib.Settings(
      max_tokens=14, logprobs=3, seed=seed, constraint=constraint, **settings
    ),
  )


_REQUESTS = (
  _request(1, temperature=0.0),
  _request(5, temperature=0.9, n=2),
  _request(17, temperature=1.2, top_k=50, top_p=0.9, prompt_logprobs=2),
  _request(33, temperature=1.0, min_p=0.02, repetition_penalty=1.3),
  _request(48, temperature=0.0, frequency_penalty=0.4, min_tokens=4),
  _request(64, temperature=1.1, logit_bias=((7, 3.0), (250, 2.0))),
)


def _answers(engine, wanted, **how):
  """Returns ids and log-probabilities of every completion."""
  served = reference_engine.serve(engine, wanted, **how)
  return [
    [(each.token_ids, each.logprobs, each.prompt_logprobs) for each in found]
    for found in served.completions
  ]


@pytest.mark.slow
@pytest.mark.parametrize(
  ('kind', 'num_parts', 'experts', 'devices'),
  [
    ('odd_heads', 2, 1, (1, 2)),
    pytest.param('odd_heads', 8, 1, (1, 2, 4, 8), marks=pytest.mark.slow),
    pytest.param('gpt2', 8, 1, (1, 8), marks=pytest.mark.slow),
    pytest.param('latent', 4, 1, (2, 4), marks=pytest.mark.slow),
    # Key/value heads are copied: a norm over all heads counts each once.
    pytest.param('whole_norms', 4, 1, (2, 4), marks=pytest.mark.slow),
    pytest.param('mixture', 4, 1, (1, 2, 4), marks=pytest.mark.slow),
    pytest.param('mixture', 4, 2, (1, 2, 4), marks=pytest.mark.slow),
  ],
)
def test_bits_do_not_depend_on_the_number_of_devices(
  kind, num_parts, experts, devices
):
  found = [
    _answers(
      reference_engine.engine(
        kind,
        **_LAYOUT,
        numerics='invariant',
        tensor=num_devices,
        tensor_parts=num_parts,
        experts=experts,
      ),
      _REQUESTS,
      # Other company, other pages and other chunks on each.
      rng=np.random.default_rng(num_devices),
      spread=9,
      preemptions=(0, 1),
    )
    for num_devices in devices
  ]
  for other in found[1:]:
    assert other == found[0]
  reference = reference_engine.Reference(kind)
  for request, completions in zip(_REQUESTS, found[0], strict=True):
    for index, (_, logprobs, _) in enumerate(completions):
      expected = reference.answer(request, index).logprobs
      # The function is the model's; the order of its sums is another one.
      assert logprobs[0].chosen == pytest.approx(expected[0].chosen, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('kind', 'kv_dtype', 'least', 'most'),
  [
    # Bounds of one device, see test_engine_matrix.py.
    ('odd_heads', 'int8', 1e-4, 0.15),
    ('odd_heads', 'fp8', 1e-3, 0.8),
    ('latent', 'model', 0.0, 1e-5),
  ],
)
def test_caches_over_devices_are_within_the_bounds_of_one(
  kind, kv_dtype, least, most
):
  engine = reference_engine.engine(kind, **_LAYOUT, tensor=2, kv_dtype=kv_dtype)
  reference = reference_engine.Reference(kind)
  found = _answers(engine, _REQUESTS)
  # A first token follows all pages of its prompt.
  errors = [
    abs(logprobs[0].chosen - reference.answer(request).logprobs[0].chosen)
    for request, ((ids, logprobs, _), *_) in zip(_REQUESTS, found, strict=True)
    if ids[0] == reference.answer(request).token_ids[0]
  ]
  assert len(errors) >= 4
  assert least <= max(errors) < most


@pytest.mark.slow
def test_drafts_and_grammars_over_devices():
  engine = reference_engine.engine(
    'odd_heads', **_LAYOUT, tensor=2, speculation='ngram'
  )
  reference = reference_engine.Reference('odd_heads')
  greedy = [_request(length, temperature=0.0) for length in (5, 17, 40)]
  texts = [
    (*request.prompt_ids, *reference.answer(request).token_ids)
    for request in greedy
  ]
  guesses.install(engine, guesses.Guesses(texts))
  with guesses.verified_beside(engine) as beside:
    answers = _answers(engine, greedy)
  assert sum(beside.values()) > 0
  for request, ((ids, *_),) in zip(greedy, answers, strict=True):
    assert ids == reference.answer(request).token_ids
  for kind in ('accepted', 'rejected'):
    assert engine.metrics.value('speculation_tokens_total', kind=kind) > 2
  pattern = constraint_lib.Constraint(
    kind='regex', text='[0-9]{3}[\\xE0-\\xEF]'
  )
  constrained = [
    _request(9, seed=n, temperature=1.0, constraint=pattern) for n in range(3)
  ]
  served = reference_engine.serve(engine, [*constrained, greedy[1]])
  for number in range(len(constrained)):
    text = served.texts[number, 0]
    assert len(text) == 4
    assert text[:3].isdigit()
    assert '\xe0' <= text[3] <= '\xef'
  last = served.completions[3][0]
  assert last.token_ids == reference.answer(greedy[1]).token_ids


@pytest.mark.slow
@pytest.mark.parametrize('drafts', [{'noise': 0.02}, {'has_head': True}])
def test_a_model_or_a_head_that_drafts_over_devices_changes_no_bit(drafts):
  shared = functools.partial(
    reference_engine.engine,
    'odd_heads',
    **{**_LAYOUT, 'decode_steps': 2},
    numerics='invariant',
    tensor_parts=2,
  )
  plain = _answers(shared(tensor=1), _REQUESTS)
  engine = shared(tensor=2, draft_tokens=3, **drafts)
  assert engine.placement.num_devices == 2
  with guesses.verified_beside(engine) as beside:
    found = _answers(
      engine,
      _REQUESTS,
      rng=np.random.default_rng(0),
      spread=9,
      preemptions=(0, 1),
    )
  assert found == plain
  assert sum(beside.values()) > 3
  for kind in ('accepted', 'rejected'):
    assert engine.metrics.value('speculation_tokens_total', kind=kind) > 5
  # What drafts is on every device, but for the rows of the unembedding.
  copied = engine.draft.arrays
  if 'has_head' in drafts:
    copied, table_KD = engine.draft.arrays
    assert len(table_KD.addressable_data(0)) == len(table_KD) // 2
  for leaf in jax.tree.leaves(copied):
    assert leaf.sharding.is_fully_replicated
    assert len(leaf.sharding.device_set) == 2
