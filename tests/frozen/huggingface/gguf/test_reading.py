"""GGUF files, written by the library of llama.cpp's converter."""

import dataclasses

import numpy as np
import pytest

from frozen import format as frozen_format
from frozen.huggingface import importing, layouts
from frozen.huggingface.gguf import (
  families,
  header as header_lib,
  names,
  reading,
)
from models.attention import rope_scaling
from tests.helpers import frozen_dirs, tiny_models
from tests.helpers.open_weights import hf_files

gguf = pytest.importorskip('gguf', reason='requirements-hub.txt')

# Rows of whole blocks: 32 numbers, 256 of the K kinds.
CONFIG = tiny_models.llama_like(
  vocab_size=400, model_width=256, head_width=64, mlp_width=256
)


# Mixtral: one tensor holds all experts of a layer.
MIXTURE = tiny_models.mixture(
  vocab_size=400, model_width=256, head_width=64, expert_width=256,
  num_experts=3, num_active_experts=2, num_shared_experts=0,
)  # fmt: skip


def _leaves(params):
  return {
    path: np.asarray(x)
    for path, x in frozen_format.leaves_by_path(params['params']).items()
  }


def _write(path, config=CONFIG, *, kind='F32', extra=(), fields=()):
  """Writes a model as llama.cpp's converter does; returns the params."""
  params = frozen_dirs.params(config)
  leaves = _leaves(params)
  writer = gguf.GGUFWriter(path, 'llama')
  writer.add_context_length(config.max_length)
  writer.add_embedding_length(config.model_width)
  writer.add_block_count(config.num_layers)
  writer.add_feed_forward_length(config.mlp_width or config.expert_width)
  if config.num_experts:
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_active_experts)
  writer.add_head_count(config.num_heads)
  writer.add_head_count_kv(config.num_kv_heads)
  writer.add_key_length(config.head_width)
  writer.add_value_length(config.head_width)
  writer.add_rope_dimension_count(config.head_width)
  writer.add_layer_norm_rms_eps(config.norm_epsilon)
  writer.add_rope_freq_base(config.rope_base)
  writer.add_vocab_size(config.vocab_size)
  for name, value in fields:
    writer.add_float32(name, value)
  family = 'mixtral' if config.num_experts else 'llama'
  for piece in names.pieces(family, config, {}):
    x = piece.layout.write(*(leaves[path] for path in piece.ours))
    x = np.ascontiguousarray(x)
    is_router = 'ffn_gate_inp' in piece.theirs
    if x.ndim == 1 or kind == 'F32' or is_router:
      writer.add_tensor(piece.theirs, x)
      continue
    quantization = gguf.GGMLQuantizationType[kind]
    writer.add_tensor(piece.theirs, _quantize(x, kind), raw_dtype=quantization)
  for name, x in extra:
    writer.add_tensor(name, x)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return params


