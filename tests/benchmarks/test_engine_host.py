"""The host's time per decoded step, with programs that compute nothing."""

import pytest

from benchmarks import engine_host


@pytest.mark.slow
@pytest.mark.parametrize('decode_steps', [1, 8])
def test_all_sequences_are_answered_without_a_device(decode_steps):
  engine = engine_host.engine_of(3, decode_steps)
  assert engine_host.step_ms(engine) > 0
  value = engine.metrics.value
  assert value('finished_total', reason='length') == 3
  assert value('sampled_tokens_total') == 3 * 200
  num_dispatches = value('engine_dispatches_total')
  assert num_dispatches < 2 * value('engine_steps_total') / decode_steps + 9


def test_the_report_shows_the_goal():
  result = {'sequences': 2, 'goal_ms': 0.3, 'step_ms': {1: 0.5, 8: 0.125}}
  first, second = engine_host.report(result).splitlines()
  assert first.startswith('  1 decode steps per dispatch: 0.500 ms of the host')
  assert second.startswith('  8 decode steps per dispatch: 0.125 ms of the')
  assert second.endswith('step of 2 sequences (goal 0.3)')
