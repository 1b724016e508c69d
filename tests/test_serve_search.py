"""serve.py --prompt with a strategy: receipts, budgets, the effort auto."""

import re

import pytest

from frozen import effort_predictor
from tests.helpers import commands, frozen_dirs
from tests.helpers.serving import effort_predictors


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
  return tmp_path_factory.mktemp('search')


@pytest.fixture(scope='module')
def model(directory):
  config = frozen_dirs.config(num_layers=1, max_length=32)
  manifest = frozen_dirs.write(directory / 'tiny', config=config)
  return directory / 'tiny', manifest.weights_digest, config.model_width


@pytest.fixture(scope='module')
def predictor(model, directory):
  _, digest, width = model
  found = effort_predictors.of_length(width, digest, least=4)
  effort_predictor.save(directory / 'effort.json', found)
  return directory / 'effort.json'


def _ask(model, *flags, prompt='abcd:'):
  fixed = f'--model={model[0]}', f'--prompt={prompt}', '--seed=1'
  return commands.run('serve.py', *fixed, '--max_tokens=6', *flags)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('flags', 'words'),
  [
    (['--strategy=best_of_n:3'], '3 samples, ended by done'),
    (
      [
        '--strategy=best_of_n:2',
        '--scorer=number',
        '--record={"answer": "42"}',
      ],
      '2 samples, ended by done',
    ),
    (['--strategy=best_of_n:2:column_sum'], '2 samples, ended by done'),
    (['--strategy=self_consistency:8', '--budget=tokens:9'], 'ended by budget'),
  ],
)
def test_a_strategy_answers_with_its_receipt(model, flags, words):
  done = _ask(model, *flags)
  assert (done.returncode, done.stderr) == (0, '')
  assert words in done.stdout
  kept, discarded = re.findall(
    r'(\d+) of the answer, (\d+) discarded', done.stdout
  )[0]
  assert int(kept) > 0
  if '--budget=tokens:9' in flags:
    assert int(kept) + int(discarded) <= 9


@pytest.mark.slow
@pytest.mark.parametrize(
  ('prompt', 'effort'), [('a', 'once'), ('abcd:', 'self_consistency:4')]
)
def test_auto_takes_the_effort_that_is_predicted(
  model, predictor, prompt, effort
):
  flags = ['--strategy=auto', f'--effort_predictor={predictor}']
  done = _ask(model, *flags, prompt=prompt)
  assert (done.returncode, done.stderr) == (0, '')
  assert re.search(rf'^effort +{effort}$', done.stdout, re.M)
  assert 'probabilities' in done.stdout
  if effort != 'once':
    done = _ask(model, *flags, '--budget=flops:1e9', prompt=prompt)
    assert re.search('^effort +once$', done.stdout, re.M)


@pytest.mark.parametrize(
  ('flags', 'words'),
  [
    (['--strategy=vote:3'], "strategy: got 'vote'"),
    (['--strategy=beam'], 'expected beam:NUMBER'),
    (['--strategy=best_of_n:2', '--n=2'], '--n: got 2 with --strategy'),
    (['--strategy=best_of_n:2', '--temperature=0'], 'would be the same'),
    (['--strategy=once', '--budget=money:1'], 'only a server has prices'),
    (['--strategy=once', '--budget=pages:1'], 'expected UNIT:NUMBER'),
    (['--strategy=once', '--reward_model=x'], 'scores nothing'),
    (['--strategy=wait:1', '--reasoning_budget=5'], 'marks no reasoning'),
    (['--strategy=once', '--scorer=self'], '--scorer: got one with the'),
    (['--strategy=best_of_n:2', '--scorer=x'], "--scorer: got 'x', expected"),
    (['--strategy=best_of_n:2', '--scorer=number'], '--record: got None with'),
    (
      ['--strategy=best_of_n:2', '--scorer=number', '--record={'],
      '--record: got {, expected JSON',
    ),
    (
      ['--strategy=best_of_n:2', '--scorer=self', '--record={"answer": "1"}'],
      'and none without',
    ),
    (
      ['--strategy=self_consistency:2', '--scorer=likelihood'],
      'expected weights from 0',
    ),
    (
      ['--strategy=best_of_n:2', '--scorer=self', '--reward_model=x'],
      'expected one of them',
    ),
    (['--strategy=once:self'], 'expected once alone'),
    (['--strategy=best_of_n:2:x'], "with the scorer 'x', expected one of like"),
    (['--strategy=best_of_n:2:number'], 'None with the scorer number, expec'),
    (
      ['--strategy=best_of_n:2:column_sum', '--record={"answer": "1"}'],
      'and none without',
    ),
    (
      ['--strategy=best_of_n:2:column_sum', '--scorer=self'],
      '--scorer: got it and the strategy with the scorer column_sum',
    ),
    (['--strategy=auto'], '--effort_predictor=None, expected auto and'),
    (['--strategy=once', '--effort_predictor=x'], 'expected auto and'),
    (['--strategy=auto', '--effort_predictor=none.json'], 'none.json'),
    (
      ['--strategy=auto', '--effort_predictor={other}'],
      "predictor of the model 'other'",
    ),
    (['--strategy=auto', '--effort_predictor={model}'], 'no predictor of'),
  ],
)
def test_a_wrong_flag_is_refused(model, directory, flags, words):
  other = effort_predictors.of_length(model[2], 'other', least=4)
  effort_predictor.save(directory / 'other.json', other)
  names = {
    '{other}': directory / 'other.json',
    '{model}': model[0] / 'manifest.json',
  }
  for name, path in names.items():
    flags = [each.replace(name, str(path)) for each in flags]
  done = _ask(model, *flags)
  assert done.returncode == 2
  assert done.stderr.startswith('error: ')
  assert done.stderr.count('\n') == 1
  assert words in done.stderr
