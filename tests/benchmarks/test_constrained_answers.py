"""A few answers under each of fifty schemas, and the masks of some."""

import pytest

from benchmarks import constrained_answers
from benchmarks.common import json_schemas

pytest.importorskip('llguidance', reason='requirements-serve.txt has it')
jsonschema = pytest.importorskip('jsonschema')


@pytest.mark.slow
def test_answers_of_all_schemas_are_valid():
  assert len(json_schemas.ALL) == 50
  for schema in json_schemas.ALL:
    jsonschema.Draft202012Validator.check_schema(schema)
  found = constrained_answers.sampled(100)
  assert found['answers'] == 100
  assert found['ended'] >= 90
  assert not found['faults'], found['faults']
  assert 'not valid' in constrained_answers.report(found)
