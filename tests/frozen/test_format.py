"""The frozen directory: what goes in comes out, and damage never passes."""

import dataclasses
import json
import os
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from frozen import format as frozen_format, manifest as manifest_lib
from models import model_config
from storage import atomic, digests
from tests.helpers import frozen_dirs, tiny_models

# `frozen_dirs.config` has more ids than the byte tokenizer.
SPARE = ((259, 270),)


@pytest.fixture(scope='module')
def original(tmp_path_factory):
  directory = tmp_path_factory.mktemp('original') / 'tiny'
  frozen_dirs.write(directory, chat_template='{{ messages }} é')
  return directory


@pytest.fixture
def copy(original, tmp_path):
  """A copy to damage."""
  return shutil.copytree(original, tmp_path / 'copy')


def _equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_round_trip(tmp_path, dtype):
  config = frozen_dirs.config()
  params = frozen_dirs.params(config, dtype=dtype)
  written = frozen_dirs.write(tmp_path / 'f', params=params, dtype=dtype)
  frozen = frozen_format.read(tmp_path / 'f')
  _equal(frozen.params, params)
  assert {x.dtype.name for x in jax.tree.leaves(frozen.params)} == {dtype}
  assert frozen.manifest == written
  assert frozen.config == dataclasses.replace(config, spare_ids=SPARE)
  assert frozen.generation == {'temperature': 0.9, 'max_tokens': 12, 'stop': []}
  assert (frozen.tokenizer_dir / 'tokenizer_config.json').is_file()
  assert frozen.manifest.lineage == {'init_from': 'ab' * 32}
  assert frozen.manifest.num_params == sum(
    x.size for x in jax.tree.leaves(params)
  )
  assert frozen.manifest.quantization == {'kind': 'none'}


def test_a_moved_directory_reads_the_same(copy):
  assert frozen_format.read(copy).chat_template == '{{ messages }} é'


def test_params_go_where_they_are_sent(original):
  device = jax.devices()[3]
  frozen = frozen_format.read(
    original, sharding=jax.sharding.SingleDeviceSharding(device)
  )
  assert {x.device for x in jax.tree.leaves(frozen.params)} == {device}


def test_the_digest_is_of_the_values_not_of_their_storage():
  tree = {'b': {'k': jnp.arange(6.0).reshape(2, 3)}, 'a': jnp.ones(2)}
  same = {'a': np.ones(2, np.float32), 'b': {'k': np.arange(6, dtype='f4')}}
  same['b']['k'] = np.asfortranarray(same['b']['k'].reshape(2, 3))
  digest = frozen_format.weights_digest(tree)
  assert frozen_format.weights_digest(same) == digest
  # Pinned: a digest in a manifest must mean the same in years to come.
  assert digest == (
    '7980e6f04aeee95201638c0aff74978a8270492cd1a41b1bf640c2e4eafc90a5'
  )


def test_the_digest_sees_names_shapes_dtypes_and_values():
  base = np.arange(6, dtype=np.float32)
  trees = [
    {'a': base},
    {'b': base},
    {'a': base.reshape(2, 3)},
    {'a': base.view(np.int32)},
    {'a': np.nextafter(base, 9)},
    {'a': base.astype(ml_dtypes.bfloat16)},
    {'a': base[:3], 'b': base[3:]},
  ]
  assert len({frozen_format.weights_digest(tree) for tree in trees}) == 7


def _files(directory):
  return sorted(
    path.relative_to(directory).as_posix()
    for path in directory.rglob('*')
    if path.is_file()
  )


