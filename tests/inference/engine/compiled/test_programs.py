"""The compiled programs: their shapes, and the state that each changes."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inference.engine import (
  device_state,
  engine as engine_lib,
  engine_config,
  steps,
)
from inference.engine.compiled import keys, shapes as shapes_lib
from inference.requests import requests as requests_lib
from inference.sampling import penalties, sampler as sampler_lib, settings
from tests.helpers import tiny_models
from tests.helpers.serving import reference_engine


@pytest.fixture
def programs():
  return reference_engine.engine(**reference_engine.SIX_SHAPES)._programs


@pytest.fixture
def state():
  """Returns another state than the engine's, with values in every place."""
  real = reference_engine.engine(**reference_engine.SIX_SHAPES)._state
  rng = np.random.default_rng(0)
  pages = jax.tree.map(
    lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype),
    real.kv_cache,
  )
  slots = device_state.Slots(
    last_B=jnp.arange(9, dtype=jnp.int32) + 50,
    has_ended_B=jnp.ones((9,), bool),
    sampler=sampler_lib.empty(9),
    seen_BV=jnp.asarray(rng.integers(0, 5, (9, 259)), jnp.int32),
  )
  return device_state.State(pages, slots)


def _host(tree):
  return jax.tree.map(np.array, tree)


def _settings(sampler):
  words = jax.random.key_data(sampler.key_B)
  return _host(sampler._replace(key_B=words))


@pytest.mark.slow
def test_a_step_has_the_smallest_shape_that_holds_it(programs):
  assert programs.shapes == [(0, 1), (0, 2), (2, 0), (2, 1), (8, 0), (8, 1)]
  assert [
    programs.shape_for(*needed)
    for needed in ((1, 0), (3, 0), (0, 1), (0, 2), (1, 1), (2, 1), (3, 1))
  ] == [(2, 0), (8, 0), (0, 1), (0, 2), (2, 1), (2, 1), (8, 1)]


def test_few_shapes_hold_every_step():
  for layout in (
    {'max_sequences': 8},
    {'max_sequences': 1},
    {'max_sequences': 12, 'max_chunks': 6, 'max_mixed_chunks': 2},
    {'max_sequences': 3, 'max_chunks': 1, 'max_mixed_chunks': 1},
  ):
    config = engine_config.EngineConfig(**layout)
    shapes = [steps.Shape(*shape) for shape in config.step_shapes()]
    few = shapes_lib.holding_all(shapes)
    assert len(few) <= 3
    assert (config.max_sequences, 0) in few
    for decodes, chunks in shapes:
      assert any(d >= decodes and x >= chunks for d, x in few)


@pytest.mark.slow
def test_an_engine_answers_before_all_its_programs_are_compiled():
  engine = engine_lib.Engine(
    reference_engine.model_config(),
    reference_engine.params(),
    tokenizer=tiny_models.byte_tokenizer(),
    weights_digest='first',
    config=engine_config.EngineConfig(**reference_engine.SIX_SHAPES),
    compile_all=False,
  )
  programs = engine._programs
  requests = [
    requests_lib.Request(
      prompt_ids=(65, 66, 67, seed),
      settings=settings.Settings(max_tokens=5, seed=seed, ignore_eos=True),
    )
    for seed in range(3)
  ]

  def answers():
    done = [u.completion for _, u in engine.answer(requests) if u.completion]
    return sorted((each.seed, tuple(each.token_ids)) for each in done)

  assert programs.shape_for(1, 0) == (8, 0)
  assert programs.shape_for(0, 1) == (0, 2)
  before = answers()
  compiler = threading.Thread(target=engine.compile_rest)
  compiler.start()
  while compiler.is_alive():
    assert answers() == before
  compiler.join()
  assert programs.shape_for(1, 0) == (2, 0)
  assert programs.shape_for(0, 1) == (0, 1)
  assert answers() == before
  assert set(programs.shapes) <= programs._compiled.keys()
  assert engine.metrics.value('compilations_after_ready_total') == 0


def test_sizes_of_sample_are_few_and_hold_every_shape():
  for most, expected in (
    (1, [1]), (2, [1, 2]), (4, [1, 4]), (5, [1, 4, 5]), (33, [1, 4, 16, 33]),
  ):  # fmt: skip
    assert shapes_lib.sample_sizes(most) == expected
  # The most tokens whose logits are cheap are a size, where more are sampled.
  assert shapes_lib.sample_sizes(12, 8) == [1, 4, 8, 12]
  assert shapes_lib.sample_sizes(8, 8) == [1, 4, 8]
  assert shapes_lib.sample_sizes(36, 16) == [1, 4, 16, 36]


