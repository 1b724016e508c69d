"""Adapter directories: written, verified, merged, and refused."""

import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from frozen import adapters as adapters_lib, format as frozen_format
from frozen.huggingface import peft_files
from models import transformer
from tests.helpers import frozen_dirs


@pytest.fixture(name='base', scope='module')
def _base(tmp_path_factory):
  directory = tmp_path_factory.mktemp('base') / 'frozen'
  frozen_dirs.write(directory, chat_template='{{ messages }}')
  return frozen_format.read(directory)


def _files(base, *, seed=0, dora=False):
  rng = np.random.default_rng(seed)
  layers = {}
  leaves = frozen_format.leaves_by_path(base.params['params'])
  for path, kernel in leaves.items():
    if path.endswith(('attention/query/kernel', 'up/kernel')):
      into, out = kernel.shape
      layers[path.removesuffix('/kernel')] = peft_files.Layer(
        rng.normal(0, 0.3, (into, 3)).astype(np.float32),
        rng.normal(0, 0.3, (3, out)).astype(np.float32),
        6.0,
        2.0,
        rng.uniform(1, 2, out).astype(np.float32) if dora else None,
      )
  return peft_files.Files(layers, False, dora)


def _write(directory, base, files=None, **fields):
  return adapters_lib.write(
    directory,
    files or _files(base),
    base,
    **{
      'provenance': frozen_dirs.provenance(),
      'base_form': 'float',
      'texts': {
        'chat_template.jinja': 'own',
        'generation.json': '{"top_k": 3}',
      },
      **fields,
    },
  )


@pytest.fixture(name='written', scope='module')
def _written(base, tmp_path_factory):
  directory = tmp_path_factory.mktemp('adapter') / 'a'
  return directory, _write(directory, base)


def _logits(config, variables):
  tokens = jax.random.randint(jax.random.key(0), (2, 12), 0, 256)
  model = transformer.Transformer(config)
  return np.asarray(jax.jit(model.apply)(variables, tokens)[0])


def test_what_is_read_is_what_was_written(base, written):
  directory, manifest = written
  found = adapters_lib.read(directory, base)
  assert found.manifest == manifest == adapters_lib.read_manifest(directory)
  assert adapters_lib.is_adapter(directory)
  assert not adapters_lib.is_adapter(base.directory)
  assert found.chat_template == 'own'
  assert found.generation == {'top_k': 3}
  assert manifest.base_digest == base.manifest.weights_digest
  layer = _files(base).layers['layer_0/mlp/up']
  entry = found.tree['layer_0']['mlp']['up']
  np.testing.assert_array_equal(entry['a'], layer.a)
  np.testing.assert_allclose(entry['b'], layer.b * layer.scale, rtol=1e-7)


def test_the_digest_follows_the_values_and_the_base(base, written, tmp_path):
  _, manifest = written
  again = _write(tmp_path / 'again', base)
  assert again.adapter_digest == manifest.adapter_digest
  other = _write(tmp_path / 'other', base, _files(base, seed=1))
  assert other.adapter_digest != manifest.adapter_digest


@pytest.mark.fast_cases(2)
@pytest.mark.parametrize('dora', [False, True])
@pytest.mark.parametrize('form', ['float', 'int4'])
def test_a_merged_directory_is_another_one_with_the_same_function(
  base, tmp_path, dora, form
):
  _write(tmp_path / 'a', base, _files(base, dora=dora), base_form=form)
  manifest = adapters_lib.merge_directory(
    tmp_path / 'a', base.directory, tmp_path / 'merged'
  )
  assert manifest.weights_digest != base.manifest.weights_digest
  assert manifest.lineage['adapter']
  merged = frozen_format.read(tmp_path / 'merged')
  assert merged.chat_template == 'own'
  adapter = adapters_lib.read(tmp_path / 'a', base)
  params = base.params
  if form != 'float':
    params = {'params': adapters_lib.rounded(params['params'], form)}
  found = _logits(merged.config, merged.params)
  expected = _logits(base.config, {**params, 'adapters': adapter.tree})
  bound = 1e-5 * np.abs(expected).max()
  np.testing.assert_allclose(found, expected, atol=bound, rtol=0)
  assert np.abs(found - _logits(base.config, base.params)).max() > 0.01


