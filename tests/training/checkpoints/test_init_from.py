"""Runs that start from frozen weights, open ones among them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import finetune
from frozen import format as frozen_format
from frozen.huggingface import exporting, importing
from models import transformer
from parallel import parallel_config
from tests.helpers import frozen_dirs, tiny_models
from tests.helpers.training import tiny_run
from training import learner as learner_lib
from training.checkpoints import init_from
from training.reporting import metrics

# What layers of open models differ by: windows, two rotary bases, norms on both
# sides; and latent attention with dense layers first and experts in groups.
GEMMA = {
  'num_layers': 3,
  'layer_pattern': 'lg',
  'window': 5,
  'rope_local_base': 100.0,
  'norm_place': 'both',
  'norm_from_one': True,
  'attention_softcap': 3.0,
  'query_scale': 0.3,
  'embed_multiplier': 24**0.5,
  'mlp': 'geglu',
  'tie_embeddings': True,
}
DEEPSEEK = {
  'num_layers': 2,
  'num_kv_heads': 4,
  'head_width': 10,
  'rotary_width': 4,
  'value_width': 6,
  'latent_width': 8,
  'query_latent_width': 12,
  'num_dense_layers': 1,
  'num_experts': 4,
  'num_active_experts': 2,
  'num_shared_experts': 1,
  'expert_width': 12,
  'num_expert_groups': 2,
  'num_active_groups': 1,
  'expert_group_best': 2,
  'router_score': 'sigmoid',
  'router_correction': True,
  'router_scale': 2.5,
}


def _frozen(directory, **overrides):
  config = tiny_models.llama_like(
    **{'vocab_size': 264, 'max_length': 32, **overrides}
  )
  frozen_dirs.write(directory, config=config)
  return config


@pytest.mark.parametrize(
  'overrides',
  [
    pytest.param({}, id='llama'),
    pytest.param(GEMMA, id='gemma', marks=pytest.mark.slow),
    pytest.param(DEEPSEEK, id='deepseek', marks=pytest.mark.slow),
  ],
)
def test_a_run_goes_on_from_frozen_weights(corpus, tmp_path, overrides):
  _frozen(tmp_path / 'base', **overrides)
  base = frozen_format.read(tmp_path / 'base')
  experiment = tiny_run.tuning(corpus, tmp_path / 'base')
  assert experiment.model.scan_layers == (not overrides)
  tiny_run.run(experiment, tmp_path / 'run')
  losses = [
    r['loss'] for r in metrics.read(tmp_path / 'run') if r['kind'] == 'train'
  ]
  assert losses[-1] < losses[0]
  tuned = frozen_format.read(tmp_path / 'run' / 'frozen')
  assert tuned.manifest.lineage == {'init_from': base.manifest.weights_digest}
  assert tuned.config == base.config
  assert tuned.config.spare_ids == ((259, 264),)
  # Twelve small steps away from where it began, not from chance.
  for a, b in zip(
    jax.tree.leaves(base.params), jax.tree.leaves(tuned.params), strict=True
  ):
    assert np.abs(np.asarray(a) - np.asarray(b)).max() < 0.05


@pytest.mark.slow
def test_a_run_that_goes_on_keeps_its_lineage(corpus, tmp_path):
  _frozen(tmp_path / 'base')
  experiment = tiny_run.tuning(corpus, tmp_path / 'base', num_steps=4)
  tiny_run.run(experiment, tmp_path / 'run')
  recorded = json.loads((tmp_path / 'run' / 'run.json').read_text())
  (tmp_path / 'base').rename(tmp_path / 'elsewhere')  # no longer needed
  tiny_run.run(dataclasses.replace(experiment, num_steps=8), tmp_path / 'run')
  again = json.loads((tmp_path / 'run' / 'run.json').read_text())
  assert again['lineage'] == recorded['lineage'] != {}


@pytest.mark.fast_cases(2)
@pytest.mark.parametrize(
  'parallel',
  [
    {'data': 1, 'fsdp': 2, 'tensor': 2, 'context': 2},
    {'kind': 'pmap'},
    {'data': 2, 'stage': 2, 'stage_microbatches': 2, 'fsdp': 2},
  ],
  ids=['mesh', 'pmap', 'stages'],
)
def test_the_first_state_is_the_frozen_weights_wherever_it_lies(
  corpus, tmp_path, parallel
):
  _frozen(tmp_path / 'base')
  experiment = tiny_run.tuning(
    corpus,
    tmp_path / 'base',
    parallel=parallel_config.ParallelConfig(**parallel),
    ema_decay=0.9,
  )
  learner = learner_lib.make(experiment)
  key = jax.random.key(3)
  params = init_from.read(experiment)
  expected = [np.asarray(x) for x in jax.tree.leaves(params)]
  state = learner.placement.whole(learner.init_with(key, params))
  for tree in (state.params, state.average):
    for got, x in zip(jax.tree.leaves(tree), expected, strict=True):
      np.testing.assert_array_equal(got, x)
  # All else is as in a run that starts from chance.
  other = learner.placement.whole(learner.init(key))
  assert jax.tree.structure(state) == jax.tree.structure(other)
  assert jax.random.key_data(state.key).tolist() == (
    jax.random.key_data(other.key).tolist()
  )


def test_another_model_is_refused(corpus, tmp_path):
  _frozen(tmp_path / 'base')
  experiment = tiny_run.tuning(corpus, tmp_path / 'base')
  model = dataclasses.replace(experiment.model, rope_base=5.0)
  other = dataclasses.replace(experiment, model=model)
  with pytest.raises(ValueError, match='model.rope_base: 5.0, frozen 10000.0'):
    tiny_run.run(other, tmp_path / 'run')
  missing = dataclasses.replace(experiment, init_from=str(tmp_path / 'no'))
  with pytest.raises(FileNotFoundError, match='expected a frozen directory'):
    tiny_run.run(missing, tmp_path / 'run')


@pytest.mark.slow
def test_what_was_tuned_is_exported_and_reads_the_same(corpus, tmp_path):
  _frozen(tmp_path / 'base')
  tiny_run.run(tiny_run.tuning(corpus, tmp_path / 'base'), tmp_path / 'run')
  exported = exporting.export_directory(
    tmp_path / 'run' / 'frozen', tmp_path / 'theirs'
  )
  assert exported.family == 'llama'
  source = importing.open_source(tmp_path / 'theirs')
  tuned = frozen_format.read(tmp_path / 'run' / 'frozen')
  params = importing.load_params(source, 'float32')
  tokens_BT = jnp.arange(10).reshape(1, 10)
  got, _ = transformer.Transformer(source.config).apply(
    jax.tree.map(jnp.asarray, params), tokens_BT
  )
  expected, _ = transformer.Transformer(tuned.config).apply(
    tuned.params, tokens_BT
  )
  # Rows that no token has are left out: transformers would not mask them.
  np.testing.assert_array_equal(got, expected[..., :259])
  assert source.config.vocab_size == 259


def test_the_experiment_takes_all_from_the_directory(tmp_path):
  config = _frozen(tmp_path / 'base')
  experiment = finetune.get_config(str(tmp_path / 'base'))
  experiment.validate()
  assert experiment.model == dataclasses.replace(config, scan_layers=True)
  assert experiment.init_from == str(tmp_path / 'base')
  assert experiment.data.row_length == 32
  assert experiment.data.tokenizer.path == f'{tmp_path}/base/tokenizer'
