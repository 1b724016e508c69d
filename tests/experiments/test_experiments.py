"""Every experiment is valid and takes a real step with its own objective."""

import dataclasses
import functools
import importlib
import inspect
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from models import transformer
from tests.helpers import tiny_models
from tests.helpers.training import preference_rows
from training import adapters, state as state_lib, step
from training.optimizer import chain

DIRECTORY = pathlib.Path(__file__).parents[2] / 'experiments'
NOT_EXPERIMENTS = {'__init__', 'presets'}
VARIANTS = {
  'shakespeare_char': ['cpu', 'gpu'],
  'pretrain': ['124m', '1b', '8b', '70b', '30b-a3b'],
  'lora': ['0', '1', '8', '64', '256'],
  'pretrain_files': ['text', 'jsonl', 'parquet', 'tfds'],
  'muon_against_adamw': ['adamw', 'muon'],
  'wsd_against_cosine': ['cosine', 'wsd'],
  'mup_transfer': ['mup-64', 'mup-512', 'standard-512'],
  'problems': ['base', 'sft', 'sft:some/frozen'],
  # The others read a teacher's weights.
  'distil': ['teacher', 'alone'],
  'grpo': [
    'sft',
    'mixed',
    'grpo',
    'rloo',
    'dr_grpo',
    'dapo',
    'reinforce:some/frozen',
  ],
  'preference': ['dpo', 'ipo', 'kto', 'orpo', 'simpo', 'cpo'],
  'lora_against_full': ['full', 'rank-8', 'rank-64:some/frozen'],
  'smollm2': [
    'full',
    'rank-1',
    'rank-8',
    'rank-64',
    'rank-256',
    'cpu',
    'cpu-rank-8:some/frozen',
    'grpo',
    'cpu-grpo',
  ],
}
ALL = [
  (path.stem, variant)
  for path in sorted(DIRECTORY.glob('*.py'))
  if path.stem not in NOT_EXPERIMENTS
  for variant in VARIANTS.get(path.stem, [None])
] + [('scaling.bytes', '16')]


def _load(name, variant):
  module = importlib.import_module(f'experiments.{name}')
  return module.get_config(*([variant] if variant else []))


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'variant'), ALL)
def test_an_experiment_takes_one_step(name, variant):
  """At its own settings but for sizes, which only cost time."""
  experiment = _load(name, variant)
  experiment.validate()
  config = dataclasses.replace(
    experiment.model,
    vocab_size=64,
    num_layers=min(2, experiment.model.num_layers),
    model_width=32,
    num_heads=4,
    num_kv_heads=max(
      1, 4 * experiment.model.num_kv_heads // experiment.model.num_heads
    ),
    head_width=8,
    mlp_width=0 if experiment.model.num_experts else 48,
    num_experts=min(4, experiment.model.num_experts),
    num_active_experts=min(2, experiment.model.num_active_experts),
    expert_width=min(24, experiment.model.expert_width),
    max_length=32,
  )
  model = transformer.Transformer(config, jnp.dtype(experiment.compute_dtype))
  # Layers of this size have no higher rank.
  adapter = dataclasses.replace(
    experiment.adapter, rank=min(8, experiment.adapter.rank)
  )
  optimizer, state = _started(experiment, model, adapter)
  train_step = jax.jit(
    step.make_train_step(
      model,
      experiment.objective,
      optimizer,
      joined=adapters.joined(adapter),
      num_microbatches=min(2, experiment.num_microbatches),
    )
  )
  for index in range(2):  # the rate of the very first step may be zero
    state, metrics = train_step(state, _batch(experiment, index))
  assert np.isfinite(float(metrics['loss']))
  if experiment.objective.predicts_text:
    assert float(metrics['loss']) == pytest.approx(np.log(64), rel=0.1)


def _started(experiment, model, adapter):
  """Returns the optimizer, and the state before the first step."""

  def make(optimizer):
    key = jax.random.key(experiment.seed)
    heads = functools.partial(experiment.objective.init_heads, model.config)
    if not experiment.is_base_frozen:
      return state_lib.init(model, optimizer, key, make_heads=heads)
    base = model.init(key, jnp.zeros((1, 1), jnp.int32))
    params = adapters.first(adapter, key, base)
    state = state_lib.init_with(optimizer, key, params, make_heads=heads)
    return state.replace(frozen_params={adapters.BASE: base})

  optimizer = chain.make_optimizer(
    experiment.optimizer,
    experiment.num_steps,
    model.config,
    jax.eval_shape(lambda: make(optax.identity())).params,
  )
  return optimizer, jax.jit(lambda: make(optimizer))()


def _batch(experiment, seed):
  """Returns the arrays that the objective reads, of ids below 64."""
  if experiment.objective.predicts_text:
    return tiny_models.batch(batch_size=4, vocab_size=64, seed=seed)
  if experiment.rollouts is not None:
    rows = tiny_models.batch(batch_size=4, vocab_size=64, seed=seed)
    rng = np.random.default_rng(seed)
    return {
      name: rows[name]
      if name in rows
      else jnp.asarray(rng.normal(size=rows['tokens'].shape), spec.dtype)
      for name, spec in experiment.objective.batch_spec().items()
    }
  units = preference_rows.draw(
    8,
    vocab_size=64,
    labelled='labels' in experiment.objective.batch_spec(),
    seed=seed,
  )
  rows = preference_rows.pack(units, 32, units_per_row=2)
  return preference_rows.batch(rows[:4], row_length=32, num_rows=4)


@pytest.mark.parametrize('name', sorted({name for name, _ in ALL}))
def test_an_experiment_is_described_and_refuses_unknown_variants(name):
  module = importlib.import_module(f'experiments.{name}')
  assert '--config=' in module.__doc__ or 'make ' in module.__doc__
  if inspect.signature(module.get_config).parameters:
    with pytest.raises(ValueError, match="variant: got 'nonsense', expected"):
      module.get_config('nonsense')


@pytest.mark.parametrize('kind', ['forward', 'reverse', 'jensen_shannon'])
def test_a_student_has_a_quarter_of_its_teacher(kind):
  student = _load('distil', f'{kind}:some/runs')
  student.validate()
  assert student.objective.teacher == 'some/runs/teacher/frozen'
  assert student.data == _load('distil', 'alone').data

  def size(experiment):
    model = transformer.Transformer(experiment.model)
    return sum(
      x.size for x in jax.tree.leaves(state_lib.abstract_params(model))
    )

  assert 0.2 < size(student) / size(_load('distil', 'teacher')) <= 0.25


def test_students_of_answers_see_as_many_of_them():
  off_policy, on_policy = (
    _load('distil', name) for name in ('off_policy', 'on_policy')
  )
  assert on_policy.init_from == off_policy.init_from
  assert on_policy.model == off_policy.model
  # A row of 96 tokens holds one to two answers.
  rows = off_policy.num_steps * off_policy.data.batch_size
  answers = on_policy.num_steps * on_policy.data.batch_size
  assert rows <= answers <= 2 * rows


def test_published_sizes():
  """The parameter counts the sources give: 10.65M and 124M."""
  gpu = _load('shakespeare_char', 'gpu').model
  shapes = jax.eval_shape(
    transformer.Transformer(dataclasses.replace(gpu, vocab_size=65)).init,
    jax.random.key(0),
    jnp.zeros((1, 1), jnp.int32),
  )
  count = sum(x.size for x in jax.tree.leaves(shapes))
  # nanoGPT prints 10.65M and leaves out the position table.
  assert round((count - 256 * 384) / 1e6, 2) == 10.65
