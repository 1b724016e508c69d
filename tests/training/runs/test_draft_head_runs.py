"""Whole runs of draft heads: frozen base, resumption, the frozen directory."""

import dataclasses
import io

import pytest
import rich.console

from frozen import draft_heads, freeze, manifest as manifest_lib
from storage import file_names
from tests.helpers import frozen_dirs, tiny_models
from tests.helpers.training import tiny_run
from training import run as run_lib
from training.objectives import draft_head
from training.optimizer import chain
from training.reporting import metrics as metrics_lib

MODEL = tiny_models.llama_like(
  vocab_size=264, num_layers=1, max_length=64, init_std=0.5
)


@pytest.fixture(scope='module')
def base(tmp_path_factory):
  """Returns a frozen directory of random weights."""
  directory = tmp_path_factory.mktemp('base') / 'frozen'
  frozen_dirs.write(directory, config=MODEL)
  return directory


@pytest.fixture(scope='module')
def make(base, tmp_path_factory):
  """Returns a function of the fields that differ to an experiment."""
  corpus = tiny_run.write_corpus(tmp_path_factory.mktemp('corpus'))

  def make(**fields):
    defaults = {
      'objective': draft_head.DraftHead(num_steps=2, num_ids=200),
      'optimizer': chain.OptimizerConfig(warmup_steps=2, peak_lr=3e-3),
    }
    return tiny_run.tuning(corpus, base, **{**defaults, **fields})

  return make


@pytest.fixture(scope='module')
def trained(make, tmp_path_factory):
  """Returns the workdir of a whole run, and its text."""
  workdir = tmp_path_factory.mktemp('run') / 'head'
  _, text = tiny_run.run(make(), workdir)
  return workdir, text


def _losses(workdir):
  return [r['loss'] for r in metrics_lib.read(workdir) if r['kind'] == 'train']


@pytest.mark.slow
def test_a_run_freezes_a_head_for_its_base(trained, base, make):
  workdir, text = trained
  losses = _losses(workdir)
  assert losses[-1] < losses[0] - 0.05
  evaluated = [r for r in metrics_lib.read(workdir) if r['kind'] == 'eval']
  for step in (1, 2):
    assert 0 < evaluated[-1][f'overlap_{step}'] < 1
  manifest = manifest_lib.read(base)
  found = draft_heads.read(workdir / file_names.FROZEN, manifest)
  assert found.manifest.base_digest == manifest.weights_digest
  assert found.manifest.num_ids == 200
  width = MODEL.model_width
  assert found.manifest.num_params == 2 * width**2 + 5 * width * (2 * width)
  assert 'trained, in a head' in text
  assert f'of weights {manifest.weights_digest}' in text
  # Checkpoints hold the head alone.
  saved = freeze._restore_params(workdir / 'checkpoints' / '12' / 'params')
  assert saved.keys() == {'heads'}
  _, again = tiny_run.run(make(), workdir)
  assert 'is complete: step 12' in again


@pytest.mark.slow
def test_a_resumed_run_has_the_bits_of_a_whole_one(trained, make, tmp_path):
  expected = _losses(trained[0])
  console = rich.console.Console(file=io.StringIO())
  run_lib.run(make(), tmp_path / 'head', console, stop_after=6)
  tiny_run.run(make(), tmp_path / 'head')
  assert _losses(tmp_path / 'head') == expected
  digests = [
    draft_heads.read_manifest(each / file_names.FROZEN).head_digest
    for each in (trained[0], tmp_path / 'head')
  ]
  assert digests[0] == digests[1]


@pytest.mark.slow
def test_another_base_is_refused(trained, make, base, tmp_path):
  workdir = tmp_path / 'head'
  stopped = dataclasses.replace(make(), num_steps=6)
  tiny_run.run(stopped, workdir)
  before = draft_heads.read_manifest(workdir / file_names.FROZEN)
  frozen_dirs.write(
    tmp_path / 'other',
    params=frozen_dirs.params(MODEL, seed=7),
    config=MODEL,
  )
  other = dataclasses.replace(make(), init_from=str(tmp_path / 'other'))
  with pytest.raises(ValueError, match='got a base with weights .* on which'):
    tiny_run.run(other, workdir)
  assert before == draft_heads.read_manifest(workdir / file_names.FROZEN)
