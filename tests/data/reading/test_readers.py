"""Every reader returns its documents by any index, from a pickle too."""

import json
import pickle

import numpy as np
import pyarrow as pa
from pyarrow import parquet as pq
import pytest
import tensorflow_datasets as tfds

from data import sources
from data.reading import tfds_builders

TEXTS = ['one\r\ntwo', 'héllo 日本', '', '{"text": "no"}', 'last \u2028 line']


def _jsonl(tmp_path, texts):
  # Two files, blank lines, and no newline at the end.
  lines = [json.dumps({'text': text}, ensure_ascii=False) for text in texts]
  (tmp_path / 'a.jsonl').write_text('\n'.join([*lines[:2], '', '  ', '']))
  (tmp_path / 'b.jsonl').write_text('\n'.join(['', *lines[2:]]))
  return sources.jsonl(f'{tmp_path}/*.jsonl')


def _parquet(tmp_path, texts):
  for name, part in (('a', texts[:3]), ('b', texts[3:])):
    text = pa.array(part, pa.string())
    table = pa.table({'n': list(range(len(part))), 'text': text})
    pq.write_table(table, tmp_path / f'{name}.parquet', row_group_size=2)
  return sources.parquet(str(tmp_path))


def _text_files(tmp_path, texts):
  for i, text in enumerate(texts):
    (tmp_path / f'{i}.md').write_bytes(text.encode())
  return sources.text_files(str(tmp_path))


class TinyDataset(tfds.core.GeneratorBasedBuilder):
  """A dataset with text under another name, and with other features."""

  VERSION = tfds.core.Version('1.0.0')

  def __init__(self, *, texts, **kwargs):
    self._texts = texts
    super().__init__(**kwargs)

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(
        {
          'text': tfds.features.Text(),
          'label': tfds.features.Scalar(np.int64),
        }
      ),
    )

  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples(self._texts)}

  def _generate_examples(self, texts):
    for i, text in enumerate(texts):
      yield i, {'text': text, 'label': i}


def _tfds(tmp_path, texts):
  builder = TinyDataset(texts=texts, data_dir=tmp_path)
  return sources.tfds_directory(str(tfds_builders.prepare(builder)), 'train')


OPENERS = [_jsonl, _parquet, _text_files, _tfds]


@pytest.mark.parametrize('opener', OPENERS)
def test_documents_come_back(opener, tmp_path):
  source = opener(tmp_path, TEXTS)
  assert len(source) == len(TEXTS)
  documents = [source[i] for i in (3, 0, 4, 2, 1)]  # random access
  texts = {document['text'] for document in documents}
  assert texts == set(TEXTS)
  assert all(set(document) == {'text', 'id'} for document in documents)
  assert len({document['id'] for document in documents}) == len(TEXTS)


@pytest.mark.parametrize('opener', [_jsonl, _parquet, _text_files])
def test_documents_of_files_keep_their_order(opener, tmp_path):
  source = opener(tmp_path, TEXTS)
  assert [source[i]['text'] for i in range(len(source))] == TEXTS


@pytest.mark.parametrize('opener', OPENERS)
def test_sources_can_be_pickled(opener, tmp_path):
  source = opener(tmp_path, TEXTS)
  copy = pickle.loads(pickle.dumps(source))
  for i in range(len(TEXTS)):
    assert copy[i] == source[i]


@pytest.mark.parametrize('opener', [_jsonl, _parquet])
def test_source_without_documents(opener, tmp_path):
  with pytest.raises(ValueError, match='no documents in .*a'):
    opener(tmp_path, [])


def test_jsonl_names_file_and_line(tmp_path):
  source = _jsonl(tmp_path, TEXTS)
  assert source[0]['id'].endswith('a.jsonl:1')
  assert source[2]['id'].endswith('b.jsonl:2')


