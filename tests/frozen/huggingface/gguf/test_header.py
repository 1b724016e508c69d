"""Headers of GGUF files: what is read, and what is refused."""

import random
import struct
import tracemalloc

import numpy as np
import pytest

from frozen.huggingface.gguf import header as header_lib, refusals

_UINT32, _FLOAT32, _BOOL, _STRING, _ARRAY, _UINT64 = 4, 6, 7, 8, 9, 10


def _text(text):
  data = text.encode() if isinstance(text, str) else text
  return struct.pack('<Q', len(data)) + data


def _field(name, kind, data):
  return _text(name) + struct.pack('<I', kind) + data


def _array(name, kind, items):
  start = struct.pack('<IQ', kind, len(items))
  return _field(name, _ARRAY, start + b''.join(items))


def _tensor(name, shape, code, offset):
  sizes = struct.pack(f'<{len(shape)}Q', *shape[::-1])
  start = _text(name) + struct.pack('<I', len(shape)) + sizes
  return start + struct.pack('<IQ', code, offset)


_ARCHITECTURE = _field('general.architecture', _STRING, _text('llama'))


def _file(
  path, fields=(_ARCHITECTURE,), tensors=(), data=b'', *, version=3,
  num_fields=None, num_tensors=None,
):  # fmt: skip
  counts = (
    len(tensors) if num_tensors is None else num_tensors,
    len(fields) if num_fields is None else num_fields,
  )
  start = b'GGUF' + struct.pack('<IQQ', version, *counts)
  start += b''.join((*fields, *tensors))
  start += b'\0' * (-len(start) % 32)
  path.write_bytes(start + data)
  return path


def test_every_type_of_a_field_is_read(tmp_path):
  fields = [
    _ARCHITECTURE,
    *(
      _field(f'n.{code}', kind, struct.pack(f'<{code}', value))
      for kind, code, value in (
        (0, 'B', 255), (1, 'b', -1), (2, 'H', 65535), (3, 'h', -2), (4, 'I', 7),
        (5, 'i', -7), (6, 'f', 0.5), (7, '?', True), (10, 'Q', 2**60),
        (11, 'q', -(2**60)), (12, 'd', 0.1),
      )
    ),
    _array('strings', _STRING, [_text('a'), _text(''), _text('\u65e5')]),
    _array('numbers', _FLOAT32, [struct.pack('<f', x) for x in (1, 2)]),
    _array(
      'nested', _ARRAY,
      [struct.pack('<IQ', _UINT32, 2) + struct.pack('<II', 3, 4)],
    ),
  ]  # fmt: skip
  found = header_lib.read(_file(tmp_path / 'a.gguf', fields)).fields
  assert [found[f'n.{code}'] for code in 'BbHhIif?Qqd'] == [
    255, -1, 65535, -2, 7, -7, 0.5, True, 2**60, -(2**60), 0.1,
  ]  # fmt: skip
  assert found['strings'] == ['a', '', '\u65e5']
  np.testing.assert_array_equal(found['numbers'], [1, 2])
  assert [x.tolist() for x in found['nested']] == [[3, 4]]


def test_codes_and_sizes_of_kinds_are_those_of_the_library():
  gguf = pytest.importorskip('gguf', reason='requirements-hub.txt')
  for kind, (code, numbers, num_bytes) in header_lib.KINDS.items():
    theirs = gguf.GGMLQuantizationType(code)
    assert theirs.name == kind
    assert gguf.GGML_QUANT_SIZES[theirs] == (numbers, num_bytes)
  readable = {kind.name for kind in gguf.quants._type_traits}
  assert readable <= header_lib.KINDS.keys()


def test_tensors_lie_where_the_file_says(tmp_path):
  tensors = [
    _tensor('late', (2, 64), 8, 32),  # Q8_0
    _tensor('early', (3,), 0, 0),
  ]
  path = _file(tmp_path / 'a.gguf', tensors=tensors, data=b'\0' * (32 + 136))
  header = header_lib.read(path)
  found = header_lib.entries(header)
  assert list(found) == ['early', 'late']
  late = found['late']
  assert (late.kind, late.shape, late.num_bytes) == ('Q8_0', (2, 64), 136)
  assert late.row_bytes == 68
  assert late.start + late.num_bytes == path.stat().st_size


