"""Freezing: serving params are copies, and a checkpoint needs no trainer."""

import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from frozen import format as frozen_format, freeze, seals
from models import transformer
from storage import digests
from tests.helpers import commands, frozen_dirs, tiny_models


def _scanned():
  config = frozen_dirs.config(scan_layers=True)
  return config, frozen_dirs.params(config)


def _pointers(tree):
  return {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)}


@pytest.mark.parametrize('scan_layers', [False, True])
def test_serving_params_survive_the_donation_of_the_training_params(
  scan_layers,
):
  config = frozen_dirs.config(scan_layers=scan_layers)
  params = frozen_dirs.params(config)
  served, _ = freeze.serving_params(params, config, dtype='float32')
  before = jax.tree.map(np.array, served)
  assert not _pointers(served) & _pointers(params)
  # What the train step does to its params.
  update = jax.jit(
    lambda tree: jax.tree.map(lambda x: 2 * x, tree), donate_argnums=0
  )
  update(params)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(params))
  jax.tree.map(np.testing.assert_array_equal, served, before)


def test_unstacked_params_are_the_same_function():
  config, params = _scanned()
  served, served_config = freeze.serving_params(params, config, dtype='float32')
  assert not served_config.scan_layers
  tokens_BT = jnp.arange(12).reshape(2, 6)
  logits = [
    jax.jit(transformer.Transformer(config=c).apply)(p, tokens_BT)[0]
    for c, p in ((config, params), (served_config, served))
  ]
  # The same sums, fused otherwise: a few ulps of logits of order 10.
  np.testing.assert_allclose(*logits, atol=1e-4)


def test_params_are_cast():
  config, params = _scanned()
  served, _ = freeze.serving_params(params, config, dtype='bfloat16')
  assert {leaf.dtype.name for leaf in jax.tree.leaves(served)} == {'bfloat16'}


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  """A workdir as training writes it, but written by orbax alone."""
  workdir = tmp_path_factory.mktemp('run')
  config, params = _scanned()
  run = {
    'experiment': 'tiny',
    'model': config.to_dict(),
    'data_mix': [],
    'knowledge_cutoff': '2026-01-31',
    'lineage': {},
    'code_commit': 'c0ffee',
    'has_bos': True,
  }
  (workdir / 'run.json').write_text(json.dumps(run))
  tiny_models.byte_tokenizer().save(workdir / 'tokenizer')
  for step in (4, 10):
    directory = workdir / 'checkpoints' / str(step)
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(
        directory / 'params',
        jax.tree.map(lambda x, step=step: x + step, params),
      )
      checkpointer.save(directory / 'opt_state', {'count': jnp.zeros(2)})
    progress = {
      'step': step,
      'tokens_seen': step * 128,
      'training_flops': 1e9,
      'train_seconds': 2.0,
      'key_data': [0, 1],
      'data_state': {},
    }
    (directory / 'progress.json').write_text(json.dumps(progress))
    _seal(directory, run)
  (workdir / 'checkpoints' / '12.partial').mkdir()
  return workdir


def _seal(directory, run):
  seals.write(
    directory,
    seals.Seal(
      step=int(directory.name),
      identity=seals.identity(run),
      leaves={},
      libraries={},
      eval_loss=None,
      evaluation_owed=False,
      files=digests.of_files(directory, seals.file_names(directory)),
    ),
  )


def test_a_damaged_checkpoint_is_not_frozen(workdir, tmp_path):
  copy = tmp_path / 'run'
  shutil.copytree(workdir, copy)
  (copy / 'checkpoints' / '10' / 'progress.json').write_text('{}')
  with pytest.raises(
    seals.DamagedError,
    match=r'10/progress.json: got 2 bytes and SHA-256 .*, expected \d+ bytes'
    ' and .*; put a good copy there, or choose another step',
  ):
    freeze.freeze_checkpoint(copy, out=tmp_path / 'f')
  assert not (tmp_path / 'f').exists()
  freeze.freeze_checkpoint(copy, step=4, out=tmp_path / 'f')


