"""Reading and writing of safetensors, and damaged files."""

import json
import pathlib

import ml_dtypes
import numpy as np
import pytest

from frozen.huggingface import safetensors_files as files


def _write(directory, *, dtype=np.float32, shard_bytes=10**9):
  rng = np.random.default_rng(0)
  tensors = {
    name: rng.normal(size=shape).astype(dtype)
    for name, shape in (('a', (3, 4)), ('b', (5,)), ('c', (2, 3, 2)))
  }
  directory.mkdir(exist_ok=True)
  files.write_directory(
    directory,
    {name: x.shape for name, x in tensors.items()},
    dtype,
    iter(tensors.items()),
    shard_bytes=shard_bytes,
  )
  return tensors


@pytest.mark.parametrize('dtype', ['float32', 'float16', ml_dtypes.bfloat16])
@pytest.mark.parametrize('shard_bytes', [10**9, 30])
def test_what_is_written_is_read(tmp_path, dtype, shard_bytes):
  tensors = _write(tmp_path, dtype=dtype, shard_bytes=shard_bytes)
  assert (tmp_path / files.INDEX).exists() == (shard_bytes == 30)
  found = files.open_directory(tmp_path)
  assert found.keys() == tensors.keys()
  for name, x in tensors.items():
    np.testing.assert_array_equal(found[name].whole(), x)
    assert found[name].whole().dtype == x.dtype
  np.testing.assert_array_equal(found['a'].rows(1, 3), tensors['a'][1:3])


def test_the_library_reads_what_is_written_and_the_reverse(tmp_path):
  numpy = pytest.importorskip('safetensors.numpy', reason='not installed')
  tensors = _write(tmp_path)
  loaded = numpy.load_file(tmp_path / files.SINGLE)
  for name, x in tensors.items():
    np.testing.assert_array_equal(loaded[name], x)
  numpy.save_file(tensors, tmp_path / 'theirs.safetensors', {'format': 'pt'})
  found = files.read_header(tmp_path / 'theirs.safetensors')
  for name, x in tensors.items():
    np.testing.assert_array_equal(found[name].whole(), x)


def _edit_header(path, change):
  data = path.read_bytes()
  length = int.from_bytes(data[:8], 'little')
  header = json.loads(data[8 : 8 + length])
  change(header)
  text = json.dumps(header).encode()
  path.write_bytes(len(text).to_bytes(8, 'little') + text + data[8 + length :])


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda h: h['a'].update(shape=[3, 5]), r'got a as F32\[3, 5\] in bytes 0'),
    (lambda h: h['a'].update(dtype='F16'), r'got a as F16\[3, 4\] in bytes 0'),
    (lambda h: h['b'].update(dtype='F12'), "got b of dtype 'F12', expected on"),
    (lambda h: h['b'].update(data_offsets=[0, 20]), 'where the tensor before'),
    (lambda h: h.pop('c'), 'bytes, expected .* by its header'),
    (lambda h: h['a'].update(shape=[-3, -4]), 'expected integers'),
    (lambda h: h['a'].pop('shape'), 'got a header that cannot be read'),
  ],
)
def test_a_header_that_lies_is_found_out(tmp_path, change, message):
  _write(tmp_path)
  _edit_header(tmp_path / files.SINGLE, change)
  with pytest.raises(ValueError, match=message):
    files.open_directory(tmp_path)


@pytest.mark.parametrize('kept', [4, 30, -1])
def test_a_truncated_file_is_found_out(tmp_path, kept):
  _write(tmp_path)
  path = tmp_path / files.SINGLE
  path.write_bytes(path.read_bytes()[:kept])
  with pytest.raises(ValueError, match='truncated'):
    files.open_directory(tmp_path)


def test_a_missing_shard_and_an_index_of_another_model(tmp_path):
  _write(tmp_path, shard_bytes=60)
  shard = sorted(tmp_path.glob('model-*'))[1]
  index = json.loads((tmp_path / files.INDEX).read_text())
  index['weight_map']['z'] = shard.name
  (tmp_path / files.INDEX).write_text(json.dumps(index))
  with pytest.raises(ValueError, match='got z in other shards, or not in both'):
    files.open_directory(tmp_path)
  shard.unlink()
  with pytest.raises(FileNotFoundError, match=f'{shard.name}: got no such'):
    files.open_directory(tmp_path)
  (tmp_path / files.INDEX).write_text('{"weight_map": {"a": 1}}')
  with pytest.raises(ValueError, match='got a file without a weight_map'):
    files.open_directory(tmp_path)
  (tmp_path / files.INDEX).write_text('{"weight_map": {"a": "../a.st"}}')
  with pytest.raises(ValueError, match='without a path'):
    files.open_directory(tmp_path)


def test_other_kinds_of_weights_are_named(tmp_path: pathlib.Path):
  with pytest.raises(FileNotFoundError, match='got no weights, expected model'):
    files.open_directory(tmp_path)
  (tmp_path / 'pytorch_model.bin').touch()
  with pytest.raises(FileNotFoundError, match='got pytorch_model.bin alone'):
    files.open_directory(tmp_path)
