"""EngineConfig: checks of its fields, and the values derived from them."""

import dataclasses
import subprocess
import sys

import pytest

from inference.engine import engine_config
from models.attention import paged

_Config = engine_config.EngineConfig


@pytest.mark.parametrize(
  ('field', 'value', 'message'),
  [
    ('numerics', 'exact', "got 'exact', expected one of fast, invariant"),
    ('kv_dtype', 'int4', "got 'int4', expected one of model, int8"),
    ('attention', 'flash', "got 'flash', expected one of auto, reference, k"),
    ('page_size', -1, 'got -1, expected a divisor or a multiple of 64'),
    ('page_size', 48, 'got 48, expected a divisor or a multiple of 64'),
    ('page_size', 96, 'got 96, expected a divisor or a multiple of 64'),
    ('num_pages', -1, 'got -1, expected at least 0'),
    ('max_length', -1, 'got -1, expected at least 0'),
    ('kv_memory', '2 apples', "got '2 apples', expected a size such as 2GiB"),
    ('kv_memory', '-1GiB', "got '-1GiB', expected a size such as 2GiB"),
    ('kv_memory', '0', "got '0', expected a size such as 2GiB"),
    ('max_waiting', -1, 'got -1, expected at least 0'),
    ('decode_shapes', (0, 32), r'got \(0, 32\), expected numbers >= 1'),
    ('max_sequences', 0, 'max_sequences: got 0, expected a whole number'),
    ('chunk_tokens', 0, 'chunk_tokens: got 0, expected a whole number'),
    ('max_chunks', 1.5, 'max_chunks: got 1.5, expected a whole number'),
    ('max_mixed_chunks', 0, 'got 0, expected a whole number'),
    ('aging_steps', 0, 'aging_steps: got 0, expected a whole number'),
  ],
)
def test_what_cannot_be_is_refused(field, value, message):
  with pytest.raises(ValueError, match=message) as error:
    _Config(**{field: value})
  assert field in str(error.value)


@pytest.mark.parametrize(
  ('given', 'derived'),
  [
    ({}, {'max_sequences': 32, 'max_chunks': 16, 'max_mixed_chunks': 4}),
    ({'max_chunks': 1}, {'max_mixed_chunks': 1}),
    ({'max_chunks': 3}, {'max_mixed_chunks': 3}),
    ({'max_chunks': 64}, {'max_mixed_chunks': 4}),
    ({'max_mixed_chunks': 17}, {'max_chunks': 17}),
    ({'max_mixed_chunks': 2}, {'max_chunks': 16}),
    ({'decode_shapes': (8, 2)}, {'max_sequences': 8}),
  ],
)
def test_defaults_follow_the_given_values(given, derived):
  config = _Config(**given)
  for name, value in {**given, **derived}.items():
    assert getattr(config, name) == value


def test_given_values_that_contradict_each_other_are_refused():
  for given, message in (
    ({'max_mixed_chunks': 17, 'max_chunks': 16}, 'got 17, expected at most'),
    (
      {'decode_shapes': (2, 8), 'max_sequences': 32},
      r'got \(2, 8\), expected .* max_sequences = 32',
    ),
    (
      {'kv_memory': '2GiB', 'num_pages': 5},
      'kv_memory: got 2GiB and num_pages = 5, expected one of them',
    ),
  ):
    with pytest.raises(ValueError, match=message):
      _Config(**given)


def test_the_context_is_the_models_or_less():
  assert _Config().context(100) == 100
  assert _Config(max_length=60).context(100) == 60
  with pytest.raises(ValueError, match='max_length: got 101, expected at most'):
    _Config(max_length=101).context(100)


@pytest.mark.parametrize('page_size', [0, 1, 2, 16, 32, 64, 128, 256])
@pytest.mark.parametrize('max_length', [1, 63, 64, 65, 200, 1000, 1100])
def test_a_table_holds_the_context_in_whole_tiles(page_size, max_length):
  for chunk_tokens in (1, 32, 100):
    config = _Config(page_size=page_size, chunk_tokens=chunk_tokens)
    page_tokens = config.page_tokens(max_length)
    slots = config.table_width(max_length) * page_tokens
    assert page_tokens == page_size or (
      not page_size and page_tokens >= max_length
    )
    assert slots % paged.TILE_SLOTS == 0
    assert slots >= max_length + chunk_tokens
    assert slots < max_length + chunk_tokens + max(64, page_tokens)
    assert config.limits(page_tokens).page_size == page_tokens


