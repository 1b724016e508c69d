"""The study of the gap between sampler and trainer."""

import dataclasses
import json

import pytest

from experiments import grpo
from frozen import format as frozen_format
from studies import sampler_gap
from studies.common import quiet_run


@pytest.fixture(scope='module')
def policy(tmp_path_factory):
  """The frozen directory of a model that was trained for one step."""
  place = tmp_path_factory.mktemp('policy')
  made = quiet_run.shortened(grpo.get_config('sft'), 1)
  made.data.data_dir = str(place / 'data')
  assert not quiet_run.run(made, place / 'run').exit_code
  return place / 'run' / 'frozen'


@pytest.mark.slow
def test_each_way_differs_in_its_numerics_alone(policy):
  for way in sampler_gap.WAYS.values():
    made = sampler_gap.experiment_of(way, str(policy))
    made.validate()
    assert made.rollouts.numerics == way.numerics
    assert (made.objective.correction.level != 'none') == way.is_corrected
    assert made.num_steps == 50 * 2  # two steps on each rollout batch


@pytest.mark.slow
def test_a_run_is_read(policy, tmp_path):
  assert frozen_format.open_directory(policy).manifest
  found = {}
  for name in ('float32', 'float32 invariant'):
    made = sampler_gap.experiment_of(
      sampler_gap.WAYS[name], str(policy), steps=2
    )
    made = dataclasses.replace(
      made,
      rollouts=dataclasses.replace(
        made.rollouts, num_prompts=2, max_tokens=8, eval_prompts=4
      ),
      data=dataclasses.replace(
        made.data, batch_size=8, data_dir=str(tmp_path / 'data')
      ),
    )
    assert not quiet_run.run(made, tmp_path / name).exit_code
    found[name] = sampler_gap.read(tmp_path / name)
  assert found['float32 invariant'].gap_max == 0 < found['float32'].gap_max
  assert found['float32 invariant'].ess == 1
  json.dumps(dataclasses.asdict(found['float32']))
  lines = sampler_gap.table(found).splitlines()
  assert lines[2].endswith('| 1.00 |')
  assert '| 0 | 0 | 100.000 |' in lines[3]
