"""Verifiers by the command line: answers in a file, and those of a model."""

import json

import pytest

from evals import evaluate, options as options_lib, ports
from evals.results import scores
from tests.helpers import commands, eval_models


def _file(path, *lines):
  path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
  return str(path)


def test_the_command_scores_a_file(tmp_path):
  source = _file(
    tmp_path / 'answers.jsonl',
    {'completion': 'def f(x): return x', 'tests': 'assert f(1) == 1', 'n': 7},
    {'completion': 'def f(x): return 0', 'tests': 'assert f(1) == 1'},
  )
  out = tmp_path / 'scored.jsonl'
  done = commands.run(
    'evals/verify.py', '--verifier=unit_tests', f'--input={source}',
    f'--out={out}',
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert '2 answers, mean score 0.5000 +- 0.5000' in done.stdout
  first, second = map(json.loads, out.read_text().splitlines())
  assert (first['score'], first['n']) == (1.0, 7)
  assert second['reason'].startswith('0 of 1 tests passed; AssertionError')


@pytest.mark.parametrize(
  ('line', 'verifier', 'said'),
  [
    ({'completion': 'x'}, 'number', 'line 1: answer: got none, expected text'),
    ({'answer': '1'}, 'number', 'expected completion'),
    ({'completion': 3, 'answer': '1'}, 'number', 'completion: got 3, expected'),
  ],
)
def test_the_command_refuses_a_wrong_line(tmp_path, line, verifier, said):
  source = _file(tmp_path / 'answers.jsonl', line)
  done = commands.run(
    'evals/verify.py', f'--verifier={verifier}', f'--input={source}',
    f'--out={tmp_path / "out"}',
  )  # fmt: skip
  assert done.returncode == 2
  assert said in done.stderr
  assert not (tmp_path / 'out').exists()


def _model(answers):
  def sample(prompts, settings, num_samples):
    del settings
    return [
      [ports.Completion(answers[bytes(p).decode()][i], ()) for i in
       range(num_samples)] for p in prompts
    ]  # fmt: skip

  return eval_models.model(max_length=4096, sample_fn=sample)


def test_a_model_is_measured_by_several_verifiers(tmp_path):
  path = _file(
    tmp_path / 'prompts.jsonl',
    {'prompt': 'sum', 'verifier': 'number', 'answer': '4', 'id': 'a'},
    {'prompt': 'find', 'verifier': 'pattern', 'pattern': '^(a+)+$', 'id': 'b'},
  )
  model = _model({'sum': ['4', '5'], 'find': ['a' * 40 + '!', 'aa']})
  options = options_lib.Options(num_samples=2, temperature=1.0)
  result = evaluate.run(f'verify:{path}', model, options)
  assert result.score('score').values == (0.5, 0.5)
  assert result.score('pass@2').value == 1.0
  (group,) = result.groups
  assert group.notes == (
    '1 completions count as 0 because their verifier failed; the first:'
    ' pattern: it computed for 1 s',
  )
  saved = tmp_path / 'result.json'
  result.save(saved)
  assert scores.load(saved).score('score').value == 0.5


@pytest.mark.parametrize(
  ('line', 'said'),
  [
    ({'prompt': 'p', 'verifier': 'magic'}, "got 'magic', expected one of numb"),
    ({'prompt': 'p', 'verifier': 'number', 'answer': 'x'}, "answer: got 'x'"),
    ({'prompt': '', 'verifier': 'number', 'answer': '1'}, 'prompt: got'),
    ({'prompt': 'p', 'verifier': 'number', 'answr': '1'}, 'got the fields'),
  ],
)
def test_a_wrong_line_is_refused_before_the_model_is_asked(
  tmp_path, line, said
):
  path = _file(tmp_path / 'prompts.jsonl', line)
  with pytest.raises(ValueError, match=said):
    evaluate.open_task(f'verify:{path}')
