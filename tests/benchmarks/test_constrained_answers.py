"""A few answers under each of fifty schemas, and the masks of some."""

import pytest

from benchmarks import constrained_answers
from benchmarks.common import json_schemas, large_vocabulary

pytest.importorskip('llguidance', reason='requirements-serve.txt has it')
jsonschema = pytest.importorskip('jsonschema')


def test_masks_of_a_large_vocabulary_are_timed():
  found = constrained_answers.large(1, vocab_size=3000, most_tokens=8)
  assert 200 < found['masks'] <= 50 * 8
  assert 0 < found['mask_p50_ms'] <= found['mask_p99_ms']
  assert 'masks, 3,000 ids: mask p50' in constrained_answers.report(found)
  words = large_vocabulary.Vocabulary(3000)
  text = ' an unusual: {"text": [3, "é"]}'
  ids = words.encode(text)
  assert b''.join(map(words.token_bytes, ids)).decode() == text
  assert len(ids) < len(text.encode())


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
