"""Files of examples: fields that are read, and errors with file and line."""

import json

import pytest

from evals.tasks import generation, gsm8k, multiple_choice, perplexity


def _write(path, *lines):
  path.write_text(
    '\n'.join(
      line if isinstance(line, str) else json.dumps(line) for line in lines
    )
  )
  return path


def test_questions(tmp_path):
  path = _write(
    tmp_path / 'a.jsonl',
    {'context': 'Q', 'choices': ['a', 'b'], 'label': 1},
    '',
    {
      'context': '',
      'choices': ['a', 'b', 'c'],
      'label': 0,
      'id': 7,
      'cluster': 'p',
      'delimiter': '',
    },
  )
  first, second = multiple_choice.read_questions(path)
  assert (first.context, first.choices, first.label) == ('Q', ('a', 'b'), 1)
  assert first.delimiter == ' '
  assert first.id.startswith('1:')
  assert (second.id, second.cluster, second.delimiter) == ('7', 'p', '')


def test_prompts(tmp_path):
  path = _write(
    tmp_path / 'a.jsonl',
    {'prompt': 'x', 'answer': ['a', 'b'], 'stop': ['\n'], 'id': 'one'},
    {'prompt': 'y', 'answer': '3', 'match': 'number'},
  )
  first, second = generation.read_prompts(path)
  assert (first.id, first.text, first.stop) == ('one', 'x', ('\n',))
  assert first.grade('b')['exact_match'] == 1.0
  assert second.grade('so 3.')['exact_match'] == 1.0


def test_word_problems_with_solved_ones_before(tmp_path):
  train = _write(
    tmp_path / 'train.jsonl',
    *({'question': f'q{i}', 'answer': f'#### {i}'} for i in range(3)),
  )
  test = _write(
    tmp_path / 'test.jsonl', {'question': 'q', 'answer': 'so\n#### 18'}
  )
  (alone,) = gsm8k.read_prompts(test)
  assert alone.text == 'Question: q\nAnswer:'
  (taught,) = gsm8k.read_prompts(test, train, 2)
  assert taught.text == (
    'Question: q0\nAnswer: #### 0\n\nQuestion: q1\nAnswer: #### 1\n\n'
    'Question: q\nAnswer:'
  )
  assert taught.grade('#### 18')['exact_match'] == 1.0
  with pytest.raises(ValueError, match='got 3 examples, expected at least'):
    gsm8k.read_prompts(test, train, 4)
  with pytest.raises(ValueError, match='without a fewshot_path'):
    gsm8k.read_prompts(test, '', 4)


def test_texts(tmp_path):
  (tmp_path / 'a.txt').write_bytes(b'one\r\ntwo\n')
  assert perplexity.read_documents(tmp_path / 'a.txt') == ['one\r\ntwo\n']
  path = _write(tmp_path / 'a.jsonl', {'text': 'one'}, {'text': 'two'})
  assert perplexity.read_documents(path) == ['one', 'two']
  (tmp_path / 'empty.txt').write_text('')
  with pytest.raises(ValueError, match='got no text'):
    perplexity.read_documents(tmp_path / 'empty.txt')


@pytest.mark.parametrize(
  ('line', 'words'),
  [
    ('{"context"', 'expected a JSON object'),
    ('[1]', 'expected a JSON object'),
    ({'context': 'x'}, 'got the fields context, expected context, choices'),
    (
      {'context': 'x', 'choices': ['a', 'b'], 'label': 0, 'gold': 1},
      'and no others but id, cluster, delimiter',
    ),
    (
      {'context': 'x', 'choices': ['a'], 'label': 0},
      'choices: got .*, expected a list of at least 2 strings',
    ),
    (
      {'context': 'x', 'choices': ['a', ''], 'label': 0},
      'none of them empty',
    ),
    (
      {'context': 'x', 'choices': ['a', 'b'], 'label': 2},
      'label: got 2, expected an integer from 0 to 1',
    ),
    (
      {'context': 'x', 'choices': ['a', 'b'], 'label': True},
      'label: got True, expected an integer',
    ),
    (
      {'context': 3, 'choices': ['a', 'b'], 'label': 0},
      'context: got 3, expected a string',
    ),
  ],
)
def test_a_wrong_question_is_refused_by_its_line(tmp_path, line, words):
  good = {'context': 'Q', 'choices': ['a', 'b'], 'label': 1}
  path = _write(tmp_path / 'a.jsonl', good, '', line)
  with pytest.raises(ValueError, match=f'a.jsonl, line 3: .*{words}'):
    multiple_choice.read_questions(path)


@pytest.mark.parametrize(
  ('line', 'words'),
  [
    ({'prompt': '', 'answer': 'a'}, 'prompt: got .*, expected text'),
    ({'prompt': 'x', 'answer': []}, 'answer: .*at least 1 strings'),
    ({'prompt': 'x', 'answer': 'a', 'stop': '.'}, 'stop: .*a list'),
    ({'prompt': 'x', 'answer': 'a', 'match': 'fuzzy'}, 'one of exact, number'),
    ({'prompt': 'x', 'answer': 'a', 'match': 'number'}, 'expected numbers'),
  ],
)
def test_a_wrong_prompt_is_refused_by_its_line(tmp_path, line, words):
  path = _write(tmp_path / 'a.jsonl', line)
  with pytest.raises(ValueError, match=f'a.jsonl, line 1: .*{words}'):
    generation.read_prompts(path)


def test_a_wrong_word_problem_is_refused_by_its_line(tmp_path):
  path = _write(tmp_path / 'a.jsonl', {'question': 'q', 'answer': '18'})
  with pytest.raises(ValueError, match="line 1: answer: .*ends with '####'"):
    gsm8k.read_prompts(path)


def test_files_that_are_none(tmp_path):
  with pytest.raises(FileNotFoundError, match='got no such file'):
    multiple_choice.read_questions(tmp_path / 'none.jsonl')
  with pytest.raises(ValueError, match='got a directory'):
    perplexity.read_documents(tmp_path)
  (tmp_path / 'a.jsonl').write_bytes(b'\n\xff\n')
  with pytest.raises(
    ValueError, match='a.jsonl, line 2: got bytes that are no'
  ):
    multiple_choice.read_questions(tmp_path / 'a.jsonl')
  (tmp_path / 'b.jsonl').write_text('\n')
  with pytest.raises(ValueError, match='got no lines'):
    multiple_choice.read_questions(tmp_path / 'b.jsonl')


def test_two_examples_of_one_name_are_refused(tmp_path):
  line = {'context': 'Q', 'choices': ['a', 'b'], 'label': 1, 'id': 'x'}
  path = _write(tmp_path / 'a.jsonl', line, line)
  with pytest.raises(ValueError, match='line 2: id: .*another than that of'):
    multiple_choice.read_questions(path)