def _quantize(x, kind):
  if kind in ('Q4_K', 'Q6_K'):
    # The library only reads these. Any bytes are some numbers; scales that are
    # not finite are none.
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
    rng = np.random.default_rng(x.shape[0])
    blocks = rng.integers(0, 256, (*x.shape[:-1], x.shape[-1] // 256, size))
    blocks = blocks.astype(np.uint8)
    scales = [slice(0, 2), slice(2, 4)] if kind == 'Q4_K' else [slice(-2, None)]
    for part in scales:
      blocks[..., part] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    return blocks.reshape(*x.shape[:-1], -1)
  return gguf.quants.quantize(x, gguf.GGMLQuantizationType[kind])


def test_a_model_is_read_as_it_was_written(tmp_path):
  params = _write(tmp_path / 'a.gguf')
  source, pieces = reading.open_file(tmp_path / 'a.gguf')
  assert source.config == CONFIG
  loaded = importing.load_params(source, 'float32', pieces=pieces)
  for path, x in _leaves(loaded).items():
    np.testing.assert_array_equal(x, _leaves(params)[path])


def test_rows_of_rotated_neighbours_are_brought_into_halves():
  """Two heads of four channels: pairs (0, 1), (2, 3) become (0, 2), (1, 3)."""
  order = layouts.halves_of_pairs(2, 0, 4)
  assert order == [0, 2, 1, 3, 4, 6, 5, 7]


# The largest error of a number by the largest of its block: half a step.
@pytest.mark.parametrize(
  ('kind', 'error'),
  [
    ('F16', 2**-11),
    ('BF16', 2**-8),
    ('Q8_0', 0.51 / 127),
    ('Q4_0', 0.13),
    ('Q4_1', 0.07),
  ],
)
def test_quantised_weights_are_near_what_was_written(tmp_path, kind, error):
  params = _write(tmp_path / 'a.gguf', kind=kind)
  source, pieces = reading.open_file(tmp_path / 'a.gguf')
  loaded = _leaves(importing.load_params(source, 'float32', pieces=pieces))
  for path, expected in _leaves(params).items():
    worst = np.abs(loaded[path] - expected).max()
    assert worst <= error * np.abs(expected).max()
    if expected.ndim == 2:
      assert worst > 0  # it was rounded


def _q4_k(block):
  """By ggml's definition: 8 times 32 numbers, scale and minimum of 6 bits."""
  d, least = np.frombuffer(block[:4].tobytes(), np.float16).astype(np.float64)
  packed, values = block[4:16].astype(int), block[16:]
  out = []
  for part in range(8):
    if part < 4:
      scale, minimum = packed[part] & 63, packed[part + 4] & 63
    else:
      scale = (packed[part + 4] & 15) | (packed[part - 4] >> 6 << 4)
      minimum = (packed[part + 4] >> 4) | (packed[part] >> 6 << 4)
    bytes_ = values[part // 2 * 32 :][:32]
    numbers = (bytes_ >> 4) if part % 2 else (bytes_ & 15)
    out.append(d * scale * numbers - least * minimum)
  return np.concatenate(out)


def _q6_k(block):
  """By ggml's definition: numbers of 6 bits, 16 of them with a scale."""
  low, high = block[:128].astype(int), block[128:192].astype(int)
  scales = block[192:208].view(np.int8).astype(int)
  d = np.frombuffer(block[208:].tobytes(), np.float16).astype(np.float64)[0]
  out = np.zeros(256)
  for half in range(2):
    for i in range(32):
      bits = high[half * 32 + i]
      at = half * 64 + i
      for k, nibble in enumerate(
        (low[at] & 15, low[at + 32] & 15, low[at] >> 4, low[at + 32] >> 4)
      ):
        number = (nibble | ((bits >> 2 * k) & 3) << 4) - 32
        scale = scales[half * 8 + k * 2 + i // 16]
        out[half * 128 + k * 32 + i] = d * scale * number
  return out


@pytest.mark.parametrize(('kind', 'read'), [('Q4_K', _q4_k), ('Q6_K', _q6_k)])
def test_blocks_of_256_numbers_are_read_by_their_definition(
  tmp_path, kind, read
):
  _write(tmp_path / 'a.gguf', kind=kind)
  source, pieces = reading.open_file(tmp_path / 'a.gguf')
  raw = _quantize(np.zeros((CONFIG.vocab_size, CONFIG.model_width)), kind)
  expected = np.stack([read(row) for row in raw[:5]])
  loaded = importing.load_params(source, 'float32', pieces=pieces)
  table = loaded['params']['embed']['embedding']
  # float32 products of two factors.
  np.testing.assert_allclose(table[:5], expected, rtol=1e-6, atol=1e-6)


def test_divisors_of_frequencies_are_taken_along(tmp_path):
  divisors = np.linspace(1, 8, 32, dtype=np.float32)
  _write(tmp_path / 'a.gguf', extra=[('rope_freqs.weight', divisors)])
  source, _ = reading.open_file(tmp_path / 'a.gguf')
  scaling = source.config.rope_scaling
  np.testing.assert_allclose(
    rope_scaling.stretched(1e4, 64, scaling),
    rope_scaling.frequencies(1e4, 64) / divisors,
  )
  assert scaling.long_divisors == scaling.short_divisors


def test_a_frozen_directory_is_made_with_a_tokenizer_from_elsewhere(tmp_path):
  _write(tmp_path / 'a.gguf')
  hf_files.llama3(tmp_path / 'tokenizer')
  result = reading.import_file(
    tmp_path / 'a.gguf',
    tmp_path / 'ours',
    tokenizer_source=str(tmp_path / 'tokenizer'),
  )
  assert result.manifest.origin['format'] == 'gguf'
  frozen = frozen_format.read(tmp_path / 'ours')
  assert frozen.config == dataclasses.replace(CONFIG, spare_ids=((336, 400),))
  with pytest.raises(ValueError, match='--tokenizer: got none, expected a d'):
    reading.import_file(
      tmp_path / 'a.gguf', tmp_path / 'b', tokenizer_source=''
    )


def test_what_cannot_be_read_is_named(tmp_path):
  path = tmp_path / 'a.gguf'
  _write(path, fields=[('llama.logit_scale', 2.0)])
  with pytest.raises(ValueError, match='got llama.logit_scale, expected on'):
    reading.open_file(path)
  _write(path, extra=[('blk.0.attn_q.bias', np.ones(256, np.float32))])
  source, pieces = reading.open_file(path)
  with pytest.raises(ValueError, match='got blk.0.attn_q.bias, expected only'):
    importing.load_params(source, 'float32', pieces=pieces)
  _write(path)
  path.write_bytes(path.read_bytes()[:5000])
  with pytest.raises(ValueError, match='copy it again: it is truncated'):
    reading.open_file(path)
  writer = gguf.GGUFWriter(path, 'mamba')
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  with pytest.raises(ValueError, match="of architecture 'mamba', expected on"):
    reading.open_file(path)
  with pytest.raises(FileNotFoundError, match='got no such file, expected a'):
    reading.open_file(tmp_path / 'b.gguf')


@pytest.mark.parametrize(
  ('name', 'neutral', 'value'),
  [
    ('attention.causal', True, False),
    ('expert_group_count', 1, 2),
    ('expert_group_used_count', 0, 4),
  ],
)
def test_a_field_with_an_effect_is_refused(tmp_path, name, neutral, value):
  _write(tmp_path / 'a.gguf')
  header = header_lib.read(tmp_path / 'a.gguf')

  def read(value):
    fields = {**header.fields, f'llama.{name}': value}
    return families.read(dataclasses.replace(header, fields=fields))

  assert read(neutral) == families.read(header)
  with pytest.raises(ValueError, match=f'got llama.{name} = {value}, expected'):
    read(value)
