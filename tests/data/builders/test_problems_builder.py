"""The problems as a TFDS data set."""

import pytest
import tensorflow_datasets as tfds

from data import sources
from data.builders import problems
from data.problems import generator, records
from data.reading import tfds_builders


def _plain(value):
  """Returns an example of TFDS as JSON values."""
  if isinstance(value, bytes):
    return value.decode('utf-8')
  if isinstance(value, dict):  # a sequence of messages: a dict of lists
    rows = zip(*value.values(), strict=True)
    return [dict(zip(value, map(_plain, row), strict=True)) for row in rows]
  return value


@pytest.mark.parametrize('kind', ['text', 'chat', 'pairs', 'labelled'])
def test_examples_are_the_records(tmp_path, kind):
  settings = generator.Settings(count=30, kind=kind, seed=2**63 + 1)
  builder = problems.Problems(settings=settings, data_dir=tmp_path)
  directory = tfds_builders.prepare(builder)
  read = tfds.builder_from_directory(directory)
  expected = records.make(settings, 'train')
  examples = read.as_data_source('train')
  assert len(examples) == 30
  for example, record in zip(examples, expected, strict=True):
    found = {name: _plain(value) for name, value in example.items()}
    if kind == 'pairs':
      found['margin'] = round(found['margin'], 4)  # stored as float32
    assert found == record
  sizes = {name: info.num_examples for name, info in read.info.splits.items()}
  assert sizes == {'train': 30, 'validation': 3, 'test': 3}


def test_settings_do_not_share_data(tmp_path, caplog):
  with caplog.at_level('WARNING'):
    texts = [
      sources.problems(f'kind=text&count=5&seed={seed}', 'all', str(tmp_path))
      for seed in (1, 2, 1)
    ]
  assert [len(each) for each in texts] == [7, 7, 7]
  assert texts[0][0] == texts[2][0]
  assert texts[0][0] != texts[1][0]
  assert len(list(tmp_path.glob('problems_text_*'))) == 2
  assert not caplog.text


def test_texts_have_question_work_and_answer(tmp_path):
  path = 'kind=text&count=3&families=sums&levels=1'
  source = sources.problems(path, 'validation', str(tmp_path))
  question, work, answer = source[0]['text'].split('\n')
  assert question[-1] in '?.'
  assert '=' in work
  assert answer.startswith('#### ')
  assert len(source[0]['id']) == 16


def test_a_path_that_is_no_settings_is_an_error(tmp_path):
  with pytest.raises(ValueError, match="settings: got 'corpus/', expected a"):
    sources.problems('corpus/', data_dir=str(tmp_path))
