"""Settings that cannot work are refused by name."""

import subprocess
import sys

import pytest

from data import data_config, sources


@pytest.mark.parametrize('packing', data_config.PACKINGS)
def test_defaults_are_valid_with_every_packing(packing):
  settings = data_config.DataConfig(packing=packing)
  settings.validate()  # raises for what is not
  assert settings.packing == packing


@pytest.mark.parametrize(
  ('fields', 'error'),
  [
    ({'packing': 'tight'}, "data.packing: got 'tight', expected one of concat"),
    ({'row_length': 0}, 'data.row_length: got 0, expected at least 1'),
    ({'batch_size': 0}, 'data.batch_size: got 0, expected at least 1'),
    ({'num_workers': -1}, 'data.num_workers: got -1, expected at least 0'),
    ({'contamination_ngram': -2}, 'contamination_ngram: got -2, expected at'),
    ({'contamination_warning': 2.0}, 'data.contamination_warning: got 2.0, e'),
    ({'num_threads': 0}, 'data.num_threads: got 0, expected at least 1'),
    ({'prefetch_rows': -1}, 'data.prefetch_rows: got -1, expected at least'),
  ],
)
def test_data_config_refuses(fields, error):
  with pytest.raises(ValueError, match=error):
    data_config.DataConfig(**fields).validate()


def _source(**fields):
  return data_config.SourceConfig(open_source=sources.text_files, **fields)


@pytest.mark.parametrize('weight', [0.0, -1.0, float('nan'), float('inf')])
def test_weights_that_are_no_shares_are_refused(weight):
  mixed = _source(name='good'), _source(name='bad', weight=weight)
  with pytest.raises(
    ValueError, match=f'data.sources: got weight {weight} for bad, expected'
  ):
    data_config.DataConfig(sources=mixed).validate()


def test_sources_of_one_name_are_refused():
  mixed = _source(path='a'), _source(path='b')
  with pytest.raises(ValueError, match='got several called text_files, exp'):
    data_config.DataConfig(sources=mixed).validate()


def test_a_single_source_is_a_mix_of_one():
  data = data_config.DataConfig(
    open_source=sources.jsonl, path='p', text_key='k', train_split='t'
  )
  (source,) = data.train_sources()
  assert source == data_config.SourceConfig(
    open_source=sources.jsonl, path='p', split='t', text_key='k', name='jsonl'
  )
  assert data.eval_source().split == 'validation'


@pytest.mark.parametrize(
  ('fields', 'error'),
  [
    ({'kind': 'word'}, "tokenizer.kind: got 'word', expected one of byte, bpe"),
    ({'kind': 'directory'}, "tokenizer.path: got '', expected a directory"),
    (
      {'kind': 'bpe', 'path': 'x'},
      "tokenizer.path: got 'x', expected '' for kind 'bpe'",
    ),
    ({'train_bytes': 0}, 'tokenizer.train_bytes: got 0, expected at least 1'),
  ],
)
def test_tokenizer_config_refuses(fields, error):
  tokenizer = data_config.TokenizerConfig(**fields)
  with pytest.raises(ValueError, match=error):
    data_config.DataConfig(tokenizer=tokenizer).validate()


def test_opening_passes_the_fields_on():
  seen = []

  def open_source(*args):
    seen.append(args)
    return sources.text_files(__file__)

  data = data_config.DataConfig(
    open_source=open_source,
    path='p',
    data_dir='d',
    text_key='k',
    eval_split='test',
  )
  data.eval_source().open(data.data_dir)
  assert seen == [('p', 'test', 'd', 'k')]


def test_config_stays_light():
  # `train.py --help` and flag errors read experiments, which read this.
  code = (
    'import sys; from data import data_config; '
    'print(sorted({"jax", "grain", "tensorflow"} & set(sys.modules)))'
  )
  result = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )
  assert result.stdout.strip() == '[]'
