"""The command writes a file, or one line of error."""

import json
import subprocess
import sys

import pytest

from evals.tasks import gsm8k as gsm8k_task
from text.replies import answers


def _run(module, *args):
  return subprocess.run(
    [sys.executable, '-m', module, *args],
    capture_output=True,
    text=True,
    check=False,
  )


def _problems(*args):
  return _run('data.problems', *args)


@pytest.mark.parametrize(
  ('kind', 'fields'),
  [
    ('text', {'text'}),
    ('chat', {'messages'}),
    ('pairs', {'prompt', 'chosen', 'rejected', 'margin'}),
    ('labelled', {'prompt', 'completion', 'label'}),
  ],
)
def test_lines_have_the_shape_of_their_kind(tmp_path, kind, fields):
  out = tmp_path / 'new' / 'out.jsonl'
  done = _problems(f'--out={out}', f'--kind={kind}', '--count=40')
  assert done.returncode == 0, done.stderr
  assert done.stdout == f'wrote 40 {kind} of train to {out}\n'
  lines = [json.loads(line) for line in out.read_text().splitlines()]
  assert len(lines) == 40
  for line in lines:
    assert set(line) == fields | {'id', 'family', 'level'}
  if kind == 'labelled':
    assert 8 < sum(line['label'] for line in lines) < 32


def test_questions_are_graded_by_the_evaluation(tmp_path):
  out = tmp_path / 'questions.jsonl'
  done = _problems(
    f'--out={out}',
    '--kind=questions',
    '--families=sums,products,modular,words',
    '--split=validation',
    '--count=50',
    '--levels=1,4',
  )
  assert done.returncode == 0, done.stderr
  prompts = gsm8k_task.read_prompts(out)
  assert len(prompts) == 50
  for prompt in prompts:
    assert prompt.grade(prompt.answer)['exact_match'] == 1
    number = prompt.answer.partition(answers.MARK)[2]
    assert prompt.grade(f'#### {number}9')['exact_match'] == 0


@pytest.mark.parametrize(
  ('args', 'message'),
  [
    (['--families=chess'], "error: families: got 'chess', expected one of"),
    (['--levels=9'], 'error: levels: got 9, expected one of 1, 2, 3, 4, 5'),
    (['--difficulties=4'], 'error: difficulties: got 4, expected one of'),
    ([f'--seed={2**64}'], 'error: seed: got 18446744073709551616, expected'),
    (
      ['--count=9999', '--levels=1', '--families=products', '--split=test'],
      'error: count: got 9999, expected at most',
    ),
    (['--kind=questions'], "error: families: got 'fractions', expected one of"),
  ],
)
def test_bad_flags_are_one_line(tmp_path, args, message):
  done = _problems(f'--out={tmp_path}/out.jsonl', *args)
  assert done.returncode == 1
  (error,) = [each for each in done.stderr.splitlines() if 'error:' in each]
  assert error.startswith(message)
  assert 'Traceback' not in done.stderr
  assert not (tmp_path / 'out.jsonl').exists()


def test_a_flag_that_is_no_list_of_numbers(tmp_path):
  done = _problems(f'--out={tmp_path}/out.jsonl', '--levels=1,x')
  assert done.returncode == 1
  assert 'flag --levels=1,x' in done.stderr