@pytest.mark.parametrize(
  ('line', 'error'),
  [
    (b'{"text": "cut', r'x\.jsonl:3 is not JSON \(.*\); expected one object'),
    (b'["text"]', r'x\.jsonl:3 is a list, expected an object'),
    (b'{"body": "", "n": 1}', r"no 'text' in .*:3, expected one of body, n;"),
    (b'{"text": 7}', r"'text' in .*x\.jsonl:3 is a int, expected a string"),
    (b'{"text": null}', r"'text' in .*:3 is a NoneType, expected a string"),
    (b'{"text": "\xff"}', r'x\.jsonl:3 is not UTF-8 \(byte 0xff at 10\)'),
  ],
)
def test_malformed_jsonl_line(tmp_path, line, error):
  path = tmp_path / 'x.jsonl'
  path.write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "good"}\n')
  source = sources.jsonl(str(path))
  assert source[0]['text'] == source[2]['text'] == 'good'
  with pytest.raises(ValueError, match=error):
    source[1]


def test_wrong_jsonl_key_shows_when_opened(tmp_path):
  _jsonl(tmp_path, TEXTS)
  with pytest.raises(ValueError, match="no 'body' in .*expected one of text;"):
    sources.jsonl(f'{tmp_path}/*.jsonl', text_key='body')


def test_parquet_column_that_is_missing_or_no_text(tmp_path):
  _parquet(tmp_path, TEXTS)
  with pytest.raises(ValueError, match="no column 'body' .* one of n, text;"):
    sources.parquet(str(tmp_path), text_key='body')
  with pytest.raises(ValueError, match="column 'n' .* holds int64, expected s"):
    sources.parquet(str(tmp_path), text_key='n')


def test_parquet_null(tmp_path):
  pq.write_table(pa.table({'text': ['a', None]}), tmp_path / 'x.parquet')
  source = sources.parquet(str(tmp_path))
  with pytest.raises(ValueError, match='row 1 of row group 0 is a NoneType'):
    source[1]


def test_parquet_index_out_of_range(tmp_path):
  with pytest.raises(IndexError, match=r'got document 5, expected 0\.\.4'):
    _parquet(tmp_path, TEXTS)[5]


def test_file_that_is_no_parquet(tmp_path):
  (tmp_path / 'x.parquet').write_text('not parquet, not even close')
  with pytest.raises(ValueError, match='is not a Parquet file'):
    sources.parquet(str(tmp_path))


def test_text_file_that_is_not_utf8(tmp_path):
  (tmp_path / 'x.txt').write_bytes(b'caf\xe9')
  source = sources.text_files(str(tmp_path))
  with pytest.raises(ValueError, match=r'x\.txt is not UTF-8 \(byte 0xe9 at 3'):
    source[0]


def test_tfds_directory_that_is_not_prepared(tmp_path):
  with pytest.raises(FileNotFoundError, match=r'no dataset_info\.json in'):
    sources.tfds_directory(str(tmp_path), 'train')


def test_tfds_feature_that_is_missing_or_no_text(tmp_path):
  _tfds(tmp_path, TEXTS)
  directory = f'{tmp_path}/tiny_dataset/1.0.0'
  with pytest.raises(ValueError, match="no feature 'x' .* one of label, text;"):
    sources.tfds_directory(directory, 'train', text_key='x')
  source = sources.tfds_directory(directory, 'train', text_key='label')
  with pytest.raises(ValueError, match="feature 'label' .*expected text"):
    source[0]


def test_tfds_split_that_is_missing(tmp_path):
  _tfds(tmp_path, TEXTS)
  for split in ('test', 'train[:', 'train[:0%]'):
    with pytest.raises(ValueError, match=r'no split .*; available: train$'):
      sources.tfds_directory(f'{tmp_path}/tiny_dataset/1.0.0', split)


def test_tfds_split_expressions(tmp_path):
  _tfds(tmp_path, TEXTS)
  directory = f'{tmp_path}/tiny_dataset/1.0.0'
  assert len(sources.tfds_directory(directory, 'train[:2]')) == 2
  assert len(sources.tfds_directory(directory, 'train[:2]+train[3:]')) == 4


