"""A chat model, imported, fine-tuned, frozen, exported, imported again.

Every file and every field of the manifest is compared. A file or a field that
may differ is listed here with its reason.
"""

import dataclasses
import json

import numpy as np
import pytest

from data import data_config
from frozen import format as frozen_format, freeze, manifest as manifest_lib
from frozen.huggingface import (
  config_json,
  exporting,
  importing,
  safetensors_files,
)
from tests.helpers import frozen_dirs, tiny_models
from tests.helpers.open_weights import hf_files
from tests.helpers.training import tiny_run
from text import tokenizer as tokenizer_lib
from training import experiment as experiment_lib

TEMPLATE = (
  '{% for m in messages %}<|im_start|>{{ m.role }}\r\n{{ m.content }}<|im_end|>'
  '\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n'
  '{% endif %}'
)
GENERATION = {
  'do_sample': False,
  'eos_token_id': [332, 330],
  'max_new_tokens': 77,
  'repetition_penalty': 1.1,
  'transformers_version': '4.51.0',
}
# Fields of the manifest that training changes.
TRAINED = {
  'experiment': 'the run that trained last',
  'code_commit': 'of that run',
  'step': 'of that run; `lineage` names the weights before',
  'tokens_seen': 'of that run',
  'training_flops': 'of that run',
  'train_seconds': 'of that run',
  'data_mix': 'of that run',
  'has_bos': 'training puts BOS, or else EOS, before each document',
  'lineage': 'names the imported weights',
  'weights_digest': 'the weights were trained',
  'files': 'has the digests of the params',
  'manifest_digest': 'of the other fields',
}
# Fields that a Hugging Face directory has no place for.
EXPORTED = {
  'experiment': 'the import',
  'code_commit': 'no place',
  'step': 'no place',
  'tokens_seen': 'no place',
  'training_flops': 'no place',
  'train_seconds': 'no place',
  'data_mix': 'no place',
  'knowledge_cutoff': 'no place',
  'lineage': 'no place',
  'has_bos': 'that of the tokenizer',
  'origin': 'config.json was written again, and has another digest',
  'files': 'has the digest of the file below',
  'manifest_digest': 'of the other fields',
}
REWRITTEN = {
  'tokenizer/generation_config.json': 'fields without effect are left out',
}


def _foreign(directory):
  """Writes a chat model in the files of Hugging Face."""
  config = tiny_models.llama_like(
    # As many as the tokenizer has: an export leaves out trained spare rows.
    vocab_size=337,
    num_layers=1,
    qkv_bias=True,
    max_length=32,
  )
  family, values = config_json.write(config, 'qwen2')
  pieces = exporting.tensor_map.pieces(family, config, values)
  tensors = dict(exporting.tensors_of(frozen_dirs.params(config), pieces))
  directory.mkdir()
  safetensors_files.write_directory(
    directory,
    {name: x.shape for name, x in tensors.items()},
    np.dtype('float32'),
    iter(tensors.items()),
  )
  hf_files.qwen(directory, template=TEMPLATE, generation=GENERATION)
  (directory / 'config.json').write_text(json.dumps(values))


def _experiment(corpus, base, **overrides):
  data = {'knowledge_cutoff': '', **overrides.pop('data', {})}
  return tiny_run.tuning(
    corpus, base, data=data, **{'num_steps': 2, **overrides}
  )


@pytest.fixture(scope='module')
def places(corpus, tmp_path_factory):
  """The imported, the fine-tuned, the exported and the last directory."""
  root = tmp_path_factory.mktemp('round_trip')
  _foreign(root / 'theirs')
  importing.import_directory(
    root / 'theirs', root / 'base', origin={'source': 'org/name'}
  )
  tiny_run.run(_experiment(corpus, root / 'base'), root / 'run')
  exporting.export_directory(root / 'run' / 'frozen', root / 'exported')
  importing.import_directory(
    root / 'exported', root / 'again', origin={'source': 'org/name'}
  )
  return root


def _files(directory):
  return {
    path.relative_to(directory).as_posix(): path.read_bytes()
    for path in directory.rglob('*')
    if path.is_file()
  }


def _differing(a, b):
  a, b = _files(a), _files(b)
  # orbax draws the names of the files in params/, so weights are compared by
  # their digest, a field of the manifest.
  return {
    name
    for name in a.keys() | b.keys()
    if a.get(name) != b.get(name) and not name.startswith('params/')
  }


def _differing_fields(a, b):
  a, b = (dataclasses.asdict(manifest_lib.read(place)) for place in (a, b))
  return {name for name in a if a[name] != b[name]}


