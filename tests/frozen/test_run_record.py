"""run.json: both versions are read, any other is refused in one line."""

import json

import pytest

from frozen import run_record


def _write(workdir, **fields):
  (workdir / 'run.json').write_text(json.dumps(fields))


def test_this_version_and_the_one_before_are_read(tmp_path):
  _write(tmp_path, experiment='old')
  assert run_record.read(tmp_path) == {'experiment': 'old'}
  _write(tmp_path, experiment='new', format_version=2)
  assert run_record.read(tmp_path)['experiment'] == 'new'


def test_a_later_version_is_refused(tmp_path):
  _write(tmp_path, experiment='new', format_version=3)
  with pytest.raises(
    ValueError,
    match=r'run.json: got format version 3, expected one of 1, 2; use the code'
    ' that wrote it, or another --workdir',
  ) as caught:
    run_record.read(tmp_path)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize('text', ['', '{"experiment": "ti', 'null', '[1]'])
def test_a_damaged_record_is_named(tmp_path, text):
  (tmp_path / 'run.json').write_text(text)
  with pytest.raises(ValueError, match='run.json: got a file that cannot be'):
    run_record.read(tmp_path)
