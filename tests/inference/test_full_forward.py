"""The cache-free forward is the model, and the engine agrees with it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inference import full_forward
from inference.engine import adapter_table, engine as engine_lib
from inference.requests import requests
from inference.sampling import settings as settings_lib
from models import layout, transformer
from models.native import processor
from tests.helpers import frozen_dirs, tiny_models
from tests.helpers.training import tiny_adapters
from tests.inference import conftest as life_two

_IDS = [256, *b'the weights say this, and nothing else does; read on']
_SETTINGS = settings_lib.Settings(
  temperature=1.0, max_tokens=24, logprobs=0, seed=7, ignore_eos=True
)


def _expected(config, params, ids, first, vocab_size=259):
  """Returns what one pass of the whole model says, in float64."""
  model = transformer.Transformer(config)
  logits_1TV, _ = model.apply(params, np.asarray([ids], np.int32))
  logits_TV = np.asarray(logits_1TV[0, :, :vocab_size], np.float64)
  logits_TV -= np.logaddexp.reduce(logits_TV, axis=-1, keepdims=True)
  return [logits_TV[t - 1, ids[t]] for t in range(first, len(ids))]


@pytest.mark.slow
@pytest.mark.parametrize(
  'make', [tiny_models.llama_like, tiny_models.gpt2_like, tiny_models.mixture]
)
@pytest.mark.parametrize('scan_layers', [False, True])
def test_it_is_one_pass_of_the_whole_model(make, scan_layers):
  config = make(vocab_size=270, max_length=70, scan_layers=scan_layers)
  params = frozen_dirs.params(config)
  forward = full_forward.FullForward(
    params, config, dtype='float32', vocab_size=259
  )
  # 70: no power of two holds it exactly.
  for ids in (_IDS,) if scan_layers else (_IDS, (_IDS * 2)[:70]):
    found = forward.logprobs(ids, 5)
    assert found.dtype == np.float32
    expected = _expected(config, params, ids, 5)
    np.testing.assert_allclose(found, expected, atol=2e-4)


def _engine(config, params, **overrides):
  return engine_lib.Engine(
    config,
    params,
    tokenizer=tiny_models.byte_tokenizer(),
    weights_digest='d',
    config=dataclasses.replace(life_two.ENGINE, **overrides),
  )


def _answered(engine, **fields):
  request = requests.Request(
    prompt_ids=tuple(_IDS[:30]), settings=_SETTINGS, **fields
  )
  ((_, update),) = [
    found for found in engine.answer([request]) if found[1].completion
  ]
  assert update.completion
  return update.completion


def test_invariant_numerics_have_its_bits():
  config = frozen_dirs.config(num_layers=2)
  params = frozen_dirs.params(config)
  done = _answered(_engine(config, params, numerics='invariant'))
  ids = [*_IDS[:30], *done.token_ids]
  forward = full_forward.FullForward(
    params, config, dtype='float32', vocab_size=259, is_invariant=True
  )
  recorded = [each.chosen for each in done.logprobs or ()]
  assert forward.logprobs(ids, 30).tolist() == recorded
  # The other numerics agree within rounding, and not by the bit.
  plain = full_forward.FullForward(
    params, config, dtype='float32', vocab_size=259
  )
  found = plain.logprobs(ids, 30)
  assert found.tolist() != recorded
  worst = np.abs(found - recorded).max()
  assert worst < full_forward.tolerance('float32')


@pytest.mark.slow
def test_it_reads_the_params_of_an_engine_as_they_lie(monkeypatch):
  """On a CPU with AMX, a bfloat16 engine keeps transposes of its kernels."""
  monkeypatch.setattr(processor, 'has_bfloat16_tiles', lambda: True)
  config = frozen_dirs.config(num_layers=1)
  params = frozen_dirs.params(config, dtype='bfloat16')
  engine = engine_lib.Engine(
    config,
    params,
    tokenizer=tiny_models.byte_tokenizer(),
    weights_digest='d',
    dtype=jnp.bfloat16,
    config=life_two.ENGINE,
  )
  laid_out = jax.tree.leaves(engine.params, is_leaf=lambda x: (
    isinstance(x, layout.Transposed)
  ))  # fmt: skip
  assert any(isinstance(each, layout.Transposed) for each in laid_out)
  done = _answered(engine)
  ids = [*_IDS[:30], *done.token_ids]
  one, other = (
    full_forward.FullForward(
      tree, config, dtype='bfloat16', vocab_size=259
    ).logprobs(ids, 30)
    for tree in (engine.params, params)
  )
  np.testing.assert_allclose(one, other, atol=0.1)
  recorded = [each.chosen for each in done.logprobs or ()]
  assert np.abs(one - recorded).max() < full_forward.tolerance('bfloat16')


def test_it_can_be_stopped_between_two_layers():
  config = tiny_models.llama_like(vocab_size=270)
  forward = full_forward.FullForward(
    frozen_dirs.params(config), config, dtype='float32', vocab_size=259
  )
  calls = []

  def pause():
    calls.append(None)
    raise InterruptedError

  with pytest.raises(InterruptedError):
    forward.logprobs([1, 2, 3], 1, pause)
  assert len(calls) == 1


def test_every_dtype_of_a_model_has_a_tolerance():
  tolerance = full_forward.tolerance
  assert tolerance('float32') < tolerance('float16') < tolerance('bfloat16')
  # Where products have fewer digits, and where the cache has.
  assert tolerance('float32', platform='gpu') > tolerance('float32')
  assert tolerance('float32', kv_dtype='int8') > tolerance('float32')


@pytest.mark.slow
@pytest.mark.parametrize('has_gain', [False, True])
def test_invariant_numerics_have_its_bits_with_an_adapter(has_gain):
  config = frozen_dirs.config(num_layers=2)
  params = frozen_dirs.params(config)
  tree = tiny_adapters.tree(params, seed=1, rank=2, has_gain=has_gain)
  engine = _engine(
    config,
    params,
    numerics='invariant',
    max_adapters=2,
    max_adapter_rank=4,
  )
  engine.adapters.load('a', tree)
  done = _answered(engine, adapter='a')
  ids = [*_IDS[:30], *done.token_ids]
  own = adapter_table.alone(tree, params, rank=4, dtype='float32')

  def logprobs(adapter):
    forward = full_forward.FullForward(
      params,
      config,
      dtype='float32',
      vocab_size=259,
      is_invariant=True,
      adapter=adapter,
    )
    return forward.logprobs(ids, 30)

  assert done.logprobs
  answered = [each.chosen for each in done.logprobs]
  assert logprobs(own).tolist() == answered
  # Not padded, it is the same function with other sums.
  np.testing.assert_allclose(logprobs(tree), answered, atol=1e-4)
  assert np.abs(logprobs(None) - answered).max() > 0.1
