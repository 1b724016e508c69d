"""Adapters by name: read, chosen, replaced under their name, and refused."""

import json

import numpy as np
import pytest

from frozen import adapters as frozen_adapters
from inference import adapters, generate, model_port
from inference.sampling import settings as settings_lib
from tests.helpers import commands, frozen_dirs
from tests.helpers.training import tiny_adapters
from tests.inference import conftest as life_two

_PROMPT = 'what an adapter changes is the answer to this prompt'
_SETTINGS = settings_lib.Settings(temperature=0.0, max_tokens=10, logprobs=0)


@pytest.fixture(scope='module')
def directories(frozen_dir, tmp_path_factory):
  root = tmp_path_factory.mktemp('adapters')
  for seed, name in enumerate(('one', 'two', 'three'), 1):
    generation = json.dumps({'temperature': 0.0, 'max_tokens': seed + 3})
    tiny_adapters.write(
      root / name, frozen_dir, seed=seed, rank=seed, generation=generation
    )
  return root


@pytest.fixture(scope='module')
def generator(frozen_dir, directories):
  named = {'one': f'{directories}/one', 'two': f'{directories}/two'}
  return generate.load(frozen_dir, life_two.ENGINE, adapters=named)


def _answer(generator):
  (completion,) = generator.generate([_PROMPT], _SETTINGS)
  found = [each.chosen for each in completion.logprobs]
  return completion.token_ids, np.array(found), completion.usage


@pytest.mark.slow
def test_each_name_answers_as_its_merged_directory(
  generator, frozen_dir, directories, tmp_path
):
  bases = _answer(generator)[1]
  for name in ('one', 'two'):
    merged_dir = tmp_path / name
    frozen_adapters.merge_directory(directories / name, frozen_dir, merged_dir)
    ids, found, _ = _answer(generator.adapted(name))
    merged_ids, expected, _ = _answer(
      generate.load(merged_dir, life_two.ENGINE)
    )
    assert ids == merged_ids
    # float32 rounds a kernel of about 1 by 6e-8, and sums in other orders.
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(found - bases).max() > 1e-2


@pytest.mark.slow
def test_the_settings_and_the_template_of_an_adapter_are_its_own(
  generator, frozen_dir, directories, tmp_path
):
  assert generator.adapted('two').defaults.max_tokens == 5
  assert generator.defaults.max_tokens == 12
  tiny_adapters.write(
    tmp_path / 'chat', frozen_dir, seed=5, chat_template='{{ messages }}'
  )
  base = generator.frozen
  (found,) = adapters.read({'c': f'{tmp_path}/chat'}, base).values()
  beside = generator.beside(found)
  assert beside.frozen.chat_template == '{{ messages }}'
  # What it has not, it has from its base.
  assert beside.defaults == generator.defaults
  assert generator.adapted('one').frozen.chat_template == base.chat_template


def test_other_weights_under_a_name_never_meet_the_pages_of_the_first(
  generator, directories
):

  def check(name, expected, is_cached):
    _, found, usage = _answer(generator.adapted(name))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert (usage.cached_tokens > 0) == is_cached

  generator.engine.manager.clear()
  first = _answer(generator.adapted('one'))[1]
  check('one', first, True)
  generator.unload_adapter('two')
  generator.engine.manager.clear()
  second = _answer(generator)[1]
  assert np.abs(first - second).max() > 1e-2
  check('one', first, False)  # the pages of the base are not its
  tiny_adapters.write(directories / 'new', generator.frozen.directory, seed=7)
  generator.load_adapter('one', directories / 'new')
  new, _ = _answer(generator.adapted('one'))[1:]
  assert np.abs(first - new).max() > 1e-2
  generator.engine.manager.clear()
  check('one', new, False)  # no page of the first was met before either
  generator.load_adapter('one', directories / 'one')
  check('one', first, False)
  generator.load_adapter('two', directories / 'two')
  assert generator.weights_digest() == generator.frozen.manifest.weights_digest