def test_a_checkpoint_of_another_run_is_not_frozen(workdir, tmp_path):
  copy = tmp_path / 'run'
  shutil.copytree(workdir, copy)
  run = json.loads((copy / 'run.json').read_text())
  run['model']['num_layers'] += 1
  (copy / 'run.json').write_text(json.dumps(run))
  with pytest.raises(
    ValueError, match='of another run: got model.num_layers = .*, expected'
  ):
    freeze.freeze_checkpoint(copy, out=tmp_path / 'f')
  assert not (tmp_path / 'f').exists()


@pytest.mark.parametrize(('step', 'expected'), [(-1, 10), (10, 10), (4, 4)])
def test_a_checkpoint_is_frozen(workdir, tmp_path, step, expected):
  out = tmp_path / 'frozen'
  freeze.freeze_checkpoint(
    workdir, step=step, out=out, generation={'max_tokens': 5}
  )
  frozen = frozen_format.read(out)
  config, params = _scanned()
  wanted, _ = freeze.serving_params(
    jax.tree.map(lambda x: x + expected, params), config, dtype='float32'
  )
  jax.tree.map(np.testing.assert_array_equal, frozen.params, wanted)
  manifest = frozen.manifest
  assert (manifest.step, manifest.tokens_seen) == (expected, expected * 128)
  assert (manifest.experiment, manifest.code_commit) == ('tiny', 'c0ffee')
  assert frozen.generation['max_tokens'] == 5
  assert frozen.generation['top_p'] == freeze.DEFAULT_GENERATION['top_p']


def test_a_missing_step_names_those_there_are(workdir, tmp_path):
  with pytest.raises(
    FileNotFoundError,
    match='got no checkpoint of step 5, expected one of 4, 10;',
  ):
    freeze.freeze_checkpoint(workdir, step=5, out=tmp_path / 'f')
  assert not (tmp_path / 'f').exists()


def test_a_missing_run_or_checkpoint_is_named(workdir, tmp_path):
  with pytest.raises(FileNotFoundError, match='run.json: got no such file'):
    freeze.freeze_checkpoint(tmp_path, out=tmp_path / 'f')
  (tmp_path / 'run.json').write_text('{"experiment": "old"}')
  with pytest.raises(ValueError, match='run.json: got no code_commit, data_mi'):
    freeze.freeze_checkpoint(tmp_path, out=tmp_path / 'f')
  shutil.copy(workdir / 'run.json', tmp_path)
  with pytest.raises(FileNotFoundError, match='got no checkpoints, expected'):
    freeze.freeze_checkpoint(tmp_path, out=tmp_path / 'f')


def test_an_unknown_dtype_is_refused(workdir, tmp_path):
  with pytest.raises(
    ValueError, match="dtype: got 'int8', expected one of float32, bfloat16"
  ):
    freeze.freeze_checkpoint(workdir, out=tmp_path / 'f', dtype='int8')


def _cli(*args):
  return subprocess.run(
    [sys.executable, '-m', 'frozen.freeze', *args],
    capture_output=True,
    text=True,
    env=tiny_models.subprocess_env(),
    timeout=120,
    check=False,
  )


def test_command_line(workdir, tmp_path):
  out = tmp_path / 'frozen'
  done = _cli(f'--workdir={workdir}', f'--out={out}', '--dtype=bfloat16')
  assert done.returncode == 0, done.stderr
  manifest = frozen_format.read(out).manifest
  assert f'weights {manifest.weights_digest}' in done.stdout
  assert manifest.dtype == 'bfloat16'
  failed = commands.run(
    'frozen/freeze.py', f'--workdir={workdir}', f'--out={out}', '--step=5'
  )
  assert failed.returncode == 2
  (line,) = failed.stderr.splitlines()
  assert line.startswith('error: ')
  assert 'expected one of 4, 10' in line