@pytest.mark.slow
def test_inputs_are_padding_until_they_are_filled(programs):
  _, inputs = programs.empty_inputs(steps.Shape(2, 1))
  width = -(-(128 + 8) // 64) * 64 // 16
  shapes = {
    'tokens_T': (10,), 'positions_T': (10,), 'lengths_D': (2,),
    'decode_table_DL': (2, width),
    'chunk_table_XL': (1, width), 'rows_R': (4,), 'slots_R': (4,),
    'forced_R': (4,), 'targets_M': (8,), 'prompt_logprobs_X': (1,),
  }  # fmt: skip
  assert {name: x.shape for name, x in inputs._asdict().items()} == shapes
  assert all(x.dtype == np.int32 for x in inputs)
  nothing = {
    'positions_T': -1, 'slots_R': 8, 'forced_R': -1, 'targets_M': -1,
    'prompt_logprobs_X': -1,
  }  # fmt: skip
  for name, x in inputs._asdict().items():
    assert (x == nothing.get(name, 0)).all(), name


@pytest.mark.parametrize('shape', [steps.Shape(2, 1), steps.Shape(2, 0)])
def test_a_step_of_padding_changes_nothing_that_is_anybodys(
  programs, state, shape
):
  before = _host((state.kv_cache, state.slots.last_B, state.slots.seen_BV))
  flat_I, _ = programs.empty_inputs(shape)
  after, _ = programs.step(shape, reference_engine.params(), state, flat_I)
  after = _host((after.kv_cache, after.slots.last_B, after.slots.seen_BV))
  jax.tree.map(np.testing.assert_array_equal, before[0], after[0])
  for old, new in zip(before[1:], after[1:], strict=True):
    np.testing.assert_array_equal(old[:8], new[:8])  # the ninth slot is padding


def test_a_crowd_is_seated_by_few_calls(programs, state, monkeypatch):
  """A call takes 16 sequences; all of their settings arrive."""
  rng = np.random.default_rng(0)
  rows = [
    sampler_lib.row(
      settings.Settings(
        temperature=float(rng.random()),
        top_k=i,
        top_p=0.5 + i / 20,
        min_p=i / 30,
        repetition_penalty=1 + i / 7,
        presence_penalty=-i / 9,
        frequency_penalty=i / 8,
        logit_bias=((i, -3.5), (40, i / 3)),
        stop_ids=(i, 77),
        min_tokens=i,
        logprobs=i or None,
      ),
      num_prompt_tokens=3 + i,
      seed=2**63 + i,
      eos_id=None if i % 2 else 257,
    )
    for i in range(8)
  ]
  expected = _settings(sampler_lib.stack([*rows, sampler_lib.idle()]))
  calls = []
  seat = programs._compiled['seat']
  monkeypatch.setitem(
    programs._compiled, 'seat', lambda *args: calls.append(1) or seat(*args)
  )
  order = rng.permutation(8)
  state = programs.seat(state, [(int(i), rows[i]) for i in order])
  assert len(calls) == 1
  found = _settings(state.slots.sampler)
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  assert state.slots.has_ended_B.tolist() == [False] * 9
  many = [(int(i) % 8, rows[int(i) % 8]) for i in range(40)]
  state = programs.seat(state, many)
  assert len(calls) == 1 + 3
  found = _settings(state.slots.sampler)
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_slot_is_given_with_its_settings_and_its_counts(programs, state):
  before = _host((state.slots.last_B, state.slots.seen_BV))
  row = sampler_lib.row(
    settings.Settings(temperature=0.5, top_k=3, stop_ids=(4,)),
    num_prompt_tokens=3,
    seed=11,
    eos_id=257,
  )
  state = programs.seat(state, [(6, row)])
  state = programs.recount(state, 6, [5, 5, 9, 9, 9, 2], 3)
  seen_BV = np.asarray(state.slots.seen_BV)
  counts = {5: penalties.PROMPT_FLAG, 9: penalties.PROMPT_FLAG + 2, 2: 1}
  expected_V = np.zeros(259, np.int32)
  expected_V[list(counts)] = list(counts.values())
  np.testing.assert_array_equal(seen_BV[6], expected_V)
  others = np.arange(9) != 6
  np.testing.assert_array_equal(seen_BV[others], before[1][others])
  np.testing.assert_array_equal(state.slots.last_B, before[0])
  # The ninth slot is padding, and takes the rows of a call that are left.
  ended = [True] * 6 + [False, True, False]
  assert state.slots.has_ended_B.tolist() == ended
  sampler = state.slots.sampler
  assert sampler.temperature_B.tolist() == [0] * 6 + [0.5] + [0] * 2
  assert sampler.top_k_B.tolist() == [0] * 6 + [3] + [0] * 2
  assert sampler.key_B[6] == jax.random.key(11)


@pytest.mark.parametrize('num_copies', [1, 8, 11])
def test_pages_are_copied_in_calls_that_run_in_order(
  programs, state, num_copies
):
  (before,) = _host(state.kv_cache)
  # Each page is read before a later copy writes to it.
  copies = [(page + 1, page) for page in range(1, num_copies + 1)]
  state = programs.copy_pages(state, copies)
  expected_PQYC = before.kv_PQYC.copy()
  for source, target in copies:
    expected_PQYC[target] = before.kv_PQYC[source]
  np.testing.assert_array_equal(state.kv_cache[0].kv_PQYC, expected_PQYC)


def test_keys_of_equal_numbers_are_different():
  shape, verified = steps.Shape(4, 4), keys.Verified(4, 4)
  found = (
    shape, verified, keys.Forward(shape), keys.Accepted(verified),
    keys.Masked(4), 4,
  )  # fmt: skip
  assert len(set(found)) == len(found)