def test_tfds_dataset_that_is_no_array_record(tmp_path):
  _tfds(tmp_path, TEXTS)
  info = tmp_path / 'tiny_dataset/1.0.0/dataset_info.json'
  info.write_text(info.read_text().replace('array_record', 'tfrecord'))
  with pytest.raises(ValueError, match='stored as .*expected array_record;'):
    sources.tfds_directory(str(info.parent), 'train')


RECORDS = [
  {
    'messages': [
      {'role': 'user', 'content': 'h\u00e9'},
      {'role': 'assistant', 'content': 'yes', 'name': 'x'},
    ],
    'margin': 0.5,
    'label': True,
    'tags': ['a', 'b'],
  },
  {
    'messages': [{'role': 'user', 'content': 'no', 'name': ''}],
    'margin': 2.0,
    'label': False,
    'tags': [],
  },
]


class TinyRecords(tfds.core.GeneratorBasedBuilder):
  """A dataset of conversations."""

  VERSION = tfds.core.Version('1.0.0')

  def _info(self):
    text = tfds.features.Text()
    message = {'role': text, 'content': text, 'name': text}
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(
        {
          'messages': tfds.features.Sequence(message),
          'margin': tfds.features.Scalar(np.float32),
          'label': tfds.features.Scalar(np.bool_),
          'tags': tfds.features.Sequence(text),
        }
      ),
    )

  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples()}

  def _generate_examples(self):
    for i, record in enumerate(RECORDS):
      messages = [{'name': '', **message} for message in record['messages']]
      yield i, record | {'messages': messages}


def _records_of(kind, tmp_path):
  if kind == 'tfds':
    builder = TinyRecords(data_dir=tmp_path)
    path = str(tfds_builders.prepare(builder))
    return sources.tfds_directory(path, 'train', text_key=None)
  path = tmp_path / f'x.{kind}'
  if kind == 'jsonl':
    path.write_text('\n\n'.join(map(json.dumps, RECORDS)))
    return sources.jsonl(str(path), text_key=None)
  pq.write_table(pa.Table.from_pylist(RECORDS), path)
  return sources.parquet(str(path), text_key=None)


@pytest.mark.parametrize('kind', ['jsonl', 'parquet', 'tfds'])
def test_whole_records_come_back(kind, tmp_path):
  source = pickle.loads(pickle.dumps(_records_of(kind, tmp_path)))
  # As JSON: values of numpy would not be written.
  found = [json.loads(json.dumps(source[i]['record'])) for i in range(2)]
  for record in found if kind == 'tfds' else ():
    for message in record['messages']:
      if not message['name'] and message['content'] != 'no':
        del message['name']
  assert sorted(found, key=lambda each: each['margin']) == RECORDS
  place = {
    'jsonl': 'x.jsonl:3',
    'parquet': 'x.parquet, row 1 of row group 0',
    'tfds': 'tiny_records/1.0.0 train, example 1',
  }[kind]
  assert source[1]['id'].endswith(place)


def test_records_and_texts_of_a_file_are_different_sources(tmp_path):
  _jsonl(tmp_path, TEXTS)
  path = f'{tmp_path}/*.jsonl'
  texts, records = sources.jsonl(path), sources.jsonl(path, text_key=None)
  assert texts.fingerprint() != records.fingerprint()
  assert records[1]['record'] == {'text': TEXTS[1]}


def test_columns_of_absent_keys_are_no_keys(tmp_path):
  # A table has one column for the key of any record.
  rows = [{'a': {'x': 1}, 'b': None}, {'a': {'y': [{'z': 1}, {'w': 2}]}}]
  pq.write_table(pa.Table.from_pylist(rows), tmp_path / 'x.parquet')
  source = sources.parquet(str(tmp_path), text_key=None)
  assert [source[i]['record'] for i in range(2)] == [
    {'a': {'x': 1}}, {'a': {'y': [{'z': 1}, {'w': 2}]}},
  ]  # fmt: skip


def test_plain_text_has_no_records(tmp_path):
  with pytest.raises(ValueError, match='for records, expected jsonl, parquet'):
    sources.text_files(str(tmp_path), text_key=None)
