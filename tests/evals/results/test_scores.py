"""Scores, and results that are equal after saving and loading."""

import dataclasses
import json
import math

import pytest

from evals.results import scores


def _result():
  return scores.Result(
    task='choice:a.jsonl',
    groups=(
      scores.Group(
        name='choice',
        scores=(
          scores.of_values('acc', [1.0, 0.0, 1.0], higher_is_better=True),
          scores.of_values(
            'perplexity',
            [1.0, 2.0, 3.0],
            higher_is_better=False,
            per='token',
            is_exponential=True,
          ),
        ),
        num_examples=3,
        example_ids=('1', '2', 'ä'),
        clusters=('a', 'a', 'b'),
        examples=({'id': '1', 'logprobs': [-1.5]},),
        details={'num_tokens': 9},
        notes=('a note',),
      ),
    ),
    options={'limit': 3},
    model={'name': 'tiny'},
    files={'a.jsonl': 'abc'},
  )


def test_a_score_is_a_mean_or_its_exponential():
  acc, perplexity = _result().groups[0].scores
  assert acc.value == pytest.approx(2 / 3)
  assert acc.standard_error == pytest.approx(1 / 3)
  assert perplexity.value == pytest.approx(math.exp(2))
  assert perplexity.standard_error == pytest.approx(math.exp(2) / math.sqrt(3))
  assert acc.is_share
  assert not perplexity.is_share


def test_a_saved_result_comes_back(tmp_path):
  path = tmp_path / 'a.json'
  result = _result()
  result.save(path)
  assert scores.load(path) == result


def test_a_saved_result_names_no_directory_of_the_machine(tmp_path):
  result = dataclasses.replace(
    _result(),
    task='gsm8k:/data/a/x.jsonl',
    files={'/data/a/x.jsonl': 'ab', '/data/b/x.jsonl': 'cd'},
    options={'fewshot_path': '/data/b/x.jsonl', 'limit': 3},
  )
  result.save(tmp_path / 'a.json')
  saved = scores.load(tmp_path / 'a.json')
  assert saved.task == 'gsm8k:x.jsonl'
  assert saved.files == {'x.jsonl': 'ab', 'x.jsonl 1': 'cd'}
  assert saved.options == {'fewshot_path': 'x.jsonl', 'limit': 3}


def test_what_is_not_known_is_null_and_comes_back(tmp_path):
  one = scores.of_values('acc', [1.0], higher_is_better=True)
  huge = scores.of_values(
    'perplexity', [1e4, 2e4], higher_is_better=False, is_exponential=True
  )
  group = scores.Group(name='g', scores=(one, huge), num_examples=1)
  result = scores.Result(task='choice:a', groups=(group,))
  result.save(tmp_path / 'a.json')
  text = (tmp_path / 'a.json').read_text()
  saved = json.loads(text)['groups'][0]['scores']
  assert saved[0]['standard_error'] is None
  assert saved[1]['value'] is None
  assert math.isnan(
    scores.load(tmp_path / 'a.json').score('acc').standard_error
  )


def test_values_that_are_no_numbers_are_no_score():
  with pytest.raises(ValueError, match='acc: got 2 values, 1 of them NaN'):
    scores.of_values('acc', [1.0, math.nan], higher_is_better=True)
  with pytest.raises(ValueError, match='acc: got 0 values'):
    scores.of_values('acc', [], higher_is_better=True)


def test_a_score_that_is_not_there_names_those_that_are():
  with pytest.raises(KeyError, match='expected one of acc, perplexity'):
    _result().score('f1')


@pytest.mark.parametrize('text', ['{', '[]', '{"format": 1}', '3'])
def test_a_file_that_is_no_result_is_refused(tmp_path, text):
  (tmp_path / 'a.json').write_text(text)
  with pytest.raises(ValueError, match='expected a result that an evaluation'):
    scores.load(tmp_path / 'a.json')


def test_a_result_of_another_version_is_refused(tmp_path):
  tree = _result().to_json() | {'format': 99}
  (tmp_path / 'a.json').write_text(json.dumps(tree))
  with pytest.raises(ValueError, match='got a result of format 99, expected 1'):
    scores.load(tmp_path / 'a.json')


def test_results_are_values():
  assert dataclasses.replace(_result(), task='x') != _result()
