"""recipe.json: what a frozen directory says of how it was made."""

import json

import pytest

from frozen import recipe


def records(workdir, num_steps):
  lines = [
    json.dumps({'kind': kind, 'step': step, 'loss': 1 / step})
    for step in range(1, num_steps + 1)
    for kind in ('train', 'speed')
  ]
  (workdir / 'metrics.jsonl').write_text('\n'.join([*lines, '{"kind": "tr']))


@pytest.mark.parametrize('num_steps', [1, 32, 33, 500, 5_000])
def test_a_trace_has_the_first_steps_and_few_others(tmp_path, num_steps):
  records(tmp_path, num_steps)
  found = recipe.trace(tmp_path, num_steps)
  steps = [step for step, _ in found]
  assert steps == sorted(set(steps))
  assert steps[:32] == list(range(1, min(num_steps, 32) + 1))
  assert len(steps) <= 256
  assert num_steps - steps[-1] <= num_steps / 200
  assert all(loss == 1 / step for step, loss in found)


def test_a_trace_ends_at_the_weights(tmp_path):
  records(tmp_path, 40)
  assert recipe.trace(tmp_path, 7)[-1] == [7, 1 / 7]
  assert recipe.trace(tmp_path / 'none', 7) == []


def test_places_of_a_machine_are_left_out(tmp_path):
  run = {
    'code_commit': 'abc',
    'lineage': {},
    'config': {
      'data': {'path': '~/texts/corpus/{split}.txt', 'data_dir': '~/texts/x'},
      'init_from': '~/models/base',
      'tokenizer': {'path': '~/models/base/tokenizer'},
      'evals': {'tasks': ['perplexity:/texts/me/book.txt', 'a:b.txt']},
      'seed': 3,
    },
  }
  made = recipe.of_run(tmp_path, run, 5)
  assert 'texts' not in json.dumps(made)
  assert made['experiment'] == {
    'data': {'path': 'corpus/{split}.txt'},
    'init_from': 'base',
    'tokenizer': {'path': 'base/tokenizer'},
    'evals': {'tasks': ['perplexity:book.txt', 'a:b.txt']},
    'seed': 3,
  }
  assert made['step'] == 5
  assert recipe.of_run(tmp_path, {'config': None}, 5) == {}


@pytest.mark.parametrize(
  ('text', 'words'),
  [
    (None, 'got no recipe.json'),
    ('{', 'cannot be read'),
    ('[]', 'cannot be read'),
    ('{"format_version": 9}', 'got format version 9'),
  ],
)
def test_a_directory_without_a_recipe_is_refused(tmp_path, text, words):
  if text is not None:
    (tmp_path / 'recipe.json').write_text(text)
  with pytest.raises(ValueError, match=words):
    recipe.read(tmp_path)
