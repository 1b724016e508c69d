"""Tasks by name: their files, options, scores and errors."""

import dataclasses
import json
import sys

import pytest

from evals import evaluate, options as options_lib
from evals.results import report, scores
from evals.tasks import task as task_lib
from storage import digests
from tests.helpers import eval_models


@pytest.fixture
def files(tmp_path):
  """Returns a directory with a file of each kind."""
  (tmp_path / 'text.txt').write_text('Once upon a time. ' * 20)
  lines = {
    'choice': {'context': 'Is it?', 'choices': ['yes', 'no'], 'label': 0},
    'generate': {'prompt': 'say a', 'answer': 'a'},
    'gsm8k': {'question': '1+1?', 'answer': '#### 2'},
  }
  for kind, line in lines.items():
    text = ''.join(
      json.dumps(line | {'id': f'{kind} {i}'}) + '\n' for i in range(4)
    )
    (tmp_path / f'{kind}.jsonl').write_text(text)
  return tmp_path


def test_perplexity_by_name(files):
  task = f'perplexity:{files}/text.txt'
  model = eval_models.model(description={'name': 'table'})
  result = evaluate.run(task, model, options_lib.Options(stride=8))
  assert result.task == task
  assert result.model == {'name': 'table'}
  assert result.options['stride'] == 8
  assert result.groups[0].details['stride'] == 8
  (digest,) = result.files.values()
  assert digest == digests.of_file(files / 'text.txt')
  assert 'bits_per_byte' in report.text(result)
  json.dumps(result.to_json(), allow_nan=False)


def test_choices_by_name(files):
  result = evaluate.run(
    f'choice:{files}/choice.jsonl',
    eval_models.model(),
    options_lib.Options(limit=3),
  )
  assert result.groups[0].num_examples == 3
  # The same question four times gets the same answer.
  assert result.score('acc').value in (0.0, 1.0)


def test_generation_by_name(files):
  seen = []
  model = eval_models.model(
    max_length=64, sample_fn=eval_models.writer([['a', 'b']] * 4, seen=seen)
  )
  result = evaluate.run(
    f'generate:{files}/generate.jsonl',
    model,
    options_lib.Options(max_tokens=4, temperature=0.5, num_samples=2, seed=3),
  )
  assert result.score('pass@2').value == 1.0
  assert seen[0][1].seed == 3
  assert (seen[0][1].max_tokens, seen[0][1].temperature) == (4, 0.5)


def test_gsm8k_by_name(files):
  sample = eval_models.writer([['#### 2'], ['2'], ['#### 3'], ['']])
  model = eval_models.model(max_length=200, sample_fn=sample)
  options = options_lib.Options(
    max_tokens=16, num_fewshot=2, fewshot_path=f'{files}/gsm8k.jsonl'
  )
  result = evaluate.run(f'gsm8k:{files}/gsm8k.jsonl', model, options)
  assert result.score('exact_match').values == (1.0, 0.0, 0.0, 0.0)
  assert result.score('exact_match_last').value == 0.5


def test_a_task_is_read_once_for_many_models(files):
  task = evaluate.open_task(f'choice:{files}/choice.jsonl')
  (files / 'choice.jsonl').unlink()
  assert task.run(eval_models.model()) == task.run(eval_models.model())


@pytest.mark.parametrize('task', ['perplexity', 'perplexity:', 'x:y', '', 'a'])
def test_a_name_that_is_no_task_is_refused(task):
  with pytest.raises(ValueError, match='expected KIND:FILE, where KIND is one'):
    evaluate.open_task(task)


@pytest.mark.parametrize(
  ('fields', 'words'),
  [
    ({'limit': -1}, 'limit: got -1'),
    ({'max_tokens': 0}, 'max_tokens: got 0'),
    ({'temperature': -0.5}, 'temperature: got -0.5'),
    ({'num_fewshot': -1}, 'num_fewshot: got -1'),
  ],
)
def test_options_out_of_range_are_refused(fields, words):
  with pytest.raises(ValueError, match=words):
    options_lib.Options(**fields)


@pytest.mark.parametrize(
  ('kind', 'fields'),
  [
    ('choice', {'stride': 4}),
    ('choice', {'num_samples': 2}),
    ('choice', {'seed': 3}),
    ('perplexity', {'chat': True}),
    ('generate', {'num_fewshot': 2}),
  ],
)
def test_an_option_that_would_be_ignored_is_refused(kind, fields):
  (name,) = fields
  with pytest.raises(ValueError, match=f'{name}: got .* of kind {kind}'):
    evaluate.open_task(f'{kind}:a.jsonl', options_lib.Options(**fields))


@pytest.mark.parametrize('kind', [k for k in evaluate.KINDS if k != 'lm_eval'])
def test_a_file_that_is_missing_is_named(kind, tmp_path):
  path = tmp_path / 'none.jsonl'
  with pytest.raises(FileNotFoundError, match=f'^{path}: got no such file'):
    evaluate.open_task(f'{kind}:{path}')


def test_a_new_kind_is_a_class_and_a_line(files, monkeypatch):
  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Lengths(task_lib.Task):
    READS = ('limit',)
    lines: list[str]

    @classmethod
    def read(cls, path, options):
      lines = (files / path).read_text().splitlines()[: options.limit or None]
      return cls(options=options, files={}, lines=lines)

    def measure(self, model):
      values = [len(model.tokenizer.encode(line)) for line in self.lines]
      score = scores.of_values('length', values, higher_is_better=False)
      return (
        scores.Group(name='lengths', scores=(score,), num_examples=len(values)),
      )

  monkeypatch.setattr(evaluate, 'KINDS', {**evaluate.KINDS, 'lengths': Lengths})
  (files / 'words').write_text('a\nbcd\nefghi')
  options = options_lib.Options(limit=2)
  result = evaluate.run('lengths:words', eval_models.model(), options)
  assert (result.task, result.score('length').value) == ('lengths:words', 2.0)
  assert result.options['limit'] == 2
  with pytest.raises(ValueError, match='chat: .* of kind lengths, .* generate'):
    evaluate.open_task('lengths:words', options_lib.Options(chat=True))
  with pytest.raises(ValueError, match='KIND is one .*, lengths, as in'):
    evaluate.open_task('lengthy:words')


def test_every_kind_reads_options_that_exist():
  names = {field.name for field in dataclasses.fields(options_lib.Options)}
  read = [set(kind.READS) for kind in evaluate.KINDS.values()]
  assert all(each <= names for each in read)
  assert set.union(*read) == names


def test_a_model_that_cannot_is_refused(files):
  with pytest.raises(ValueError, match='sample_fn: got none'):
    evaluate.run(
      f'gsm8k:{files}/gsm8k.jsonl',
      eval_models.model(max_length=600),
    )


def test_lm_eval_is_asked_for_where_it_is_not_installed(monkeypatch):
  monkeypatch.setitem(sys.modules, 'lm_eval', None)
  # Other tests may have imported the module: remove it everywhere.
  monkeypatch.delitem(sys.modules, 'evals.harness.lm_eval_tasks', raising=False)
  monkeypatch.delattr('evals.harness.lm_eval_tasks', raising=False)
  with pytest.raises(ModuleNotFoundError, match='requirements-eval.txt'):
    evaluate.open_task('lm_eval:arc_easy')
