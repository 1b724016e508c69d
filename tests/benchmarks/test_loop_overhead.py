"""The benchmark of the loop: its report, and a short run."""

import dataclasses

import pytest

from benchmarks import loop_overhead

RESULT = {
  'model': 'quickstart',
  'device': 'cpu',
  'num_params': 2_016_960,
  'checkpoints_per_turn': 1,
  'log_every_steps': 25,
  'seconds_per_turn': {'bare': [10.0, 12.0, 11.0], 'loop': [10.2, 12.3, 11.0]},
  'overhead': 0.02,
  'host_seconds_per_step': {
    'steps': 1e-4,
    'input': 5e-4,
    'report': 2e-4,
    'save': 0.0,
  },
}


def test_the_report_names_the_ratio_and_the_parts():
  lines = loop_overhead.report(RESULT).splitlines()
  assert lines[0].startswith('Loop, quickstart: 2.02M parameters, 1 checkpoint')
  figures = {
    line.rsplit(maxsplit=1)[0].strip(): line.split()[-1] for line in lines
  }
  assert figures['bare step'] == '55,000'
  assert figures['loop'] == '55,000'
  assert figures['overhead:'] == '2.0%'
  assert figures['next batch, and sending it'] == '500'
  assert figures['all'] == '800'


def test_the_model_of_the_promise_is_the_quickstart():
  made = loop_overhead.experiments()
  assert made['quickstart'].checkpoint.every_steps == loop_overhead._STEPS
  for experiment in made.values():
    experiment.validate()


@pytest.mark.slow
def test_both_sides_take_turns(monkeypatch):
  monkeypatch.setattr(loop_overhead, '_STEPS', 4)
  tiny = loop_overhead.experiments()['tiny']
  tiny.log_every_steps = 2
  tiny.checkpoint = dataclasses.replace(tiny.checkpoint, every_steps=4)
  result = loop_overhead.measure('tiny', tiny, rounds=2)
  assert result['overhead'] > -1
  assert all(len(s) == 2 for s in result['seconds_per_turn'].values())
  assert all(s > 0 for s in result['host_seconds_per_step'].values())
  assert 'overhead' in loop_overhead.report(result)