_HUGE = 2**63
# Bytes. The files have less than a page; sizes that they claim have 8 EiB.
# Other threads of the process are counted, too.
_SMALL = 2**24
_BAD_STRING = struct.pack('<Q', _HUGE)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'version': 1}, 'version 1 of GGUF, expected one of'),
    ({'version': 3 << 24}, 'the file is big-endian'),
    ({'num_fields': _HUGE}, f'got {_HUGE} fields in a file of'),
    ({'num_tensors': _HUGE}, f'got {_HUGE} tensors in a file of'),
    ({'num_fields': 2}, 'copy it again'),
    ({'fields': [_ARCHITECTURE] * 2}, "'general.architecture' twice"),
    ({'fields': [_field('a', _STRING, _BAD_STRING)]}, 'bytes wanted at'),
    ({'fields': [_text(b'\xff')]}, 'not UTF-8'),
    ({'fields': [_BAD_STRING]}, f'a name of {_HUGE} bytes'),
    ({'fields': [_field('a', 99, b'')]}, 'got a of type 99'),
    (
      {'fields': [_field('a', _ARRAY, struct.pack('<IQ', _FLOAT32, _HUGE))]},
      f'got {_HUGE} numbers in a in a file of',
    ),
    (
      {'fields': [_field('a', _ARRAY, struct.pack('<IQ', _STRING, _HUGE))]},
      f'got {_HUGE} strings in a in a file of',
    ),
    (
      {'fields': [_array('a', _STRING, [_text('b'), _BAD_STRING])]},
      'past byte',
    ),
    (
      {'fields': [_array('a', _STRING, [_text(b'\xff')])]},
      r'a\[0\] with bytes',
    ),
    (
      {'fields': [_field('a', _ARRAY, struct.pack('<IQ', _ARRAY, 1) * 9)]},
      'of type 9, expected',
    ),
    ({'tensors': [_tensor('t', (1,) * 5, 0, 0)]}, 't with 5 axes'),
    ({'tensors': [_tensor('t', (1,), 0, 0)] * 2}, "'t' twice"),
    ({'tensors': [_tensor('t', (1,), 77, 0)]}, 'got t of kind 77'),
    (
      {'tensors': [_tensor('t', (_HUGE, 4), 0, 0)]},
      'than a file of .* can hold',
    ),
    ({'tensors': [_tensor('t', (0, 4), 0, 0)]}, 'shape .0, 4. in F32'),
    ({'tensors': [_tensor('t', (33,), 8, 0)]}, 'rows of a multiple of 32'),
    ({'tensors': [_tensor('t', (1,), 0, 8)]}, 'offset 8, expected a multiple'),
    ({'tensors': [_tensor('t', (1,), 0, _HUGE)]}, 'length of the file'),
    ({'tensors': [_tensor('t', (40,), 0, 0)]}, 'it is truncated'),
    (
      {'tensors': [_tensor('t', (16,), 0, 0), _tensor('u', (1,), 0, 32)]},
      'got u inside the bytes of t',
    ),
    (
      {'fields': [_field('general.alignment', _UINT32, struct.pack('<I', 24))]},
      'general.alignment = 24, expected a power of two',
    ),
    (
      {
        'fields': [
          _field('general.alignment', _UINT64, struct.pack('<Q', _HUGE))
        ]
      },
      f'general.alignment = {_HUGE}',
    ),
  ],
)
def test_a_damaged_file_is_refused_without_memory(tmp_path, changes, message):
  path = _file(tmp_path / 'a.gguf', data=b'\0' * 64, **changes)
  tracemalloc.start()
  with pytest.raises(ValueError, match=message):
    header_lib.entries(header_lib.read(path))
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < _SMALL


@pytest.mark.parametrize('data', [b'', b'GGUF', b'PK\3\4' + b'\0' * 60])
def test_another_format_is_refused(tmp_path, data):
  path = tmp_path / 'a.gguf'
  path.write_bytes(data)
  with pytest.raises(ValueError, match='of another format'):
    header_lib.read(path)


def _problem(path):
  """Returns why a file is refused; '' if it is not."""
  try:
    header_lib.entries(header_lib.read(path))
  except ValueError as error:
    return str(error)
  return ''


def test_any_change_of_bytes_gives_a_header_or_a_clear_error(tmp_path):
  """Bytes are changed, cut out and cut off, at places drawn with a seed."""
  fields = [
    _ARCHITECTURE,
    _field('llama.block_count', _UINT32, struct.pack('<I', 2)),
    _array('tokenizer.ggml.tokens', _STRING, [_text('ab')] * 9),
    _array('tokenizer.ggml.scores', _FLOAT32, [struct.pack('<f', 1)] * 9),
  ]
  tensors = [_tensor('a', (4, 32), 8, 0), _tensor('b', (5,), 0, 160)]
  whole = _file(
    tmp_path / 'whole.gguf', fields, tensors, b'\1' * 192
  ).read_bytes()
  rng = random.Random(0)
  path = tmp_path / 'a.gguf'
  refused = 0
  for _ in range(1500):
    data = bytearray(whole)
    for _ in range(rng.choice((1, 1, 2, 8))):
      data[rng.randrange(len(data))] = rng.choice((0, 1, 8, 127, 255))
    if rng.random() < 0.3:
      del data[rng.randrange(len(data)) :]
    if rng.random() < 0.1 and len(data) > 9:
      at = rng.randrange(len(data) - 8)
      del data[at : at + rng.randrange(1, 8)]
    path.write_bytes(data)
    tracemalloc.start()
    problem = _problem(path)
    assert not problem or ', expected ' in problem
    refused += bool(problem)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < _SMALL
  assert 500 < refused < 1500


def test_the_architecture_comes_first_then_the_tokenizer_then_tensors(
  tmp_path,
):
  """A file with three reasons, of which one after the other is removed."""
  path = tmp_path / 'a.gguf'
  sizes = {
    'context_length': 8, 'embedding_length': 32, 'block_count': 1,
    'feed_forward_length': 32, 'attention.head_count': 1,
  }  # fmt: skip
  model = [
    *(
      _field(f'llama.{name}', _UINT32, struct.pack('<I', size))
      for name, size in sizes.items()
    ),
    _field(
      'llama.attention.layer_norm_rms_epsilon', _FLOAT32, struct.pack('<f', 1)
    ),
  ]
  unknown = _field('general.architecture', _STRING, _text('mamba'))
  kind = _field('tokenizer.ggml.model', _STRING, _text('t5'))
  tensor = _tensor('token_embd.weight', (8, 32), 77, 0)
  for fields, has_tokenizer, message in (
    ([unknown, kind], False, "architecture 'mamba', expected one of llama"),
    ([_ARCHITECTURE, *model, kind], False, "model = 't5', expected gpt2 or ll"),
    ([_ARCHITECTURE, *model, kind], True, 'token_embd.weight of kind 77'),
  ):
    _file(path, fields, [tensor])
    with pytest.raises(ValueError, match=message):
      refusals.check(path, has_tokenizer=has_tokenizer)
