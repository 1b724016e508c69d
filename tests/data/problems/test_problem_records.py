"""Problems as training examples: the solutions are trained, nothing else."""

import dataclasses

import pytest

from data import sources
from data.examples import encoding
from data.problems import generator, records
from experiments import presets
from text import bpe


@pytest.fixture(scope='module')
def tokenizer():
  settings = generator.Settings(kind='text', count=300)
  made = records.make(settings, 'train')
  return bpe.train((each['text'] for each in made), 400)


def _trained(tokenizer, document):
  """Returns the trained text of a document, and its last trained id."""
  ids = document.ids[document.trained]
  return tokenizer.decode(ids), ids[-1]


def _unit(tokenizer, kind, record, other=None):
  encoder = encoding.Encoder(tokenizer, presets.QUESTION_TEMPLATE, kind)
  return encoder.unit(record, 'record', other)


def test_the_solution_and_the_stop_token_are_trained(tokenizer):
  settings = generator.Settings(kind='chat', count=40, levels=(1, 5))
  for record in records.make(settings, 'train'):
    (document,) = _unit(tokenizer, 'chat', record).documents
    text, last = _trained(tokenizer, document)
    assert text == f' {record["messages"][1]["content"]}'
    assert last == tokenizer.eos_id
    assert list(document.ids).count(tokenizer.bos_id) == 1
    question = record['messages'][0]['content']
    assert f'Question: {question}\nAnswer: ' in tokenizer.decode(document.ids)


def test_a_share_of_the_chats_is_wrong():
  settings = generator.Settings(
    count=400, families=('additions',), levels=(2,), difficulties=(2,), wrong=60
  )
  mixed = records.make(settings, 'train')
  right = records.make(dataclasses.replace(settings, wrong=0), 'train')
  assert [each['id'] for each in mixed] == [each['id'] for each in right]
  differ = [
    (a['messages'][1]['content'], b['messages'][1]['content'])
    for a, b in zip(mixed, right, strict=True)
    if a != b
  ]
  assert len(differ) == pytest.approx(240, abs=40)  # 4 standard deviations
  for wrong, solution in differ:
    assert wrong.split('#### ')[1] != solution.split('#### ')[1]


def test_pairs_have_both_solutions_and_their_margin(tokenizer):
  settings = generator.Settings(kind='pairs', count=40)
  for record in records.make(settings, 'train'):
    unit = _unit(tokenizer, 'pairs', record)
    texts = [_trained(tokenizer, each)[0] for each in unit.documents]
    assert texts == [
      f' {record[side][0]["content"]}' for side in ('chosen', 'rejected')
    ]
    assert unit.streams == {'margins': (record['margin'],) * 2}


def test_labelled_solutions_have_their_label_and_another_solution(tokenizer):
  settings = generator.Settings(kind='labelled', count=40)
  made = records.make(settings, 'train')
  for record, other in zip(made, made[1:], strict=False):
    unit = _unit(tokenizer, 'labelled', record, other)
    texts = [_trained(tokenizer, each)[0] for each in unit.documents]
    assert texts == [
      f' {each["completion"][0]["content"]}' for each in (record, other)
    ]
    assert unit.streams == {'labels': (1.0 if record['label'] else -1.0, 0.0)}


@pytest.mark.parametrize('kind', ['chat', 'pairs', 'labelled'])
def test_the_source_has_the_records_of_the_command(tmp_path, kind):
  path = f'kind={kind}&count=12&seed=-9'
  source = sources.problems(path, 'train', str(tmp_path), None)
  expected = records.make(generator.Settings.parse(path), 'train')
  found = [source[i]['record'] for i in range(len(source))]
  if kind == 'pairs':
    for each in found:
      each['margin'] = round(each['margin'], 4)  # stored as float32
  assert found == expected