@pytest.mark.slow
def test_all_that_training_does_not_change_is_frozen_again(places):
  base, tuned = places / 'base', places / 'run' / 'frozen'
  # An import has no recipe.
  assert _differing(base, tuned) == {'manifest.json', 'recipe.json'}
  assert _differing_fields(base, tuned) <= TRAINED.keys()
  frozen = frozen_format.read(tuned)
  assert frozen.chat_template == TEMPLATE
  assert frozen.generation == {
    'temperature': 0.0,
    'repetition_penalty': 1.1,
    'max_tokens': 77,
    'stop_ids': [332, 330],
  }
  origin = frozen.manifest.origin
  assert (origin['family'], origin['source']) == ('qwen2', 'org/name')


@pytest.mark.slow
def test_the_export_is_imported_as_the_same_directory(places):
  tuned, again = places / 'run' / 'frozen', places / 'again'
  differing = _differing(tuned, again)
  assert differing <= {'manifest.json', 'recipe.json', *REWRITTEN}
  assert _differing_fields(tuned, again) <= EXPORTED.keys()
  tokenizers = [
    tokenizer_lib.load(place / 'tokenizer') for place in (tuned, again)
  ]
  assert tokenizers[0].eos_ids == tokenizers[1].eos_ids == (332, 330)


def test_the_export_has_every_file_of_the_foreign_directory(places):
  theirs, exported = _files(places / 'theirs'), _files(places / 'exported')
  assert exported.keys() == theirs.keys()
  # config.json is written again, the weights were trained, and the tokenizer's
  # config says its kind.
  differing = _differing(places / 'theirs', places / 'exported')
  assert differing <= {
    'config.json',
    'model.safetensors',
    'generation_config.json',
    'tokenizer_config.json',
  }
  assert json.loads(exported['config.json'])['model_type'] == 'qwen2'
  theirs, generation = (
    json.loads(files['generation_config.json']) for files in (theirs, exported)
  )
  del theirs['transformers_version']
  assert theirs.items() <= generation.items()


def test_a_checkpoint_frozen_by_hand_is_the_same(places, tmp_path):
  (places / 'base').rename(places / 'elsewhere')  # no longer needed
  try:
    freeze.freeze_checkpoint(places / 'run', out=tmp_path / 'by_hand')
  finally:
    (places / 'elsewhere').rename(places / 'base')
  made = places / 'run' / 'frozen', tmp_path / 'by_hand'
  assert _differing(*made) <= {'manifest.json'}
  # The files of the params have other names, see `_differing`.
  assert _differing_fields(*made) <= {'files', 'manifest_digest'}


def test_an_experiment_chooses_other_settings(corpus, places):
  chosen = experiment_lib.FreezeConfig(temperature=0.7, max_tokens=9)
  experiment = _experiment(corpus, places / 'base', freeze=chosen)
  _, printed = tiny_run.run(experiment, places / 'run')
  assert 'has freeze.temperature = 0.0, not 0.7: freezing' in printed
  frozen = frozen_format.read(places / 'run' / 'frozen')
  assert frozen.generation['stop_ids'] == [332, 330]
  assert frozen.generation['temperature'] == 0.7
  assert frozen.generation['max_tokens'] == 9
  assert frozen.chat_template == TEMPLATE
  _, printed = tiny_run.run(experiment, places / 'run')
  assert 'is complete' in printed


def test_a_template_of_its_own_is_exported(places, tmp_path):
  frozen = frozen_format.read(places / 'base')
  fields = {'config': frozen.config, 'params': frozen.params}
  for template in ('other {{ messages }}', ''):
    frozen_dirs.write(
      tmp_path / 'own',
      **fields,
      chat_template=template,
      generation=frozen.generation,
      tokenizer_dir=frozen.tokenizer_dir,
    )
    out = tmp_path / f'exported_{len(template)}'
    exporting.export_directory(tmp_path / 'own', out)
    importing.import_directory(out, tmp_path / 'again', overwrite=True)
    assert frozen_format.read(tmp_path / 'again').chat_template == template


@pytest.mark.slow
def test_the_newest_known_date_is_the_cutoff(corpus, tmp_path):
  frozen_dirs.write(
    tmp_path / 'base', config=tiny_models.llama_like(vocab_size=264)
  )
  for date, expected in (('', '2026-01-31'), ('2027-05', '2027-05')):
    run = tmp_path / f'run_{date}'
    data = {'knowledge_cutoff': date}
    tiny_run.run(_experiment(corpus, tmp_path / 'base', data=data), run)
    manifest = frozen_format.read(run / 'frozen').manifest
    assert manifest.knowledge_cutoff == expected


def test_another_tokenizer_than_that_of_the_weights_is_refused(
  corpus, places, tmp_path
):
  experiment = _experiment(
    corpus,
    places / 'base',
    data={'tokenizer': data_config.TokenizerConfig(kind='byte')},
  )
  with pytest.raises(
    ValueError, match="tokenizer: got b'.*' for id 0, expected b'!' as in .*;"
  ):
    tiny_run.run(experiment, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()
