"""Curves over seeds, read from the files of runs with rollouts."""

import json

import numpy as np
import pytest

from studies import reinforcement


def _write(workdir, rewards, accuracies):
  """Writes the files of a run that evaluates at its start and every 2 steps."""
  workdir.mkdir()
  lines = [
    {'kind': 'rollout', 'step': step, 'reward': reward}
    for step, reward in enumerate(rewards)
  ] + [
    {
      'kind': 'eval',
      'step': 2 * i,
      'reward/accuracy': accuracy,
      'reward/accuracy_stderr': 0.02,
    }
    for i, accuracy in enumerate(accuracies)
  ]
  text = '\n'.join(json.dumps(line) for line in lines)
  (workdir / 'metrics.jsonl').write_text(text + '\n')
  attempts = [
    {
      'start': 100.0 * i,
      'first_step': 2 * i,
      'step': 2 * i + 2,
      'seconds': {'steps': 8.0, 'rollout': 2.0},
      'marks': [],
    }
    for i in range(2)
  ]
  text = '\n'.join(json.dumps(attempt) for attempt in attempts)
  (workdir / 'goodput.jsonl').write_text(text + '\n')


@pytest.fixture
def runs(tmp_path):
  _write(tmp_path / 'a', [0.2, 0.4, 0.6, 0.8], [0.3, 0.5, 0.9])
  _write(tmp_path / 'b', [0.0, 0.2, 0.4, 0.6], [0.2, 0.4, 0.7])
  return [reinforcement.read(tmp_path / name) for name in 'ab']


def test_a_run_is_read_from_its_files(runs):
  assert runs[0].first == (0.3, 0.02)
  assert runs[0].last == (0.9, 0.02)
  assert runs[0].seconds == 20.0  # of both starts
  np.testing.assert_array_equal(runs[0].steps_R, [0, 1, 2, 3])
  line = reinforcement.line_of(0, runs[0], 12.0)
  assert '30.0% +- 2.0% -> 90.0% +- 2.0%; seconds: 12 before, ' in line


def test_curves_have_the_mean_and_the_range_of_seeds(runs):
  reward, accuracy = reinforcement.panels(runs, 'grpo')
  # Four rollout batches are one point.
  label = 'grpo: mean and range of 2 seeds'
  assert reward.lines[label].y == pytest.approx([0.4])
  assert reward.lines[label].x == [1.5]
  found = accuracy.lines[label]
  assert found.x == [0, 2, 4]
  assert found.y == pytest.approx([0.25, 0.45, 0.8])
  assert (found.low, found.high) == ([0.2, 0.4, 0.7], [0.3, 0.5, 0.9])
