"""Adapters on one engine: each sequence is its own adapter's, whatever happens.

The reference computes one token at a time with one adapter, and knows no table,
no slots and no company. With invariant numerics the engine has its bits.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inference.engine import adapter_table, engine as engine_lib, engine_config
from inference.engine.compiled import compilations, layered
from inference.requests import requests as requests_lib
from inference.sampling import settings as settings_lib
from models import layout, transformer
from models.layers import adapters as adapters_lib
from tests.helpers import tiny_models
from tests.helpers.serving import reference_engine
from tests.helpers.training import tiny_adapters

_ROOM = {'max_adapters': 3, 'max_adapter_rank': 4}
# Ranks, layers and gains differ.
_ADAPTERS = {
  'first': {'seed': 1, 'rank': 4},
  'second': {'seed': 2, 'rank': 1, 'share': 0.5},
  'third': {'seed': 3, 'rank': 3, 'has_gain': True},
}


@functools.cache
def _tree(digest, kind='llama'):
  params = reference_engine.params(kind)
  return tiny_adapters.tree(params, **_ADAPTERS[digest])


def _engine(kind='llama', order=tuple(_ADAPTERS), **layout):
  """Returns an engine with the adapters, loaded in an order."""
  engine = reference_engine.engine(
    kind, **{**reference_engine.TIGHT, **_ROOM, **layout}
  )
  for digest in engine.adapters.digests:
    engine.adapters.unload(digest)
  for digest in order:
    engine.adapters.load(digest, _tree(digest, kind))
  return engine


@functools.cache
def _reference(kind='llama'):
  return reference_engine.Reference(kind)


@functools.cache
def _weights(digest, kind='llama'):
  """Returns the variables of the reference, with one adapter beside them."""
  params = reference_engine.params(kind)
  if not digest:
    return params
  own = adapter_table.alone(
    _tree(digest, kind), params, rank=4, dtype=jnp.float32
  )
  return {**params, adapters_lib.COLLECTION: own}


def _request(digest, length, *, seed=0, **fields):
  ids = np.random.default_rng(seed).integers(0, 250, length)
  settings = {'max_tokens': 8, 'logprobs': 2, 'seed': seed, **fields}
  return requests_lib.Request(
    prompt_ids=tuple(map(int, ids)),
    settings=settings_lib.Settings(**settings),
    adapter=digest,
  )


def _crowd():
  """Each prompt is asked of the base and of all adapters."""
  asked = []
  for number, (length, fields) in enumerate(
    [
      (3, {'temperature': 0.0}),
      (17, {}),
      (40, {'n': 2}),
      (60, {'temperature': 0.0, 'prompt_logprobs': 1}),
      (33, {'repetition_penalty': 1.2, 'max_tokens': 14}),
    ]
  ):
    for digest in ('', *_ADAPTERS):
      asked.append(_request(digest, length, seed=number, **fields))
  return asked


def _expected(request, index=0, kind='llama'):
  return _reference(kind).answer(
    request, index, weights=_weights(request.adapter, kind)
  )


def _check(asked, served, kind='llama'):
  for request, completions in zip(asked, served.completions, strict=True):
    for index, completion in enumerate(completions):
      expected = _expected(request, index, kind)
      assert completion.token_ids == expected.token_ids
      assert completion.logprobs == expected.logprobs
      assert completion.prompt_logprobs == expected.prompt_logprobs


@pytest.mark.slow
@pytest.mark.parametrize(
  'layout',
  [
    {},
    {**reference_engine.SIX_SHAPES},
    {'page_size': 0, 'num_pages': 10, 'chunk_tokens': 128},
    {'kv_memory': '1MiB', 'num_pages': 0, 'page_size': 1, 'chunk_tokens': 5},
  ],
  ids=['one step', 'several steps', 'dense', 'small chunks'],
)
def test_a_crowd_of_adapters_has_the_bits_of_each_alone(layout):
  engine = _engine(**layout)
  for crowd in range(2):
    rng = np.random.default_rng(crowd)
    asked = [_crowd()[n] for n in rng.permutation(len(_crowd()))]
    asked = [
      dataclasses.replace(each, principal=f'{crowd} {rng.integers(2)}')
      for each in asked
    ]
    served = reference_engine.serve(
      engine, asked, rng=rng, spread=10, preemptions=(0, 1, 2)
    )
    _check(asked, served)
    assert max(served.preemptions.values()) > 0
    assert served.num_running > 2
  # Adapters change answers, or the test shows nothing.
  texts = {
    tuple(_expected(_request(digest, 17, seed=1)).token_ids)
    for digest in ('', *_ADAPTERS)
  }
  assert len(texts) == 4


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['gpt2', 'mixture'])
def test_other_models_have_adapters_too(kind):
  engine = _engine(kind)
  asked = [_request(d, 30, seed=5) for d in ('', *_ADAPTERS)]
  _check(asked, reference_engine.serve(engine, asked), kind)


@pytest.mark.slow
def test_the_bits_of_an_adapter_do_not_depend_on_its_slot():
  found = []
  for order in (tuple(_ADAPTERS), tuple(reversed(_ADAPTERS)), ('third',)):
    engine = _engine(order=order)
    served = reference_engine.serve(engine, [_request('third', 40, seed=9)])
    found.append(served.completions[0][0].logprobs)
    engine.manager.clear()
  assert found[0] == found[1] == found[2]


@pytest.mark.slow
@pytest.mark.parametrize('numerics', ['fast', 'invariant'])
def test_an_adapter_answers_as_the_merged_weights(numerics):
  engine = _engine(numerics=numerics)
  asked = [
    _request(digest, 50, seed=4, temperature=0.0, prompt_logprobs=0)
    for digest in _ADAPTERS
  ]
  served = reference_engine.serve(engine, asked)
  params = reference_engine.params()
  for request, (completion,) in zip(asked, served.completions, strict=True):
    whole = tiny_adapters.merged(params, _tree(request.adapter))
    expected = _reference().answer(request, weights=whole)
    assert completion.token_ids == expected.token_ids
    assert completion.prompt_logprobs
    assert completion.logprobs
    assert expected.prompt_logprobs
    assert expected.logprobs
    differences = [
      got.chosen - right.chosen
      for got, right in zip(
        [*completion.prompt_logprobs[1:], *completion.logprobs],
        [*expected.prompt_logprobs[1:], *expected.logprobs],
        strict=True,
      )
    ]
    # float32 rounds logits of about 30 by 2e-6, and sums them in other orders.
    assert np.abs(differences).max() < 1e-4


@pytest.mark.slow
def test_the_base_has_the_bits_of_an_engine_without_adapters():
  bare = reference_engine.engine(**reference_engine.TIGHT)
  assert bare.adapters.table is None
  asked = [_request('', 40, seed=2, n=2, prompt_logprobs=1)]
  with_table = reference_engine.serve(_engine(), asked)
  without = reference_engine.serve(bare, asked)
  for a, b in zip(
    with_table.completions[0], without.completions[0], strict=True
  ):
    assert (a.token_ids, a.logprobs) == (b.token_ids, b.logprobs)
    assert a.prompt_logprobs == b.prompt_logprobs


@pytest.mark.slow
def test_an_adapter_never_meets_pages_that_another_one_wrote():
  engine = _engine()
  prompt = _request('', 60, seed=6, temperature=0.0)

  def cached(digest):
    asked = [dataclasses.replace(prompt, adapter=digest)]
    served = reference_engine.serve(engine, asked)
    _check(asked, served)
    return served.completions[0][0].usage.cached_tokens

  # Among all that share the weights of the base, each writes its own pages.
  for digest in ('', 'first', 'second', 'third'):
    assert cached(digest) == 0
    assert cached(digest) == 48
  # Another adapter in the same slot, then the first one again.
  for order in (('second', 'first'), ('third',), ('first', 'second', 'third')):
    for digest in engine.adapters.digests:
      engine.adapters.unload(digest)
    for digest in order:
      engine.adapters.load(digest, _tree(digest))
    for digest in order:
      assert cached(digest) == 48


def test_loading_and_mixing_compile_nothing():
  engine = _engine()
  before = compilations.on_this_thread()
  engine.adapters.unload('second')
  engine.adapters.load('new', _tree('third'))
  with_it = [_request(d, 20) for d in ('', 'first', 'third', 'new')]
  served = reference_engine.serve(engine, with_it)
  assert compilations.on_this_thread() == before
  (a,), (b,) = served.completions[2:]
  assert a.token_ids == b.token_ids
  engine.adapters.unload('new')


@pytest.mark.parametrize('pooling', ['mean', 'last'])
def test_pooled_states_are_those_of_the_adapter(pooling):
  def pooled(digest, length, engine):
    asked = dataclasses.replace(
      _request(digest, length, max_tokens=1, logprobs=None),
      pooling=pooling,
      target=0,
    )
    return reference_engine.serve(engine, [asked]).completions[0][0].pooled_D

  params = reference_engine.params()
  whole = reference_engine.engine_of(
    reference_engine.model_config(), **reference_engine.TIGHT
  )
  whole.set_params(tiny_adapters.merged(params, _tree('third')), 'merged')
  engine = _engine()
  for length in (5, 37):
    got = pooled('third', length, engine)
    assert got is not None
    # float32 sums in another order; states are around 1.
    np.testing.assert_allclose(got, pooled('', length, whole), atol=1e-4)
    assert np.abs(got - pooled('', length, engine)).max() > 1e-2


@pytest.mark.slow
def test_layers_called_one_by_one_have_adapters_too(monkeypatch):
  config = dataclasses.replace(reference_engine.model_config(), num_layers=2)
  params = jax.tree.map(
    lambda x: jnp.concatenate([x, x]) if x.ndim > 9 else x,
    reference_engine.params(),
  )
  layer = params['params']['layer_0']
  params = {'params': {**params['params'], 'layer_1': layer}}
  tree = tiny_adapters.tree(params, seed=8, rank=2)

  def logprobs():
    engine = engine_lib.Engine(
      config,
      params,
      tokenizer=tiny_models.byte_tokenizer(),
      weights_digest='first',
      config=engine_config.EngineConfig(
        **{**reference_engine.TIGHT, **_ROOM, 'numerics': 'fast'}
      ),
    )
    engine.adapters.load('a', tree)
    asked = [_request(d, 40, seed=3, temperature=0.0) for d in ('a', '')]
    served = reference_engine.serve(engine, asked)
    found = [
      [each.chosen for each in completion.logprobs or ()]
      for (completion,) in served.completions
    ]
    return engine._programs._is_layered, np.array(found)

  is_layered, whole = logprobs()
  assert not is_layered
  monkeypatch.setattr(layered, 'MIN_LAYER_BYTES', 0)
  is_layered, apart = logprobs()
  assert is_layered
  np.testing.assert_allclose(apart, whole, atol=1e-4)
  assert np.abs(whole[0] - whole[1]).max() > 1e-2


def test_the_cost_of_an_adapter_is_counted():
  engine = _engine()
  asked = [_request(d, 20, temperature=0.0) for d in ('', 'first')]
  (base,), (adapted,) = reference_engine.serve(engine, asked).completions
  computed = [
    each.usage.prefill_tokens + each.usage.decode_tokens
    for each in (base, adapted)
  ]
  numbers = sum(
    entry['a'].size + entry['b'].size
    for _, entry in adapters_lib.entries(_tree('first'))
  )
  assert computed[0] == computed[1]
  difference = adapted.usage.flops - base.usage.flops
  assert difference == 2 * numbers * computed[0]


def test_what_does_not_fit_is_refused():
  engine = _engine(order=('first', 'second'))
  table, params = engine.adapters, reference_engine.params()
  small = tiny_adapters.tree(params, seed=0, rank=1)
  path, entry = next(iter(adapters_lib.entries(small)))

  def refuses(message, tree, digest='new'):
    with pytest.raises(ValueError, match=message):
      table.load(digest, tree)
    assert table.digests == ['first', 'second']

  refuses(
    r'got rank 5 at layer_0/.*, expected at most 4 \(engine.max_adapter_rank\)',
    tiny_adapters.tree(params, seed=0, rank=5),
  )
  refuses(
    'got weights of layer_7/mlp/up, expected only',
    adapters_lib.nested({'layer_7/mlp/up': entry}),
  )
  refuses(
    'it is an adapter of another model',
    adapters_lib.nested({path: {**entry, 'a': entry['a'][1:]}}),
  )
  refuses(
    'got numbers that are not finite at',
    adapters_lib.nested({path: {**entry, 'b': entry['b'] * np.nan}}),
  )
  table.load('third', _tree('third'))
  with pytest.raises(ValueError, match=r'expected at most 3 \(engine.max_ada'):
    table.load('fourth', small)
  # Loaded again, under another name, it needs no further slot.
  table.load('third', _tree('third'))
  table.unload('third')
  assert 'third' in table.digests
  with pytest.raises(ValueError, match="adapter: got 'fourth', which is not"):
    engine.submit(_request('fourth', 5))
  bare = reference_engine.engine(**reference_engine.TIGHT)
  with pytest.raises(ValueError, match='set engine.max_adapters'):
    bare.adapters.load('first', small)
  with pytest.raises(ValueError, match='none: no adapter is; load it first'):
    bare.submit(_request('first', 5))


@pytest.mark.parametrize('make', [tiny_models.llama_like, tiny_models.mixture])
def test_stacked_and_transposed_layers_have_the_same_places(make):
  config = make(num_layers=2, scan_layers=True)
  model = transformer.Transformer(config)
  stacked = jax.eval_shape(
    model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32)
  )
  apart = jax.eval_shape(lambda tree: layout.unstack(tree, config)[0], stacked)
  turned = jax.eval_shape(layout.transpose_kernels, apart)
  found = adapter_table.layer_shapes(apart)
  assert 'layer_1/attention/query' in found
  assert adapter_table.layer_shapes(stacked) == found
  assert adapter_table.layer_shapes(turned) == found


def test_an_adapter_in_use_stays():
  engine = _engine()
  number = engine.submit(_request('second', 20))
  with pytest.raises(ValueError, match='while 1 sequences use it'):
    engine.adapters.unload('second')
  engine.cancel(number)
  list(engine.run())
  engine.adapters.unload('second')
  with pytest.raises(ValueError, match='while 2 adapters of the old ones'):
    engine.set_params(reference_engine.params(), 'other')


def test_the_config_makes_room_for_adapters():
  config = engine_config.EngineConfig()
  assert config.holding([]).max_adapters == 0
  assert config.holding([4, 8]).max_adapters == 2
  assert config.holding([4, 8]).max_adapter_rank == 8
  config = engine_config.EngineConfig(max_adapters=1, max_adapter_rank=4)
  with pytest.raises(ValueError, match='got 2 adapters, expected at most 1'):
    config.holding([4, 4])
  with pytest.raises(ValueError, match='got one of rank 8, expected at most 4'):
    config.holding([8])
