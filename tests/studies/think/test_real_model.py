"""Votes of a model that is there: questions, readings, parts, receipts."""

import json
import types

import numpy as np
import pytest

from evals import ports
from studies.think import real_model
from tests.helpers import frozen_dirs, sample_pools


def _write(path, *records):
  path.write_text('\n'.join(map(json.dumps, records)))
  return str(path)


def _said(text, num_tokens=5):
  ids = tuple(range(num_tokens))
  return ports.Completion(
    text=text, ids=ids, all_ids=ids, logprobs=np.zeros(num_tokens)
  )


def test_questions_of_gsm8k_and_plain_numbers_are_read(tmp_path):
  path = _write(
    tmp_path / 'q.jsonl',
    {'question': 'How many?', 'answer': 'Sum <<1+2=3>>3.\n#### 1,003'},
    {'question': 'And now?', 'answer': '42'},
  )
  first, second = real_model.read_questions(path)
  assert (first.answer.text, second.answer.text) == ('1,003', '42')
  assert first.question.startswith('How many?')
  assert len(real_model.read_questions(path, 1)) == 1
  wrong = _write(tmp_path / 'w.jsonl', {'question': 'a', 'answer': 'no idea'})
  with pytest.raises(ValueError, match='answer: got .*expected a number'):
    real_model.read_questions(wrong)
  with pytest.raises(ValueError, match='--questions: got none'):
    real_model.Settings(model='m', questions='')


@pytest.mark.parametrize(
  ('text', 'num_tokens', 'found'),
  [
    ('2 + 2 = 4\n#### 1,003', 5, (1003, True)),
    ('So it is 1003 apples', 5, (1003, True)),
    ('So it is 1003 apples', 9, (None, False)),  # cut
    ('#### 1003', 9, (1003, True)),
    ('#### 7', 5, (7, False)),
    ('I do not know.', 5, (None, False)),
  ],
)
def test_the_number_of_an_answer_is_read(tmp_path, text, num_tokens, found):
  path = _write(tmp_path / 'q', {'question': 'x', 'answer': '#### 1003'})
  (question,) = real_model.read_questions(path)
  assert real_model.reader(9)(question, _said(text, num_tokens)) == found


def test_a_report_has_receipts_and_resumes_from_parts(tmp_path, monkeypatch):
  questions = [{'question': f'{i}?', 'answer': str(i)} for i in range(20)]
  frozen_dirs.write(tmp_path / 'model', config=frozen_dirs.config(num_layers=1))
  settings = real_model.Settings(
    model=str(tmp_path / 'model'),
    questions=_write(tmp_path / 'q.jsonl', *questions),
    num_samples=16,
  )
  pool, asked = sample_pools.graded(num_per_level=4), []

  def draw(generator, questions, **fields):
    asked.append(len(questions))
    return pool.take(np.arange(len(questions)) + fields['seed'])

  monkeypatch.setattr(real_model.generate, 'load', lambda *_: None)
  monkeypatch.setattr(
    real_model, 'pool_lib',
    types.SimpleNamespace(**vars(real_model.pool_lib) | {'draw': draw}),
  )  # fmt: skip
  text = real_model.report(settings, tmp_path, str(tmp_path / 'f.svg'))
  assert asked == [8, 8, 4]
  assert '20 questions, 16 samples of each' in text
  assert real_model.report(settings, tmp_path) == text
  assert asked == [8, 8, 4]
  rows = json.loads((tmp_path / real_model.RESULTS).read_text())['rows']
  one = {(row['way'], row['n']): row for row in rows}
  votes, early = one['majority', 16], one['majority, early stop', 16]
  assert one['majority', 1]['accuracy'] == pytest.approx(
    pool.is_right_QN.mean(), abs=0.03
  )
  assert votes['accuracy'] == pytest.approx(early['accuracy'])
  assert early['flops'] < votes['flops']
  assert votes['samples'] == pytest.approx(16)
  assert one['majority', 1]['discarded tokens'] == pytest.approx(0, abs=0.1)
  assert min(row['discarded tokens'] for row in one.values()) >= 0
  assert votes['low'] <= votes['accuracy'] <= votes['high']