def test_steps_are_compiled_for_few_shapes():
  config = _Config(max_sequences=12, max_chunks=6, max_mixed_chunks=2)
  assert config.step_shapes() == [
    *((rows, 0) for rows in (1, 2, 4, 8, 12)),
    *((0, chunks) for chunks in (1, 2, 4, 6)),
    *((4, 1), (4, 2), (12, 1), (12, 2)),
  ]
  config = _Config(
    max_sequences=12, decode_shapes=(2, 12), max_chunks=1, max_mixed_chunks=1
  )
  assert config.step_shapes() == [(2, 0), (12, 0), (0, 1), (12, 1)]
  config = _Config(max_sequences=1, max_chunks=2, max_mixed_chunks=1)
  assert config.step_shapes() == [(1, 0), (0, 1), (0, 2)]


@pytest.mark.parametrize('most', [1, 2, 3, 5, 8])
@pytest.mark.parametrize('mixed', [1, 3])
def test_every_step_that_may_be_planned_has_a_shape(most, mixed):
  config = _Config(max_sequences=most, max_chunks=4, max_mixed_chunks=mixed)
  shapes = config.step_shapes()
  assert len(set(shapes)) == len(shapes)
  for decodes in range(most + 1):
    # A sequence with a chunk does not decode: one sequence does either.
    most_chunks = 4 if not decodes else mixed * (decodes < most or most > 1)
    for chunks in range(most_chunks + 1):
      assert any(d >= decodes and x >= chunks for d, x in shapes)


def _pool(config, *, memory=0, is_host=False, max_length=100):
  return config.pool_pages(
    max_length,
    bytes_per_token=10.0,
    weight_bytes=1000.0,
    memory_bytes=memory,
    is_host=is_host,
  )


def test_a_pool_is_what_was_asked_for_or_what_memory_allows():
  # Page 0 belongs to no sequence, and comes on top.
  assert _pool(_Config(num_pages=5)) == 6
  # Seven pages of 16 hold a context of 100: more are never used.
  few = _Config(max_sequences=4)
  assert _pool(few, memory=10**9) == 4 * 7 + 1
  # Four fifths of the memory after 1,000 bytes of weights; 160 bytes a page.
  assert _pool(few, memory=3000) == 10 + 1
  # On a CPU, a quarter of it.
  assert _pool(few, memory=9000, is_host=True) == 12 + 1
  # Dense: a page is the context, in whole tiles.
  dense = _Config(max_sequences=4, page_size=0)
  assert _pool(dense, memory=10**9) == 4 + 1
  assert _pool(dense, memory=1000 + 3300) == 2 + 1


def test_a_pool_takes_the_memory_that_was_stated():
  few = _Config(max_sequences=4, kv_memory='2 kB')
  # Page 0 is a part of it: 12 pages of 160 bytes.
  assert _pool(few) == 12
  assert _pool(dataclasses.replace(few, kv_memory='2KiB')) == 12
  assert _pool(dataclasses.replace(few, kv_memory='0.01M'), memory=1) == 28 + 1
  assert _pool(dataclasses.replace(few, kv_memory='1280')) == 8
  # Seven pages for a sequence of the context, and page 0.
  with pytest.raises(
    ValueError,
    match='kv_memory: got 1279, expected at least 1MiB, for one sequence of 100'
    ' tokens; raise it, or lower engine.max_length',
  ):
    _pool(dataclasses.replace(few, kv_memory='1279'))
  assert _pool(dataclasses.replace(few, kv_memory='1279'), max_length=90) == 7


def test_a_pool_on_a_cpu_is_small_unless_one_sequence_needs_more():
  def pool(context, **fields):
    return _Config(**fields).pool_pages(
      context,
      bytes_per_token=2**20,
      weight_bytes=0,
      memory_bytes=64 * 2**30,
      is_host=True,
    )

  assert pool(160) == 64 + 1  # 1 GiB of pages of 16 MiB
  assert pool(4000) == 250 + 1  # one sequence
  assert pool(10**6) == 1024 + 1  # a quarter of the memory
  assert pool(160, kv_memory='3GiB') == 192


def test_a_pool_without_a_page_is_refused():
  with pytest.raises(
    ValueError, match='got room for 0 pages of 16 tokens of 10 bytes, expected'
  ):
    _pool(_Config(), memory=1100)


def test_every_field_has_a_help_text():
  for field in dataclasses.fields(_Config):
    assert field.metadata['help'].endswith('.'), field.name


def test_the_fields_are_read_without_jax():
  code = (
    'import sys\n'
    'from inference.engine import engine_config\n'
    "assert 'jax' not in sys.modules\n"
  )
  subprocess.run([sys.executable, '-c', code], check=True, timeout=60)
