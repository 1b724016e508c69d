"""The documents of the standard library, and their splits."""

import collections
import pathlib
import platform
import sysconfig

import pytest

from data import sources
from data.builders import python_stdlib


def _write(root, names, content=b'pass\n'):
  for name in names:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def test_tests_and_what_is_installed_are_left_out(tmp_path):
  library = ['ast.py', 'json/decoder.py', 'unittest/case.py']
  _write(tmp_path, library)
  _write(
    tmp_path,
    [
      'test/test_ast.py',
      'unittest/test/test_case.py',
      'lib2to3/tests/data/bom.py',
      'idlelib/idle_test/test_editor.py',
      'site-packages/numpy/core.py',
      'dist-packages/apt.py',
      '_sysconfigdata__linux_x86_64-linux-gnu.py',
      'config-3.11-x86_64-linux-gnu/python-config.py',
      'ast.pyc',
      '__pycache__/ast.cpython-311.pyc',
    ],
  )
  assert [key for key, _ in python_stdlib.documents_under(tmp_path)] == library


def test_files_come_byte_for_byte_or_not_at_all(tmp_path, caplog):
  _write(tmp_path, ['a.py'], 'x = "é"\r\n\ty\n'.encode())
  _write(tmp_path, ['b.py'], b'# -*- coding: latin-1 -*-\nx = "\xe9"\n')
  with caplog.at_level('WARNING'):
    documents = dict(python_stdlib.documents_under(tmp_path))
  assert documents == {'a.py': 'x = "é"\r\n\ty\n'}
  assert 'left out' in caplog.text
  assert 'b.py, it is not UTF-8' in caplog.text


def test_split_depends_on_the_path_alone():
  # From sha256(path): changing these moves documents between train and test.
  assert python_stdlib.split_of('ast.py') == 'train'
  names = [f'package/module_{i}.py' for i in range(4000)]
  counts = collections.Counter(map(python_stdlib.split_of, names))
  # Expected 200 +- 14 in each small split: five sigma, and a fixed hash.
  assert abs(counts['validation'] - 200) < 70
  assert abs(counts['test'] - 200) < 70
  assert counts.total() == 4000


def test_copies_of_each_other_are_on_one_side():
  maps = [f'encodings/cp{i}.py' for i in range(400)]
  assert set(map(python_stdlib.split_of, maps)) == {'train'}


@pytest.mark.slow
def test_splits_of_the_real_library(data_dir):
  documents = {}
  for split in ('train', 'validation', 'test'):
    source = sources.python_stdlib(split=split, data_dir=str(data_dir))
    for i in range(len(source)):
      document = source[i]
      assert python_stdlib.split_of(document['id']) == split
      documents[document['id']] = document['text']
  root = pathlib.Path(sysconfig.get_path('stdlib'))
  assert documents == dict(python_stdlib.documents_under(root))
  assert len(documents) > 400
  assert documents['ast.py'] == (root / 'ast.py').read_bytes().decode()


def test_split_expressions(data_dir):
  def size(split):
    return len(sources.python_stdlib(split=split, data_dir=str(data_dir)))

  assert size('validation+test') == size('validation') + size('test')
  assert size('all') == size('train') + size('validation+test')
  assert size('train[:10]') == 10


def test_missing_split_lists_those_available(data_dir):
  with pytest.raises(ValueError, match='available: test, train, validation$'):
    sources.python_stdlib(split='dev', data_dir=str(data_dir))


def test_interpreters_do_not_share_data(data_dir):
  version = f'cpython_{platform.python_version()}'
  assert (data_dir / 'python_stdlib' / version / '1.1.0').is_dir()


def test_a_path_is_refused():
  with pytest.raises(ValueError, match="got path 'x', expected none"):
    sources.python_stdlib('x')


def test_an_interpreter_without_source(tmp_path, monkeypatch):
  empty = tmp_path / 'lib'
  empty.mkdir()
  monkeypatch.setattr(sysconfig, 'get_path', lambda name: str(empty))
  with pytest.raises(FileNotFoundError, match=r'no \.py files in .*lib'):
    sources.python_stdlib(data_dir=str(tmp_path / 'data'))
  assert not list((tmp_path / 'data').rglob('dataset_info.json'))
