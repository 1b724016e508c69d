"""The table of the GPU: goals, failures, and a machine without one."""

import json
import sys

import pytest

from benchmarks import gpu_table
from hardware import gpu_environment
from tests.gpu import run as gpu_tests

RESULT = {
  'results': [
    {'shape': '124m', 'ours': {'mfu': 0.41}, 'ratio': 1.2},
    {'shape': '1b', 'ours': {'mfu': 0.5}, 'ratio': 1.2},
  ]
}


def _part(code, **fields):
  return gpu_table.Part(
    **{
      'name': 'a part',
      'command': ('-c', code),
      'rows': gpu_table.train_rows,
      'seconds': 60,
    }
    | fields
  )


def test_rows_say_whether_goals_are_met():
  rows = gpu_table.train_rows(RESULT)
  assert [(row.unit, row.is_met) for row in rows] == [
    ('%', True),
    ('x', False),
    ('%', False),
  ]
  rows = gpu_table.first_step_rows({'cold_s': 9.0, 'cached_s': 3.5})
  assert [row.is_met for row in rows] == [True, False]


def test_rows_of_decoding_have_the_goals_of_each_batch():
  batches = {
    size: {'tokens_per_s': rate, 'bandwidth': share, 'ready_s': 16.0}
    for size, rate, share in (('1', 900, 0.72), ('8', 1, 0), ('32', 24e3, 0.4))
  }
  rows = gpu_table.decode_rows({'batches': batches})
  assert [row.is_met for row in rows] == [True, False, False]
  (row,) = gpu_table.host_rows({'goal_ms': 0.3, 'step_ms': {'1': 1, '8': 0.2}})
  assert (row.value, row.is_met) == (0.2, True)
  assert sum(part.seconds for part in gpu_table.PARTS) <= gpu_table.SECONDS


def test_parts_run_in_the_environment_of_the_gpu():
  code = (
    'import json, os, sys\n'
    'out = sys.argv[1].removeprefix("--out=")\n'
    'json.dump(dict(os.environ), open(out, "w"))\n'
  )
  found = gpu_table.measure(_part(code), 60)['result']
  assert gpu_environment.BENCHMARKS.items() <= found.items()


@pytest.mark.parametrize(
  ('code', 'seconds', 'expected'),
  [
    ('raise SystemExit(3)', 60, 'exited with status 3'),
    ('pass', 60, 'exited with status 0'),  # and wrote nothing
    ('import time; time.sleep(60)', 0.5, 'not done after 0 s'),
  ],
)
def test_a_part_that_fails_is_a_row(code, seconds, expected):
  part = _part(code)
  measured = gpu_table.measure(part, seconds)
  assert measured == {'failure': expected}
  text = gpu_table.report([part], {part.name: measured})
  assert expected in text
  assert 'FAILED' in text


def test_the_table_is_printed_and_written(monkeypatch, tmp_path, capsys):
  part = _part('')
  monkeypatch.setattr(gpu_environment, 'missing', lambda: '')
  monkeypatch.setattr(gpu_table, 'PARTS', (part,))
  monkeypatch.setattr(gpu_table, 'RESULTS', tmp_path)
  monkeypatch.setattr(gpu_table, '_gpu_name', lambda: 'nvidia-h100')
  monkeypatch.setattr(gpu_table, 'measure', lambda *_: {'result': RESULT})
  monkeypatch.setattr(gpu_table.flags, 'FLAGS', _Flags([]))
  gpu_table.main([])
  printed = capsys.readouterr().out
  assert 'train GPT-2 124M, 16 x 1024: MFU' in printed
  assert 'at least 40 %' in printed
  record = json.loads((tmp_path / 'nvidia-h100.json').read_text())
  assert record['parts'] == {part.name: {'result': RESULT}}
  monkeypatch.setattr(gpu_table.flags, 'FLAGS', _Flags(['another']))
  with pytest.raises(SystemExit, match='got another, expected some of a part'):
    gpu_table.main([])


class _Flags:
  def __init__(self, parts):
    self.parts = parts


def test_all_parts_fit_the_time():
  assert sum(part.seconds for part in gpu_table.PARTS) <= gpu_table.SECONDS
  names = [part.name for part in gpu_table.PARTS]
  assert len(set(names)) == len(names)


def test_a_machine_without_a_gpu_says_so(monkeypatch, capsys):
  monkeypatch.setattr(gpu_environment.glob, 'glob', lambda _: [])
  with pytest.raises(SystemExit, match='got no NVIDIA GPU .* expected one'):
    gpu_table.main([])
  assert gpu_tests.main([]) == 1
  assert 'got no NVIDIA GPU' in capsys.readouterr().err


def test_the_tests_run_with_full_precision(monkeypatch):
  monkeypatch.setattr(gpu_environment, 'missing', lambda: '')
  ran = []

  class Done:
    returncode = 0

  def run(command, env, check):
    ran.append((command, env))
    return Done

  monkeypatch.setattr(gpu_tests.subprocess, 'run', run)
  assert gpu_tests.main([]) == 0
  ((command, env),) = ran
  assert command[:4] == [sys.executable, '-m', 'pytest', '-m']
  assert command[4] == 'gpu and not slow'
  assert env['JAX_DEFAULT_MATMUL_PRECISION'] == 'highest'