def test_another_base_is_refused_by_its_digest(base, written, tmp_path):
  directory, _ = written
  params = frozen_dirs.params(base.config, seed=5)
  frozen_dirs.write(tmp_path / 'other', config=base.config, params=params)
  other = frozen_format.read(tmp_path / 'other')
  with pytest.raises(
    ValueError,
    match=f'weights {base.manifest.weights_digest[:12]}, expected one of tiny'
    f' with weights {other.manifest.weights_digest[:12]}',
  ):
    adapters_lib.read(directory, other)


def test_an_adapter_is_not_taken_for_a_frozen_directory(base, written):
  directory, _ = written
  with pytest.raises(
    ValueError, match='got the directory of an adapter, expec'
  ):
    frozen_format.read(directory)
  with pytest.raises(ValueError, match='it is not of an adapter'):
    adapters_lib.read(base.directory, base)


def test_peft_directories_are_said_to_need_an_import(base, written, tmp_path):
  directory, _ = written
  for file in (peft_files.CONFIG, peft_files.WEIGHTS):
    shutil.copy(directory / file, tmp_path)
  with pytest.raises(FileNotFoundError, match='import this one of peft with'):
    adapters_lib.read(tmp_path, base)
  manifest = adapters_lib.import_directory(
    tmp_path, base.directory, tmp_path / 'in'
  )
  again = adapters_lib.read(tmp_path / 'in', base)
  assert again.manifest == manifest
  assert again.chat_template == '{{ messages }}'  # of the base
  assert manifest.adapter_digest == written[1].adapter_digest


@pytest.mark.parametrize('name', [peft_files.WEIGHTS, peft_files.CONFIG])
def test_damage_is_named(base, written, tmp_path, name):
  shutil.copytree(written[0], tmp_path / 'a')
  data = bytearray((tmp_path / 'a' / name).read_bytes())
  data[-2] ^= 1
  (tmp_path / 'a' / name).write_bytes(data)
  with pytest.raises(ValueError, match=name):
    adapters_lib.read(tmp_path / 'a', base)


def test_an_altered_manifest_is_named(base, written, tmp_path):
  shutil.copytree(written[0], tmp_path / 'a')
  path = tmp_path / 'a' / 'manifest.json'
  fields = json.loads(path.read_text())
  path.write_text(json.dumps({**fields, 'base_digest': '0' * 64}))
  with pytest.raises(ValueError, match='cannot be used .it was altered'):
    adapters_lib.read(tmp_path / 'a', base)


def test_values_that_are_not_finite_are_refused(base, tmp_path):
  files = _files(base)
  layer = files.layers['layer_0/mlp/up']
  broken = layer._replace(b=np.full_like(layer.b, np.nan))
  files = files._replace(layers={**files.layers, 'layer_0/mlp/up': broken})
  with pytest.raises(ValueError, match='got values of layer_0/mlp/up that are'):
    _write(tmp_path / 'a', base, files)
  assert not (tmp_path / 'a').exists()


def test_other_contents_are_not_replaced(base, written, tmp_path):
  (tmp_path / 'note').write_text('mine')
  with pytest.raises(ValueError, match='got a place that holds something else'):
    _write(tmp_path, base, overwrite=True)
  shutil.copytree(written[0], tmp_path / 'a')
  with pytest.raises(ValueError, match='choose another place'):
    _write(tmp_path / 'a', base)
  _write(tmp_path / 'a', base, overwrite=True)


def test_a_model_of_no_family_keeps_its_adapters_merged(tmp_path):
  config = frozen_dirs.config(
    mlp='geglu_exact', qk_norm=True, norm_place='both'
  )
  frozen_dirs.write(tmp_path / 'base', config=config)
  base = frozen_format.read(tmp_path / 'base')
  with pytest.raises(ValueError, match='freeze.merge_adapter: got False'):
    _write(tmp_path / 'a', base)


@pytest.mark.slow
def test_the_command_merges_and_says_what_is_wrong(base, written, tmp_path):
  def command(*args):
    return subprocess.run(
      [sys.executable, '-m', 'frozen.adapters', *args],
      capture_output=True,
      text=True,
      check=False,
    )

  flags = f'--base={base.directory}', f'--source={written[0]}'
  done = command('merge', *flags, f'--out={tmp_path / "merged"}')
  assert done.returncode == 0, done.stderr
  digest = frozen_format.read(tmp_path / 'merged').manifest.weights_digest
  assert f'weights {digest}' in done.stdout
  done = command('import', *flags[:1], f'--source={tmp_path}', '--out=x')
  assert done.returncode == 2
  assert 'error: ' in done.stderr
  assert 'got no such file, expected adapter_config.json' in done.stderr
