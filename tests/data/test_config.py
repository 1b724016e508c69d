"""Settings that cannot work are refused by name."""

import subprocess
import sys

import pytest

from data import config, sources


@pytest.mark.parametrize('packing', config.PACKINGS)
def test_defaults_are_valid_with_every_packing(packing):
  settings = config.DataConfig(packing=packing)
  settings.validate()  # raises for what is not
  assert settings.packing == packing


@pytest.mark.parametrize(
  ('fields', 'error'),
  [
    ({'packing': 'tight'}, "data.packing is 'tight', expected one of concat"),
    ({'row_length': 0}, 'data.row_length is 0, expected at least 1'),
    ({'batch_size': 0}, 'data.batch_size is 0, expected at least 1'),
    ({'shuffle_rows': -1}, 'data.shuffle_rows is -1, expected at least 0'),
    ({'num_threads': 0}, 'data.num_threads is 0, expected at least 1'),
    ({'prefetch_rows': -1}, 'data.prefetch_rows is -1, expected at least 0'),
  ],
)
def test_data_config_refuses(fields, error):
  with pytest.raises(ValueError, match=error):
    config.DataConfig(**fields).validate()


@pytest.mark.parametrize(
  ('fields', 'error'),
  [
    ({'kind': 'word'}, "tokenizer.kind is 'word', expected one of byte, bpe"),
    ({'kind': 'directory'}, 'tokenizer.path is empty, expected a directory'),
    ({'kind': 'bpe', 'path': 'x'}, "tokenizer.path is 'x' but .* is 'bpe'"),
    ({'train_bytes': 0}, 'tokenizer.train_bytes is 0, expected at least 1'),
  ],
)
def test_tokenizer_config_refuses(fields, error):
  tokenizer = config.TokenizerConfig(**fields)
  with pytest.raises(ValueError, match=error):
    config.DataConfig(tokenizer=tokenizer).validate()


def test_open_split_passes_the_fields_on():
  seen = []

  def open_source(*args):
    seen.append(args)
    return sources.text_files(__file__)

  data = config.DataConfig(
    open_source=open_source,
    path='p',
    data_dir='d',
    text_key='k',
  )
  data.open_split('test')
  assert seen == [('p', 'test', 'd', 'k')]


def test_config_stays_light():
  # `train.py --help` and flag errors read experiments, which read this.
  code = (
    'import sys; from data import config; '
    'print(sorted({"jax", "grain", "tensorflow"} & set(sys.modules)))'
  )
  result = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )
  assert result.stdout.strip() == '[]'
