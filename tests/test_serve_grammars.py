"""serve.py --prompt with a grammar."""

import re

import pytest

from tests.helpers import commands, frozen_dirs

pytest.importorskip('llguidance')


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  directory = tmp_path_factory.mktemp('grammars') / 'tiny'
  frozen_dirs.write(
    directory, config=frozen_dirs.config(num_layers=1, max_length=32)
  )
  return directory


@pytest.mark.slow
@pytest.mark.parametrize(
  ('flags', 'language'),
  [
    (['--regex=[ab]{3}'], '[ab]{3}'),
    (['--choice=xx', '--choice=yyy'], 'xx|yyy'),
    (['--json_schema={schema}'], r'\[\s*(true|false)\s*,\s*(true|false)\s*\]'),
    (['--lark={lark}'], 'c+d'),
  ],
)
def test_a_completion_is_of_its_grammar(model, tmp_path, flags, language):
  schema, lark = tmp_path / 'schema.json', tmp_path / 'lark'
  schema.write_text(
    '{"type": "array", "items": {"type": "boolean"}, "minItems": 2,'
    ' "maxItems": 2}'
  )
  lark.write_text('start: "c"+ "d"')
  done = commands.run(
    'serve.py',
    f'--model={model}',
    '--prompt=a:',
    '--seed=1',
    '--max_tokens=20',
    *(
      each.replace('{schema}', str(schema)).replace('{lark}', str(lark))
      for each in flags
    ),
  )
  assert (done.returncode, done.stderr) == (0, '')
  text = done.stdout.removeprefix('a:').partition('\n\nprefill')[0]
  # A long run of c is cut by max_tokens.
  assert re.fullmatch(language, text) or set(text) == {'c'}


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize(
  ('flags', 'words'),
  [
    (['--prompt=a', '--regex=a', '--choice=b'], 'got --regex and --choice'),
    (['--prompt=a', '--json_schema=none.json'], '--json_schema: got '),
    (['--prompt=a', '--regex=('], 'regex: got one that cannot be kept'),
    (['--chat', '--regex=a'], 'got --regex with --chat'),
  ],
)
def test_a_grammar_that_cannot_be_kept_is_one_line(model, flags, words):
  done = commands.run('serve.py', f'--model={model}', *flags)
  assert done.returncode == 2
  assert words in done.stderr
  assert done.stderr.count('\n') == 1
