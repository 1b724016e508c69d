"""Task scores of quantised models, paired with those of their original."""

import dataclasses
import json

import numpy as np
import pytest

from evals import options
from evals.results import scores
from studies import fewer_bits
from tests.helpers import frozen_dirs


def _write(place, *, seed=0, **provenance):
  manifest = frozen_dirs.write(
    place,
    params=frozen_dirs.params(frozen_dirs.config(), seed=seed),
    provenance=frozen_dirs.provenance(**provenance),
  )
  return manifest.weights_digest


@pytest.fixture(scope='module')
def places(tmp_path_factory):
  """An original, a model that was made of it, a stranger, and a task."""
  root = tmp_path_factory.mktemp('bits')
  digest = _write(root / 'frozen')
  _write(root / 'int4', seed=1, lineage={'quantised_from': digest})
  _write(root / 'other', seed=2, lineage={'quantised_from': 'another'})
  lines = [
    {'context': f'q{i}', 'choices': ['aa', 'b', 'cccc'], 'label': i % 3}
    for i in range(12)
  ]
  (root / 'task.jsonl').write_text('\n'.join(map(json.dumps, lines)) + '\n')
  return root


def _measure(places, names, workdir, limit=0):
  return fewer_bits.measure(
    places / 'frozen',
    [places / name for name in names],
    [f'choice:{places / "task.jsonl"}'],
    options.Options(limit=limit),
    workdir,
  )


@pytest.mark.slow
def test_models_are_compared_question_by_question(places, tmp_path):
  found = _measure(places, ['int4'], tmp_path)
  (before,), (after,) = found['original'], found['int4']
  rows = fewer_bits.differences(before, after)
  assert rows
  for _, old, new, paired in rows:
    gaps = np.subtract(new.values, old.values)
    assert paired.value == pytest.approx(gaps.mean())
    assert len(gaps) == 12
  assert '| int4 | ' in fewer_bits.table(found)
  # What is measured is not measured again.
  saved = {each: each.read_bytes() for each in tmp_path.iterdir()}
  assert len(saved) == 2
  _measure(places, ['int4'], tmp_path)
  assert {each: each.read_bytes() for each in tmp_path.iterdir()} == saved
  # Fewer questions are another result.
  fewer = _measure(places, ['int4'], tmp_path, limit=5)
  assert [len(each[0].groups[0].example_ids) for each in fewer.values()] == [
    5, 5
  ]  # fmt: skip


def test_a_model_of_other_weights_is_refused(places, tmp_path):
  with pytest.raises(ValueError, match='made of the weights another, expected'):
    _measure(places, ['other'], tmp_path)


def test_equal_names_are_refused(places, tmp_path):
  with pytest.raises(ValueError, match='expected different names'):
    _measure(places, ['int4', 'int4', 'int4'], tmp_path)


def test_other_examples_are_no_pairs():
  one = scores.Group(
    name='g', scores=(), num_examples=2, example_ids=('a', 'b')
  )
  other = dataclasses.replace(one, example_ids=('a', 'c'))
  results = [scores.Result(task='t', groups=(each,)) for each in (one, other)]
  with pytest.raises(ValueError, match='two results of different examples'):
    fewer_bits.differences(*results)
