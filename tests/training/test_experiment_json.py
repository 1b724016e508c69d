"""Experiments from their own records."""

import json

import pytest

from tests.experiments import test_experiments
from training import experiment_json


@pytest.mark.parametrize(('name', 'variant'), test_experiments.ALL)
def test_a_record_gives_the_same_experiment(name, variant):
  made = test_experiments._load(name, variant)
  record = json.loads(json.dumps(made.to_dict()))
  again = experiment_json.from_dict(record)
  assert again == made
  assert again.to_dict() == made.to_dict()


@pytest.fixture
def record():
  made = test_experiments._load('quickstart', None)
  return json.loads(json.dumps(made.to_dict()))


def test_a_younger_field_has_its_default(record):
  del record['eval_at_start'], record['optimizer']['rule']['momentum']
  again = experiment_json.from_dict(record)
  assert not again.eval_at_start
  assert again.optimizer.rule.momentum == type(again.optimizer.rule)().momentum


@pytest.mark.parametrize(
  ('path', 'value', 'words'),
  [
    (('no_field',), 1, 'config: got the fields no_field'),
    (('data', 'no_field'), 1, 'config.data: got the fields no_field'),
    (('optimizer',), 3, 'expected the fields of OptimizerConfig'),
    (('data', 'open_source'), 'os.system', 'of this project'),
    (('data', 'open_source'), 'data.sources.none', 'does not have'),
    (('objective', 'type'), 'subprocess.Popen', 'of this project'),
  ],
)
def test_a_record_of_other_code_is_refused(record, path, value, words):
  *parents, last = path
  place = record
  for parent in parents:
    place = place[parent]
  place[last] = value
  with pytest.raises(ValueError, match=words):
    experiment_json.from_dict(record)
