"""The benchmark of the first step, at the size of a CPU."""

import pytest

from benchmarks import first_step


def test_a_second_start_finds_its_programs(monkeypatch):
  started = []

  def in_a_process(directory, variant):
    started.append((directory, variant))
    return 4.0 / len(started)

  monkeypatch.setattr(first_step, '_in_a_process', in_a_process)
  result = first_step.run('cpu')
  assert started[0] == started[1]
  assert (result['cold_s'], result['cached_s']) == (4.0, 2.0)
  lines = [line.split() for line in first_step.report(result).splitlines()]
  assert lines[2:] == [['cold', '4.0'], ['cached', '2.0']]


@pytest.mark.slow
def test_a_process_takes_a_step_and_keeps_its_programs(tmp_path):
  assert first_step._in_a_process(str(tmp_path), 'cpu') > 0
  assert list(tmp_path.glob('jit_train_step-*-cache'))
