"""Engines that multiply by kernels in fewer bits with native code."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from inference.engine import (
  device_state,
  engine as engine_lib,
  execution,
  inputs as inputs_lib,
  steps,
)
from inference.engine.compiled import program_store
from inference.requests import requests
from inference.sampling import settings as settings_lib
from models import transformer
from models.attention.kernels import paged_cpu
from models.native import build
from tests.helpers import frozen_dirs, tiny_models
from tests.helpers.open_weights import stored_params
from tests.helpers.serving import guesses, trained_heads
from tests.inference import conftest as life_two

_PROMPTS = [[256, *b'what is said alone'], [256, *b'and'], [256, *b'beside it']]


@pytest.fixture(autouse=True)
def _needs_a_library():
  try:
    build.registered()
  except build.BuildError as error:
    pytest.skip(str(error))


def _config(**fields):
  sizes = {'model_width': 64, 'mlp_width': 96, 'head_width': 16}
  return frozen_dirs.config(**{**sizes, **fields})


def _engine(config, params, dtype='float32', **overrides):
  return engine_lib.Engine(
    config,
    params,
    tokenizer=tiny_models.byte_tokenizer(),
    weights_digest='d',
    dtype=jnp.dtype(dtype),
    config=dataclasses.replace(life_two.ENGINE, **overrides),
  )


def _answers(engine, prompts, max_tokens=10):
  settings = settings_lib.Settings(
    temperature=0.0, max_tokens=max_tokens, logprobs=0, ignore_eos=True
  )
  asked = [
    requests.Request(prompt_ids=tuple(ids), settings=settings)
    for ids in prompts
  ]
  found = {}
  for index, update in engine.answer(asked):
    if done := update.completion:
      logprobs = [each.chosen for each in done.logprobs or ()]
      found[index] = list(done.token_ids), logprobs
  return [found[index] for index in range(len(asked))]


@pytest.mark.slow
@pytest.mark.parametrize('scheme', ['int4', 'Q8_0'])
def test_answers_have_the_same_bits_alone_and_in_a_crowd(scheme):
  config = _config()
  params = stored_params.stored(frozen_dirs.params(config), scheme)
  engine = _engine(config, params, numerics='invariant', native='on')
  assert engine.backend.products.startswith('native, ')
  together = _answers(engine, _PROMPTS)
  assert [_answers(engine, [each])[0] for each in _PROMPTS] == together


@pytest.mark.slow
def test_answers_are_those_of_plain_products():
  config = _config()
  params = stored_params.stored(frozen_dirs.params(config), 'int8')
  found = _answers(_engine(config, params, native='on'), _PROMPTS)
  plain = _answers(_engine(config, params, native='off'), _PROMPTS)
  for (ids, logprobs), (expected_ids, expected) in zip(
    found, plain, strict=True
  ):
    assert ids == expected_ids
    assert logprobs == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_few_rows_of_floats_have_the_answers_of_plain_products(dtype):
  config = _config()
  params = jax.tree.map(
    lambda x: x.astype(dtype), frozen_dirs.params(config, seed=3)
  )
  answers = []
  for native in ('on', 'off'):
    engine = _engine(config, params, dtype=dtype, native=native)
    assert engine.backend.products.startswith(
      'native up to 8 rows' if native == 'on' else 'plain JAX: engine.native'
    )
    attend = engine.backend.execution.attend_cached
    assert isinstance(attend, paged_cpu.Attend) == (native == 'on')
    is_said = '; attention native' in engine.backend.products
    assert is_said == (native == 'on')
    answers.append(_answers(engine, _PROMPTS))
  for (ids, logprobs), (expected, of_expected) in zip(*answers, strict=True):
    assert ids[:1] == expected[:1]  # later ones may follow from a near tie
    tolerance = 1e-4 if dtype == 'float32' else 0.1
    assert abs(logprobs[0] - of_expected[0]) < tolerance
    assert dtype != 'float32' or ids == expected


@pytest.mark.slow
def test_a_draft_head_reads_weights_of_16_bits():
  config = _config(num_layers=1)
  params = frozen_dirs.params(config)
  head = trained_heads.weights(config, params)
  # A head that was trained on random text guesses samples, not best tokens.
  asked = [
    requests.Request(
      prompt_ids=tuple(ids),
      settings=settings_lib.Settings(seed=7, max_tokens=24, ignore_eos=True),
    )
    for ids in _PROMPTS
  ]
  found = {}
  for native, dtype in (('on', 'bfloat16'), ('off', 'float32')):
    engine = engine_lib.Engine(
      config,
      params,
      tokenizer=tiny_models.byte_tokenizer(),
      weights_digest='d',
      config=dataclasses.replace(
        life_two.ENGINE, native=native, speculation='head', draft_head='given'
      ),
      draft=head,
    )
    engine._speculator._choice.costs = guesses.Costs()
    arrays = jax.tree.leaves(engine.draft.arrays)
    assert {x.dtype.name for x in arrays} == {dtype}
    numbers = sum(x.size for x in arrays)
    assert engine.draft.num_bytes == numbers * jnp.dtype(dtype).itemsize
    done = [
      update.completion
      for _, update in engine.answer(asked)
      if update.completion
    ]
    found[native] = sum(each.usage.accepted_tokens for each in done)
  # Guesses of rounded weights are nearly as good.
  assert found['off'] > 10
  assert abs(found['on'] - found['off']) <= found['off'] / 2


def test_the_setting_and_its_reason():
  config = _config(num_layers=1)
  floats = frozen_dirs.params(config)
  with pytest.raises(ValueError, match='no kernel is in fewer bits, and'):
    _engine(config, floats, native='on', numerics='invariant')
  with pytest.raises(ValueError, match=r"engine.native: got 'yes', expected"):
    dataclasses.replace(life_two.ENGINE, native='yes')


def test_ports_of_other_code_are_other_programs():
  config = _config(num_layers=1)
  params = stored_params.stored(frozen_dirs.params(config), 'int8')
  chosen = execution.choose(life_two.ENGINE, config, jnp.float32, 'cpu')
  native = chosen.multiplying(life_two.ENGINE, params, jnp.float32, 'cpu')
  target, _ = build.registered()
  # Part of the name of every program that is kept on disk. Without an address
  # in it, another process finds the program.
  text = program_store.describe_ports(native.execution)
  assert target in text
  assert ' at 0x' not in text
  assert text != program_store.describe_ports(chosen.execution)


def test_a_compiled_step_has_no_float_copy_of_a_kernel():
  # The smallest large matrix is 32 MiB in float32, far more than all else.
  config = _config(
    model_width=1024, mlp_width=8192, vocab_size=8192, num_layers=1
  )
  shapes = jax.eval_shape(lambda: frozen_dirs.params(config))
  params = jax.eval_shape(
    lambda tree: stored_params.stored(tree, 'int8'), shapes
  )
  backend = execution.choose(life_two.ENGINE, config, jnp.float32, 'cpu')
  backend = backend.multiplying(life_two.ENGINE, params, jnp.float32, 'cpu')
  model = transformer.Transformer(config, jnp.float32, backend.execution)
  state = device_state.init_state(
    model,
    num_slots=2,
    num_pages=5,
    page_size=16,
    kv_dtype=backend.kv_dtype,
    channels=backend.channels,
    vocab_size=config.vocab_size,
  )
  _, inputs = inputs_lib.empty(
    inputs_lib.Layout(2, 0, 16, 4, 2), padding_slot=2
  )
  lowered = steps.decode_step.lower(
    params,
    state.kv_cache,
    state.slots.last_B,
    inputs,
    model=model,
    vocab_size=config.vocab_size,
  )
  assert 'two_lives_multiply' in lowered.as_text()
  assert lowered.compile().memory_analysis().temp_size_in_bytes < 8 * 2**20
