"""The benchmark of drafts, on a tiny model of random weights."""

import json
import types

import pytest

from benchmarks import speculation
from tests.helpers import frozen_dirs


@pytest.fixture
def args(tmp_path):
  """Returns the values of the flags."""
  frozen_dirs.write(
    tmp_path / 'frozen', config=frozen_dirs.config(max_length=1024)
  )
  return types.SimpleNamespace(
    model=str(tmp_path / 'frozen'),
    draft_model='',
    draft_head='',
    questions='',
    traces=[],
    batches=['2'],
    tokens=24,
    rounds=1,
    numerics='invariant',
  )


@pytest.mark.slow
def test_each_trace_is_compared(args, tmp_path):
  questions = [{'question': f'Which is number {n}?'} for n in range(3)]
  args.questions = str(tmp_path / 'questions.jsonl')
  (tmp_path / 'questions.jsonl').write_text(
    ''.join(json.dumps(each) + '\n' for each in questions)
  )
  found = list(speculation.measure(args))
  traces = ['edit', 'free', 'mixed', 'asked']
  assert [each['trace'] for each in found] == traces
  for each in found:
    assert each['ratio'] > 0
    assert each['equal'] == each['answers'] == 4
    assert 'tokens per verification' in speculation.report(each)


def test_a_trace_of_questions_needs_questions(args):
  args.traces = ['asked']
  with pytest.raises(ValueError, match='got asked without --questions, exp'):
    next(speculation.measure(args))


@pytest.mark.slow
def test_other_tokens_are_an_error(args, monkeypatch):
  calls = iter(range(100))
  of = speculation.answer

  def answer(*given):
    made = of(*given)
    return made._replace(token_ids=[(next(calls),)])

  monkeypatch.setattr(speculation, 'answer', answer)
  with pytest.raises(ValueError, match='edit: got other tokens with drafts'):
    list(speculation.measure(args))
