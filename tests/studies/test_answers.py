"""Answers of a frozen model: which are kept, where a kill leaves them."""

import json

import pytest

from data import sources
from data.examples import encoding
from experiments import presets
from inference import generate
from studies import answers
from tests.helpers import frozen_dirs

QUERY = 'problems:families=additions&levels=1&count=6'


@pytest.fixture(scope='module')
def generator(tmp_path_factory):
  directory = tmp_path_factory.mktemp('model') / 'frozen'
  # Random weights sample any id: half of the answers of 12 tokens end so.
  stop_ids = list(range(32, 48))
  frozen_dirs.write(directory, generation={'stop_ids': stop_ids})
  return generate.load(directory, answers.ENGINE, compile_all=False)


@pytest.fixture
def questions(generator, tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  path = tmp_path / 'questions.jsonl'
  path.write_text(
    '\n'.join(
      json.dumps({'question': f'{i} + 1?', 'answer': f'{i + 1}'})
      for i in range(3)
    )
    + '\n'
  )
  return answers.questions_of(str(path), 'all', generator)


@pytest.mark.slow
def test_the_space_of_a_template_is_no_part_of_an_answer(tmp_path):
  """The template writes it again when the answer is trained."""
  directory = tmp_path / 'model' / 'frozen'
  frozen_dirs.write(directory, chat_template=presets.QUESTION_TEMPLATE)
  asked = generate.load(directory, answers.ENGINE, compile_all=False)
  path = tmp_path / 'questions.jsonl'
  path.write_text('{"question": "1 + 1?"}\n')
  found = answers.questions_of(str(path), 'all', asked)
  (question,) = found.prompts
  assert answers._lead(asked, question) == ' '
  # The conversation that a run trains is prompt, space and answer.
  encoder = encoding.Encoder(
    asked.tokenizer, asked.frozen.chat_template, 'chat'
  )
  record = answers._record(question, '2', None)
  (document,) = encoder.unit(record, 'a record').documents
  sampled = asked.tokenizer.encode(' 2')
  assert list(document.ids)[: len(question.ids) + 2] == [
    *question.ids,
    *sampled,
  ]


def _write(generator, questions, out, **settings):
  made = answers.Settings(**{'max_tokens': 4, **settings})
  (*_, total) = answers.answer(generator, questions, made, out)
  return total


def _records(out):
  return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.mark.slow
def test_truncated_answers_are_counted_and_left_out(
  generator, questions, tmp_path
):
  out = tmp_path / 'answers.jsonl'
  total = _write(
    generator, questions, out, num_samples=16, temperature=2.0, max_tokens=12
  )
  assert total.questions == 3
  assert total.answers == 48
  assert total.kept + total.truncated + total.repeated == 48
  assert 0 < total.truncated < 48
  assert len(_records(out)) == total.kept
  about = json.loads((tmp_path / 'answers.jsonl.about.json').read_text())
  assert about['counts']['kept'] == total.kept
  assert about['counts']['flops'] > 0
  digest = generator.frozen.manifest.weights_digest
  assert about['settings']['weights_digest'] == digest


@pytest.mark.slow
def test_records_are_conversations_that_a_run_reads(
  generator, questions, tmp_path
):
  out = tmp_path / 'answers.jsonl'
  _write(
    generator, questions, out, num_samples=16, temperature=2.0, max_tokens=12
  )
  source = sources.jsonl(str(out), text_key=None)
  record = source[0]['record']
  assert [each['role'] for each in record['messages']] == ['user', 'assistant']
  assert record['answer'].isdigit()


def test_only_answers_that_the_verifier_accepts_are_kept(
  generator, questions, tmp_path
):
  out = tmp_path / 'right.jsonl'
  total = _write(
    generator,
    questions,
    out,
    num_samples=16,
    temperature=2.0,
    max_tokens=12,
    verifier='number',
  )
  # Random weights do not add.
  assert total.kept == 0
  assert total.low_score == total.answers - total.truncated - total.repeated
  assert out.read_text() == ''


def test_a_stopped_program_goes_on_with_the_same_answers(
  generator, questions, tmp_path, monkeypatch
):
  monkeypatch.setattr(answers, '_BLOCK', 1)
  settings = {'num_samples': 8, 'temperature': 2.0, 'max_tokens': 12}
  whole, stopped = tmp_path / 'whole.jsonl', tmp_path / 'stopped.jsonl'
  total = _write(generator, questions, whole, **settings)
  begun = answers.answer(
    generator, questions, answers.Settings(**settings), stopped
  )
  next(begun)
  begun.close()
  with pytest.raises(ValueError, match='got answers of other settings .seed'):
    _write(generator, questions, stopped, seed=1, **settings)
  assert _write(generator, questions, stopped, **settings) == total
  assert stopped.read_bytes() == whole.read_bytes()
  assert not list(tmp_path.glob('*.parts'))


def test_questions_are_generated_too(generator, tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  found = answers.questions_of(QUERY, 'train', generator)
  assert len(found) == 6


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'num_samples': 2}, 'samples: got 2 at temperature 0, expected 1'),
    ({'max_tokens': 0}, 'max_tokens: got 0'),
    ({'verifier': 'nothing'}, "verifier: got 'nothing'"),
  ],
)
def test_settings_that_cannot_be_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    answers.Settings(**fields).validate()
