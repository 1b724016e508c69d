"""GSM8K becomes conversations. The lines here only have its format."""

import json
import subprocess
import sys

import pytest

from data.problems import gsm8k

LINES = [
  {
    'question': ' Janet\u2019s ducks lay 16 eggs. How many remain of 9 * 2? ',
    'answer': 'She sells 9 * 2 = $<<9*2=18>>18 a day.\n#### 18',
  },
  {
    'question': 'How much?',
    'answer': 'It is <<1000+500=1500>>1500.\n#### 1,500',
  },
  {'question': 'Half?', 'answer': 'It is .5\n#### 0.5'},
]


@pytest.fixture
def path(tmp_path):
  text = '\n\n'.join(json.dumps(line) for line in LINES)
  (tmp_path / 'gsm8k_train.jsonl').write_text(f'{text}\n')
  return tmp_path / 'gsm8k_train.jsonl'


def test_a_question_and_its_answer_are_a_conversation(path):
  found = list(gsm8k.conversations(path))
  assert found[0] == {
    'messages': [
      {
        'role': 'user',
        'content': 'Janet\u2019s ducks lay 16 eggs. How many remain of 9 * 2?',
      },
      {
        'role': 'assistant',
        'content': 'She sells 9 * 2 = $18 a day.\n#### 18',
      },
    ],
    'id': 'gsm8k_train:1',
  }
  assert [each['id'] for each in found] == [
    'gsm8k_train:1', 'gsm8k_train:3', 'gsm8k_train:5'
  ]  # fmt: skip


def test_notes_are_kept_if_asked_for(path):
  (first, *_) = gsm8k.conversations(path, with_notes=True)
  assert '<<9*2=18>>18' in first['messages'][1]['content']


@pytest.mark.parametrize(
  ('line', 'message'),
  [
    ('{"question": "a"}', 'line 2: got .*, expected an object with the texts'),
    ('{"question": "", "answer": "#### 1"}', 'line 2: got .*, expected an obj'),
    ('[1]', 'line 2: got .*, expected an object with the texts question'),
    ('oops', "line 2: got 'oops.*', expected a JSON object"),
    (
      '{"question": "a", "answer": "it is 3"}',
      "line 2: answer: got 'it is 3', expected a text that ends with ####",
    ),
    (
      '{"question": "a", "answer": "#### many"}',
      "line 2: answer: got '#### many', expected a text that ends with ####",
    ),
  ],
)
def test_a_line_that_is_not_of_gsm8k_is_named(tmp_path, line, message):
  path = tmp_path / 'a.jsonl'
  path.write_text(f'{json.dumps(LINES[0])}\n{line}\n')
  with pytest.raises(ValueError, match=message):
    list(gsm8k.conversations(path))


def _run(*args):
  return subprocess.run(
    [sys.executable, '-m', 'data.problems.gsm8k', *args],
    capture_output=True,
    text=True,
    check=False,
  )


def test_the_command_takes_a_part(path, tmp_path):
  out = tmp_path / 'chat' / 'train.jsonl'
  done = _run(f'--path={path}', f'--out={out}', '--skip=1', '--count=2')
  assert done.returncode == 0, done.stderr
  assert done.stdout == f'wrote 2 conversations to {out}\n'
  lines = [json.loads(line) for line in out.read_text('utf-8').splitlines()]
  assert [line['id'] for line in lines] == ['gsm8k_train:3', 'gsm8k_train:5']


@pytest.mark.parametrize(
  ('args', 'message'),
  [
    (['--count=4'], 'got 3, expected at least 4; lower --count or --skip'),
    (['--skip=3'], 'got 0, expected at least 1; lower --count or --skip'),
    (['--path=missing.jsonl'], 'No such file or directory'),
  ],
)
def test_errors_of_the_command_are_one_line(path, tmp_path, args, message):
  done = _run(f'--path={path}', f'--out={tmp_path}/out.jsonl', *args)
  assert done.returncode == 1
  assert done.stderr.startswith('error: ')
  assert done.stderr.count('\n') == 1
  assert message in done.stderr
