"""Adapters on a frozen directory whose kernels are in fewer bits."""

import jax
import numpy as np
import pytest

from frozen import adapters as adapters_lib, format as frozen_format
from models import adapter_config
from models.linear.stored import tree as stored_tree
from tests.helpers import frozen_dirs
from tests.helpers.open_weights import stored_params
from tests.helpers.training import tiny_run
from training import experiment as experiment_lib


@pytest.fixture(name='base', scope='module')
def _base(tmp_path_factory):
  directory = tmp_path_factory.mktemp('base') / 'frozen'
  config = frozen_dirs.config(vocab_size=272)
  params = stored_params.stored(frozen_dirs.params(config), 'int8')
  frozen_dirs.write(directory, config=config, params=params)
  return str(directory)


@pytest.mark.slow
@pytest.mark.parametrize('form', ['float', *stored_tree.BASES])
def test_a_run_trains_beside_its_numbers_and_merges_in_floats(
  form, corpus, base, tmp_path
):
  experiment = tiny_run.tuning(
    corpus,
    base,
    adapter=adapter_config.AdapterConfig(rank=4, alpha=16.0, base=form),
    freeze=experiment_lib.FreezeConfig(merge_adapter=False),
  )
  _, text = tiny_run.run(experiment, tmp_path / 'run')
  digest = frozen_format.read(base).manifest.weights_digest
  assert f'of base {digest} (tiny)' in text
  merged = tmp_path / 'merged'
  adapters_lib.merge_directory(tmp_path / 'run/frozen', base, merged)
  found = frozen_format.read(merged)
  assert found.manifest.quantization == {'kind': 'none'}
  floats = frozen_format.read_whole(base).params
  if form != 'float':
    floats = {'params': adapters_lib.rounded(floats['params'], form)}
  opened = frozen_format.open_directory(base)
  adapter = adapters_lib.read(tmp_path / 'run/frozen', opened)
  expected = adapters_lib.merge(floats, adapter.tree)
  jax.tree.map(np.testing.assert_array_equal, found.params, expected)
