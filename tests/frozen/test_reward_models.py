"""Frozen reward models: the head is there, verified, and exported."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from frozen import format as frozen_format, manifest as manifest_lib
from frozen.huggingface import exporting
from models import transformer
from models.layers import reward_head
from tests.helpers import frozen_dirs, tiny_models
from tests.helpers.open_weights import hf_files
from text import hf_tokenizer

_FAMILIES = {
  'llama': {},
  'mistral': {'window': 5, 'layer_pattern': 'l'},
  'qwen2': {'qkv_bias': True},
  'qwen3': {'qk_norm': True},
}


def _params(config, seed=0):
  head = reward_head.init(config.model_width, jax.random.key(seed))
  return {**frozen_dirs.params(config), 'heads': {'reward': head}}


def _write(directory, config=None, **fields):
  config = config or frozen_dirs.config()
  return frozen_dirs.write(
    directory, config=config, params=_params(config), **fields
  )


def test_a_reward_model_keeps_its_head(tmp_path):
  config = frozen_dirs.config()
  manifest = _write(tmp_path / 'reward')
  assert manifest.heads == ['reward']
  plain = frozen_dirs.write(tmp_path / 'plain', config=config)
  assert plain.heads == []
  assert manifest.weights_digest != plain.weights_digest
  assert manifest.num_params == plain.num_params + config.model_width
  seen = []
  opened = frozen_format.open_directory(tmp_path / 'reward')
  read = opened.read_params(lambda name, x: seen.append(name) or x)
  jax.tree.map(np.testing.assert_array_equal, read, _params(config))
  # The form in which an engine wants weights is not that of a head.
  assert not [name for name in seen if name.startswith('heads')]


def test_another_head_is_another_digest(tmp_path):
  config = frozen_dirs.config()
  found = {
    frozen_dirs.write(
      tmp_path / str(seed), config=config, params=_params(config, seed)
    ).weights_digest
    for seed in (0, 1)
  }
  assert len(found) == 2


def test_a_language_model_is_written_as_before_there_were_heads(tmp_path):
  """So that directories of before are read, and code of before reads these."""
  directory = tmp_path / 'frozen'
  frozen_dirs.write(directory)
  fields = json.loads((directory / 'manifest.json').read_text())
  assert 'heads' not in fields
  frozen = frozen_format.read(directory)
  assert frozen.manifest.heads == []
  assert frozen.params.keys() == {'params'}


def test_a_head_that_is_gone_or_unknown_is_noticed(tmp_path):
  config = frozen_dirs.config()
  directory = tmp_path / 'frozen'
  _write(directory)
  for heads, message in (
    ([], r'got float32\[24, 1\] at heads/reward/kernel, expected nothing'),
    (['value'], r"heads: got \('value',\), expected one of"),
  ):
    manifest = manifest_lib.read(directory)
    fields = dataclasses.asdict(manifest) | {'heads': heads}
    del fields['manifest_digest'], fields['format_version']
    manifest_lib.write(directory, manifest_lib.sign(**fields))
    with pytest.raises(ValueError, match=message):
      frozen_format.read(directory)
  with pytest.raises(ValueError, match='got nothing at heads/reward/kernel'):
    frozen_dirs.write(
      tmp_path / 'other',
      config=config,
      params={**frozen_dirs.params(config), 'heads': {'reward': {}}},
    )


def test_it_is_no_language_model(tmp_path):
  manifest = _write(tmp_path / 'reward')
  with pytest.raises(
    ValueError, match='model: got DIR, a reward model, expected a language mod'
  ):
    manifest.check_language_model('model', 'DIR')


@pytest.mark.parametrize('family', _FAMILIES)
def test_transformers_computes_the_same_rewards(tmp_path, family):
  torch = pytest.importorskip('torch', reason='torch is not installed')
  transformers = pytest.importorskip('transformers')
  config = frozen_dirs.config(**_FAMILIES[family])
  _write(tmp_path / 'frozen', config)
  out = tmp_path / 'out'
  exported = exporting.export_directory(tmp_path / 'frozen', out, family=family)
  assert exported.family == family
  theirs = transformers.AutoModelForSequenceClassification.from_pretrained(out)
  assert type(theirs).__name__.lower() == f'{family}forsequenceclassification'
  assert theirs.config.num_labels == 1
  frozen = frozen_format.read(tmp_path / 'frozen')
  tokens_1T = np.arange(11)[None] * 7 % 256
  hidden_1TD, _ = transformer.Transformer(frozen.config).apply(
    {'params': frozen.params['params']}, tokens_1T, method='hidden'
  )
  head = frozen.params['heads']['reward']
  ours = reward_head.rewards(head, hidden_1TD[0, -1])
  with torch.no_grad():
    logits_11 = theirs(torch.tensor(tokens_1T)).logits
  assert logits_11.shape == (1, 1)
  assert float(logits_11[0, 0]) == pytest.approx(float(ours), abs=1e-4)
  assert abs(float(ours)) > 1e-2


def test_an_end_of_answers_is_no_padding_in_an_export(tmp_path):
  """There the last token that is not padding is read."""
  source = tmp_path / 'llama3'
  hf_files.llama3(source)
  path = source / 'tokenizer_config.json'
  fields = json.loads(path.read_text())
  fields['pad_token'] = fields['eos_token']
  path.write_text(json.dumps(fields))
  tokenizer = tmp_path / 'converted'
  hf_tokenizer.convert(source, tokenizer)
  config = frozen_dirs.config(vocab_size=600)
  _write(tmp_path / 'frozen', config, tokenizer_dir=tokenizer)
  exported = exporting.export_directory(tmp_path / 'frozen', tmp_path / 'out')
  written = json.loads((tmp_path / 'out' / 'config.json').read_text())
  assert written['pad_token_id'] is None
  assert written['eos_token_id'] is not None
  assert any('no padding token was written' in n for n in exported.notes)


def test_a_family_without_such_a_classifier_is_refused_by_name(tmp_path):
  config = tiny_models.gpt2_like(vocab_size=270)
  _write(tmp_path / 'frozen', config)
  with pytest.raises(
    ValueError, match='got a reward model of the family gpt2, expected one of'
  ):
    exporting.export_directory(tmp_path / 'frozen', tmp_path / 'out')
  assert not (tmp_path / 'out').exists()