def test_evaluations_measure_the_adapter(generator):
  model = model_port.evaluated(generator.adapted('one'))
  base = model_port.evaluated(generator)
  digest = generator.adapted('one').adapter_digest
  assert model.description['adapter_digest'] == digest
  assert 'adapter_digest' not in base.description
  pairs = [(tuple(b'what an'), tuple(b' adapter'))]
  assert model.logprob_fn
  assert base.logprob_fn
  (adapted,), (plain,) = model.logprob_fn(pairs), base.logprob_fn(pairs)
  assert abs(adapted.logprob - plain.logprob) > 0.1


@pytest.mark.slow
def test_wrong_adapters_are_refused(
  generator, frozen_dir, directories, tmp_path
):
  with pytest.raises(ValueError, match="got 'none', expected one of the names"):
    generator.adapted('none')
  # The engine takes ranks up to the largest that it was made with.
  with pytest.raises(ValueError, match=r'got rank 3 .*max_adapter_rank'):
    generator.load_adapter('one', directories / 'three')
  assert _answer(generator.adapted('one'))[2]  # it is still there
  tiny_adapters.write(tmp_path / 'more', frozen_dir, seed=9)
  with pytest.raises(ValueError, match=r'expected at most 2 \(engine.max_ada'):
    generator.load_adapter('more', tmp_path / 'more')
  other = tmp_path / 'other'
  config = frozen_dirs.config(num_layers=1)
  params = frozen_dirs.params(config, seed=8)
  digest = frozen_dirs.write(other, config=config, params=params)
  digest = digest.weights_digest
  tiny_adapters.write(tmp_path / 'of_other', other, seed=1)
  with pytest.raises(ValueError, match=f'with weights {digest[:12]}, expected'):
    generator.load_adapter('one', tmp_path / 'of_other')
  with pytest.raises(FileNotFoundError, match='expected an adapter directory'):
    generator.load_adapter('one', tmp_path / 'nothing')
  with pytest.raises(ValueError, match='set engine.max_adapters'):
    generate.load(frozen_dir, life_two.ENGINE).load_adapter(
      'one', directories / 'one'
    )


@pytest.mark.parametrize(
  ('texts', 'message'),
  [
    (['one'], "got 'one', expected NAME=PATH"),
    (['=d'], "got '=d', expected NAME=PATH"),
    (['one='], "got 'one=', expected NAME=PATH"),
    (['a@b=d'], 'without @'),
    (['a=d', 'a=e'], "got the name 'a' twice"),
  ],
)
def test_a_wrong_flag_is_refused(texts, message):
  with pytest.raises(ValueError, match=message):
    adapters.parsed(texts)


def test_the_flag_names_directories():
  named = adapters.parsed(['sql=runs/a', ' b = c=d '])
  assert named == {'sql': 'runs/a', 'b': 'c=d'}


def _flags(frozen_dir, directories, name):
  return (
    f'--model={frozen_dir}',
    f'--adapters=one={directories}/one,two={directories}/two',
    f'--adapter={name}',
    '--prompt=hello',
    '--temperature=0',
    '--max_tokens=6',
  )


@pytest.mark.slow
def test_the_command_answers_with_an_adapter(
  generator, frozen_dir, directories
):
  done = commands.run('serve.py', *_flags(frozen_dir, directories, 'two'))
  assert done.returncode == 0, done.stderr
  settings = settings_lib.Settings(temperature=0.0, max_tokens=6)
  two = generator.adapted('two')
  (completion,) = two.generate(['hello'], settings)
  assert done.stdout.startswith(f'hello{completion.text}\n')
  assert f'adapter         {two.adapter_digest} (two)' in done.stdout
  assert 'unchanged' in done.stdout


def test_the_command_refuses_a_name_that_no_adapter_has(
  frozen_dir, directories
):
  done = commands.run('serve.py', *_flags(frozen_dir, directories, 'three'))
  assert done.returncode == 2
  assert "got 'three', expected one of the names of" in done.stderr
