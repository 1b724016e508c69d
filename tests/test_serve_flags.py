"""The flags of serve.py: their defaults, the ways that heed them, the name."""

import dataclasses
import re

from absl import flags
import pytest

from frozen import manifest as manifest_lib
from inference import adapters, generate
from inference.engine import engine_config
from inference.server import server_config
import serve
from tests.helpers import commands, frozen_dirs


@pytest.fixture
def defined_flags():
  """Defines the flags of serve.py, unparsed."""
  with commands.own_flags():
    serve._define_flags()
    yield


def test_flags_of_the_engine_come_before_the_defaults_of_a_way(defined_flags):
  assert serve._engine_config() == engine_config.EngineConfig()
  flags.FLAGS['engine.page_size'].value = 8
  flags.FLAGS['engine.decode_shapes'].value = [2, 32]
  assert serve._engine_config(
    page_size=4, chunk_tokens=128
  ) == engine_config.EngineConfig(
    page_size=8, chunk_tokens=128, decode_shapes=(2, 32)
  )


@pytest.mark.parametrize(
  'given',
  [
    {'max_chunks': 4},
    {'max_chunks': 1},
    {'max_mixed_chunks': 2},
    {'max_sequences': 3},
    {'decode_shapes': [2, 4]},
  ],
)
def test_defaults_of_a_way_follow_given_flags(
  given, defined_flags, monkeypatch
):
  made = []
  monkeypatch.setattr(
    generate, 'load', lambda _, config, **how: made.append(config)
  )
  flags.FLAGS(['serve.py', '--model=anything'])
  for name, value in given.items():
    flags.FLAGS[f'engine.{name}'].value = value
  serve._load_small(2)
  for name, value in given.items():
    value = tuple(value) if isinstance(value, list) else value
    assert getattr(made[0], name) == value


def test_every_flag_says_which_ways_heed_it(defined_flags):
  for name, ways in {
    'model': serve._WAYS,
    'n': ('prompt',),
    'top_p': ('prompt', 'chat'),
    'engine.page_size': ('prompt', 'chat', 'port', 'eval'),
    'compilation_cache': ('prompt', 'chat', 'port', 'eval'),
    'eval.limit': ('eval',),
    'server.max_body_bytes': ('port',),
    'eval_out': ('eval',),
    'api_keys': ('port',),
  }.items():
    assert name in flags.FLAGS
    assert serve._heeded_by(name) == ways
  assert serve._HEEDED_BY.keys() <= set(flags.FLAGS)


# Flags whose help speaks of files, and whose values are no single path.
_NO_PATHS = {
  'adapters': 'NAME=PATH, see `paths.named`',
  'server.scorers': 'NAME=PATH, see `paths.named`',
  'eval': 'KIND:FILE, see `evaluate.parsed`',
  'config': 'an experiment or a file, see `subject.of`',
  'name': 'a name',
}


def test_every_flag_with_a_path_replaces_the_home(defined_flags, monkeypatch):
  monkeypatch.setenv('HOME', '/h')
  found = []
  for flag in flags.FLAGS.get_key_flags_for_module('serve'):
    name = flag.name
    if name in _NO_PATHS:
      continue
    is_text = isinstance(flag.parser, flags.ArgumentParser) and not flag.boolean
    if is_text and re.search(r'[Dd]irectory|\b[Ff]ile\b|[Pp]ath', flag.help):
      flag.parse('~/x')
      assert flag.value == '/h/x', name
      found.append(name)
  assert {'model', 'engine.draft_model', 'server.models_root'} <= set(found)
  assert adapters.parsed(['sql=~/x']) == {'sql': '/h/x'}
  config = server_config.ServerConfig(scorers='a=~/x, b = ~/y')
  assert config.scorer_directories == {'a': '/h/x', 'b': '/h/y'}


@pytest.mark.parametrize(
  ('directory', 'name', 'expected'),
  [
    ('/models/llama', None, 'llama'),
    ('/models/llama/', None, 'llama'),
    ('/models/llama', 'mine', 'mine'),
    # A run calls every frozen directory so.
    ('/runs/s/frozen', None, 'my model'),
  ],
)
def test_the_served_name_is_no_path(directory, name, expected, defined_flags):
  flags.FLAGS(
    ['serve.py', f'--model={directory}', *([f'--name={name}'] if name else [])]
  )
  provenance = frozen_dirs.provenance(experiment='import /local/my model')
  fields = {
    each.name: None for each in dataclasses.fields(manifest_lib.Manifest)
  }
  manifest = manifest_lib.Manifest(**fields | dataclasses.asdict(provenance))
  assert serve._served_name(manifest) == expected


def test_an_empty_name_is_refused(defined_flags, capsys):
  flags.FLAGS(['serve.py', '--model=m', '--name= '])
  with pytest.raises(SystemExit):
    serve._served_name(None)
  assert '--name: got an empty name' in capsys.readouterr().err