def test_every_file_altered_truncated_or_missing_is_refused(original, tmp_path):
  count = 0
  for directory, name in frozen_dirs.damaged(original, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
      frozen_format.read(directory)
    assert name in str(caught.value)
    count += 1
  assert count > 3 * 8


def test_messages_name_the_file_and_the_remedy(copy):
  (copy / 'extra.txt').write_text('')
  with pytest.raises(
    ValueError, match='extra.txt: got a file that manifest.json does not list'
  ):
    frozen_format.read(copy)
  (copy / 'extra.txt').unlink()
  (copy / 'generation.json').write_text('{}')
  with pytest.raises(
    ValueError, match='generation.json: got SHA-256 .*truncated or altered'
  ):
    frozen_format.read(copy)
  (copy / 'generation.json').unlink()
  with pytest.raises(
    FileNotFoundError, match='generation.json: got no such file, expected a'
  ):
    frozen_format.read(copy)


def _sign_again(directory, **changes):
  """Changes the manifest and its digest, as a mistaken writer would."""
  fields = json.loads((directory / 'manifest.json').read_text())
  del fields['manifest_digest'], fields['format_version']
  manifest_lib.write(directory, manifest_lib.sign(**{**fields, **changes}))


def test_a_config_that_does_not_fit_the_params_is_refused(copy):
  model = frozen_dirs.config(mlp_width=41).to_dict()
  _sign_again(copy, model=model)
  with pytest.raises(
    ValueError,
    match=r'got float32\[40, 24\] at params/layer_0/mlp/down/kernel, expected'
    r' float32\[41, 24\]',
  ):
    frozen_format.read(copy)
  _sign_again(copy, model=frozen_dirs.config(num_layers=3).to_dict())
  with pytest.raises(ValueError, match='got nothing at params/layer_2/'):
    frozen_format.read(copy)
  _sign_again(copy, model={**model, 'mlp_depth': 3})
  with pytest.raises(ValueError, match=r"unknown fields \['mlp_depth'\]"):
    frozen_format.read(copy)


def test_a_dtype_that_is_not_the_stored_one_is_refused(copy):
  # Orbax would cast in silence.
  model = frozen_dirs.config().to_dict()
  _sign_again(copy, model=model, dtype='bfloat16')
  with pytest.raises(ValueError, match=r'got float32\[.*expected bfloat16\['):
    frozen_format.read(copy)


def test_weights_with_another_digest_are_refused(copy):
  _sign_again(copy, weights_digest='0' * 64)
  with pytest.raises(
    ValueError, match='got weights with digest .*, expected 0000'
  ):
    frozen_format.read(copy)


def test_writing_refuses_params_of_another_model(tmp_path):
  params = frozen_dirs.params(frozen_dirs.config(num_layers=1))
  with pytest.raises(ValueError, match='params: got nothing at params/layer_1'):
    frozen_dirs.write(tmp_path / 'f', params=params)
  params = frozen_dirs.params(frozen_dirs.config(), dtype='bfloat16')
  with pytest.raises(ValueError, match=r'got bfloat16\[.*expected float32\['):
    frozen_dirs.write(tmp_path / 'f', params=params)
  assert not (tmp_path / 'f').exists()


def test_other_weights_are_not_overwritten_unless_asked(tmp_path):
  target = tmp_path / 'f'
  config = frozen_dirs.config()
  first = frozen_dirs.write(target)
  # The same weights again: the rest may change.
  frozen_dirs.write(target, chat_template='new')
  assert frozen_format.read(target).chat_template == 'new'
  other = frozen_dirs.params(config, seed=1)
  with pytest.raises(
    ValueError, match=f'{first.weights_digest}, expected the new weights'
  ):
    frozen_dirs.write(target, params=other)
  assert frozen_format.read(target).manifest.weights_digest == (
    first.weights_digest
  )
  frozen_dirs.write(target, params=other, overwrite=True)
  _equal(frozen_format.read(target).params, other)
  assert sorted(path.name for path in tmp_path.iterdir()) == ['f', 'tokenizer']


def test_a_damaged_directory_is_overwritten_only_when_asked(copy):
  (copy / 'manifest.json').write_text('{')
  with pytest.raises(ValueError, match='weights that cannot be read'):
    frozen_dirs.write(copy)
  frozen_dirs.write(copy, overwrite=True)
  frozen_format.read(copy)


@pytest.mark.parametrize('overwrite', [False, True])
def test_what_is_not_frozen_is_never_replaced(tmp_path, overwrite):
  (tmp_path / 'home').mkdir()
  (tmp_path / 'home' / 'thesis.tex').write_text('years')
  with pytest.raises(ValueError, match='a place that holds something else'):
    frozen_dirs.write(tmp_path / 'home', overwrite=overwrite)
  assert (tmp_path / 'home' / 'thesis.tex').read_text() == 'years'
  (tmp_path / 'empty').mkdir()
  frozen_dirs.write(tmp_path / 'empty')
  frozen_format.read(tmp_path / 'empty')


class _Interrupted(BaseException):
  """As a kill would be: nothing catches it."""


@pytest.mark.parametrize(
  'moment', ['params', 'tokenizer', 'manifest', 'publish', 'move']
)
def test_an_interrupted_write_leaves_what_was_there(
  tmp_path, monkeypatch, moment
):
  target = tmp_path / 'f'
  first = frozen_dirs.write(target)

  def interrupt(*_, **__):
    raise _Interrupted

  if moment == 'params':
    monkeypatch.setattr(ocp.Checkpointer, 'save', interrupt)
  elif moment == 'tokenizer':
    monkeypatch.setattr(shutil, 'copyfile', interrupt)
  elif moment == 'manifest':
    monkeypatch.setattr(manifest_lib, 'write', interrupt)
  elif moment == 'publish':
    monkeypatch.setattr(atomic, 'publish', interrupt)
  else:
    monkeypatch.setattr(atomic, '_renameat2', None)
    replace = os.replace
    monkeypatch.setattr(
      atomic.os,
      'replace',
      lambda source, to: (
        interrupt()
        if '.partial-' in source.name and source.is_dir()
        else replace(source, to)
      ),
    )
  other = frozen_dirs.params(frozen_dirs.config(), seed=1)
  for place in (target, tmp_path / 'new'):
    with pytest.raises(_Interrupted):
      frozen_dirs.write(place, params=other, overwrite=True)
  assert frozen_format.read(target).manifest == first
  assert not (tmp_path / 'new').exists()


def test_a_failed_rename_puts_the_old_directory_back(tmp_path, monkeypatch):
  target = tmp_path / 'f'
  first = frozen_dirs.write(target)
  replace = os.replace

  def fail_for_partial(source, to):
    if '.partial-' in source.name:
      raise OSError('disk says no')
    replace(source, to)

  monkeypatch.setattr(atomic, '_renameat2', None)
  monkeypatch.setattr(atomic.os, 'replace', fail_for_partial)
  other = frozen_dirs.params(frozen_dirs.config(), seed=1)
  with pytest.raises(OSError, match='disk says no'):
    frozen_dirs.write(target, params=other, overwrite=True)
  assert frozen_format.read(target).manifest == first
  assert sorted(path.name for path in tmp_path.iterdir()) == ['f', 'tokenizer']


def test_a_directory_that_a_kill_set_aside_is_read_and_replaced(tmp_path):
  target = tmp_path / 'f'
  first = frozen_dirs.write(target)
  aside = tmp_path / '.f.previous-0a1b2c3d'
  target.rename(aside)
  assert frozen_format.read(target).manifest == first
  target.rename(aside)
  other = frozen_dirs.params(frozen_dirs.config(), seed=1)
  with pytest.raises(ValueError, match=f'weights {first.weights_digest}'):
    frozen_dirs.write(target, params=other)
  assert frozen_format.read(target).manifest == first
  assert sorted(path.name for path in tmp_path.iterdir()) == ['f', 'tokenizer']


def test_modes_are_those_of_new_files(tmp_path):
  """Whatever the modes of the tokenizer are, as of a temporary directory."""
  tokenizer = tmp_path / 'private'
  tiny_models.byte_tokenizer().save(tokenizer)
  (tokenizer / 'tokenizer_config.json').chmod(0o400)
  tokenizer.chmod(0o500)
  umask = os.umask(0o027)
  try:
    frozen_dirs.write(tmp_path / 'f', tokenizer_dir=tokenizer)
  finally:
    os.umask(umask)
    tokenizer.chmod(0o700)
  modes = {
    path.relative_to(tmp_path).as_posix(): path.stat().st_mode & 0o777
    for path in (tmp_path / 'f', *(tmp_path / 'f').rglob('*'))
  }
  for name, mode in modes.items():
    assert mode == (0o750 if (tmp_path / name).is_dir() else 0o640), name


def test_the_manifest_says_all_that_the_design_asks(original):
  fields = json.loads((original / 'manifest.json').read_text())
  assert set(fields) == {
    'format_version',
    'model',
    'dtype',
    'quantization',
    'files',
    'weights_digest',
    'lineage',
    'origin',
    'code_commit',
    'step',
    'tokens_seen',
    'training_flops',
    'train_seconds',
    'data_mix',
    'has_bos',
    'weights',
    'knowledge_cutoff',
    'experiment',
    'num_params',
    'manifest_digest',
  }
  assert fields['model']['spare_ids'] == [[259, 270]]
  config_fields = {f.name for f in dataclasses.fields(frozen_dirs.config())}
  assert set(fields['model']) == config_fields
  assert set(fields['files']) == set(_files(original)) - {'manifest.json'}


def test_a_directory_frozen_before_open_weights_came_is_still_read(copy):
  """Without the fields of a model that came later, and without an origin."""
  fields = json.loads((copy / 'manifest.json').read_text())
  del fields['origin'], fields['manifest_digest']
  later = list(fields['model'])
  later = later[later.index('qkv_bias') :]
  fields['model'] = {
    name: value for name, value in fields['model'].items() if name not in later
  }
  fields['manifest_digest'] = digests.of_json(fields)
  (copy / 'manifest.json').write_text(json.dumps(fields))
  frozen = frozen_format.read(copy)
  assert frozen.config == frozen_dirs.config(spare_ids=SPARE)
  assert frozen.manifest.origin == {}
  # What was written in between has some of them.
  fields['model']['window'] = 0
  _sign_again(copy, model=fields['model'], origin={})
  assert frozen_format.read(copy).config == frozen_dirs.config(spare_ids=SPARE)
  del fields['model']['mlp_width']
  _sign_again(copy, model=fields['model'], origin={})
  with pytest.raises(ValueError, match=r"got missing fields \['mlp_width'\]"):
    frozen_format.read(copy)


def test_a_field_that_is_added_later_has_its_default(copy, monkeypatch):
  @dataclasses.dataclass(kw_only=True, unsafe_hash=True)
  class Later(model_config.ModelConfig):
    new_cap: float = 3.0
    new_list: tuple[int, ...] = ()

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class LaterManifest(manifest_lib.Manifest):
    licence: str = 'unknown'

  monkeypatch.setattr(model_config, 'ModelConfig', Later)
  monkeypatch.setattr(manifest_lib, 'Manifest', LaterManifest)
  frozen = frozen_format.read(copy)
  assert frozen.config.new_cap == 3.0
  assert frozen.config.new_list == ()
  assert frozen.manifest.licence == 'unknown'
  # The other way round: older code refuses what it does not know, by name.
  newer = frozen.config.to_dict() | {'new_cap': 2.0}
  monkeypatch.undo()
  _sign_again(copy, model=newer)
  with pytest.raises(
    ValueError, match=r"unknown fields \['new_cap', 'new_list'\]"
  ):
    frozen_format.read(copy)
