"""The end of a benchmark: what is printed, written and refused."""

import json
import types

from absl import flags
import pytest

from benchmarks.common import entry, timing


@pytest.fixture(autouse=True)
def out(monkeypatch, tmp_path):
  """The file that --out names."""
  path = tmp_path / 'result.json'
  monkeypatch.setattr(flags, 'FLAGS', types.SimpleNamespace(out=str(path)))
  monkeypatch.setattr(timing, 'busy_note', lambda: 'note: busy')
  return path


def test_each_result_is_printed_before_the_next_is_measured(out, capsys):
  def measure(args):
    assert args.out == str(out)
    yield {'speed': 1}
    assert capsys.readouterr() == ('speed 1\n', 'note: busy\n')
    yield {'speed': 2}

  entry.run(measure, lambda r: f'speed {r["speed"]}', is_list=True)
  assert capsys.readouterr().out == 'speed 2\n'
  assert json.loads(out.read_text()) == {
    'results': [{'speed': 1}, {'speed': 2}]
  }


def test_a_single_result_is_the_file(out):
  entry.run(lambda _: [{'speed': 1}], str)
  assert json.loads(out.read_text()) == {'speed': 1}


def test_a_refusal_is_one_line_and_writes_nothing(out):
  def measure(_):
    raise ValueError('--peer: got none')
    yield

  with pytest.raises(SystemExit, match='^error: --peer: got none$'):
    entry.run(measure, str)
  assert not out.exists()
