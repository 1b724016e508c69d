"""Feedback becomes preference data."""

import json
import subprocess
import sys

import pytest

from data.examples import encoding
from inference.server import feedback as export_lib
from inference.server.records import database, feedback
from text import chat, tokenizer

_PROMPT = [{'role': 'user', 'content': 'Bonjour \u00e0 tous'}]


def _row(i, thumb, answer, *, principal='alice', **fields):
  return {
    'id': f'fb_{i}',
    'principal': principal,
    'model': 'tiny',
    'messages': _PROMPT,
    'answer': answer,
    'thumb': thumb,
    'preferred': None,
    **fields,
  }


def _said(text):
  return [{'role': 'assistant', 'content': text}]


def test_a_better_answer_makes_a_pair():
  rows = [_row(1, 'down', 'bad', preferred='good'), _row(2, None, 'x')]
  assert list(export_lib.pairs(rows)) == [
    {
      'prompt': _PROMPT,
      'chosen': _said('good'),
      'rejected': _said('bad'),
      'model': 'tiny',
      'feedback': ['fb_1'],
    }
  ]


def test_two_answers_to_one_prompt_make_a_pair_by_their_thumbs():
  other = [{'role': 'user', 'content': 'else'}]
  rows = [
    _row(1, 'down', 'bad'),
    _row(2, 'up', 'good'),
    _row(3, 'up', 'bad'),  # the same text is no pair with itself
    _row(4, 'up', 'of another', principal='bob'),
    _row(5, 'up', 'to another prompt', messages=other),
  ]
  made = [
    (each['chosen'], each['rejected'], each['feedback'])
    for each in export_lib.pairs(rows)
  ]
  assert made == [(_said('good'), _said('bad'), ['fb_2', 'fb_1'])]


def test_a_thumb_is_a_label():
  rows = [_row(1, 'up', 'a'), _row(2, 'down', 'b'), _row(3, None, 'c')]
  made = list(export_lib.labels(rows))
  assert [(each['completion'], each['label']) for each in made] == [
    (_said('a'), True),
    (_said('b'), False),
  ]


_ENCODED = tokenizer.ByteTokenizer()


def _sides(record, kind, other=None):
  """Returns what is trained of each document of a record, as text."""
  encoder = encoding.Encoder(_ENCODED, chat.DEFAULT_TEMPLATE, kind)
  unit = encoder.unit(record, 'prefs.jsonl:1', other)
  return [
    _ENCODED.decode(document.ids[document.trained]).strip()
    for document in unit.documents
  ], unit.streams


def test_exported_pairs_and_labels_can_be_trained_on():
  """Of conversations with a system prompt and an earlier answer, too."""
  conversation = [
    {'role': 'system', 'content': 'Be brief.'},
    {'role': 'user', 'content': 'Hi'},
    {'role': 'assistant', 'content': 'Hello.'},
    *_PROMPT,
  ]
  rows = [
    _row(1, 'up', 'good', messages=conversation),
    _row(2, 'down', 'bad', messages=conversation),
    _row(3, 'down', 'worse', messages=conversation, preferred='better'),
  ]
  trained = [_sides(pair, 'pairs') for pair in export_lib.pairs(rows)]
  # Only the rated answers are trained, not the one before them.
  assert trained == [
    (['better', 'worse'], {}),
    (['good', 'bad'], {}),
    (['good', 'worse'], {}),
  ]
  first, second, third = export_lib.labels(rows)
  assert _sides(first, 'labelled', second) == (
    ['good', 'bad'],
    {'labels': (1.0, 0.0)},
  )
  assert _sides(second, 'labelled', third)[1] == {'labels': (-1.0, 0.0)}


@pytest.fixture
def records(tmp_path):
  """The records of a server that runs, with a row of alice and one of bob."""
  path = tmp_path / 'records.db'
  records = database.Database(path, tables=[feedback.TABLES])
  for i, name in enumerate(('alice', 'bob')):
    said = {
      **_row(i, 'down', f'{name} bad', preferred='good'),
      'request_id': str(i),
      'comment': None,
    }
    del said['id'], said['principal']
    records.submit(
      lambda c, name=name, said=said: feedback.add(
        c, principal=name, key_id='', **said
      )
    ).result()
  yield path
  records.close()


def _run(*args):
  return subprocess.run(
    [sys.executable, '-m', 'inference.server.feedback', *args],
    capture_output=True,
    text=True,
    check=False,
  )


def test_the_command_exports_and_deletes_while_a_server_runs(records, tmp_path):
  out = tmp_path / 'prefs.jsonl'
  done = _run('export', f'--records={records}', f'--out={out}')
  assert done.returncode == 0, done.stderr
  assert done.stdout == f'wrote 2 pairs of 2 rows to {out}\n'
  lines = [json.loads(line) for line in out.read_text('utf-8').splitlines()]
  assert [line['rejected'] for line in lines] == [
    _said('alice bad'),
    _said('bob bad'),
  ]
  assert not any(value == 'alice' for line in lines for value in line.values())
  assert 'Bonjour \u00e0' in out.read_text('utf-8')
  done = _run('delete', f'--records={records}', '--principal=alice')
  assert done.stdout.startswith('deleted 1 rows;')
  done = _run('export', f'--records={records}', f'--out={out}', '--kind=labels')
  assert done.returncode == 0, done.stderr
  (line,) = out.read_text('utf-8').splitlines()
  assert json.loads(line)['completion'] == _said('bob bad')


def test_a_file_without_feedback_is_one_line_of_error(tmp_path):
  (tmp_path / 'a.db').write_bytes(b'no database at all, but some text')
  for name in ('a.db', 'missing.db'):
    path = tmp_path / name
    done = _run('export', f'--records={path}', f'--out={tmp_path}/out')
    assert done.returncode == 2
    assert done.stderr.startswith(f'error: --records: got {path} (')
    assert done.stderr.count('\n') == 1
  assert not (tmp_path / 'missing.db').exists()
