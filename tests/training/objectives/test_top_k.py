"""Distillation from the likeliest tokens of a teacher, which are kept."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import layout, transformer
from parallel import parallel_config
from storage import file_names
from tests.helpers import frozen_dirs, tiny_models
from tests.helpers.training import tiny_run
from training.frozen_inputs import reference, top_tokens
from training.objectives import distillation, port
from training.reporting import metrics as metrics_lib

V = 24
MODEL = tiny_models.llama_like(vocab_size=V, num_layers=1, init_std=0.5)
RUN_MODEL = tiny_models.llama_like(vocab_size=264, num_layers=1, init_std=0.5)


@pytest.fixture(scope='module')
def models():
  """Returns a student and its parameters, and a teacher."""
  found = []
  for seed in (0, 1):
    module = transformer.Transformer(MODEL)
    init = jax.jit(module.init)
    params = init(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))
    found.append((port.Model(module), params))
  return found[0], port.FrozenModel(*found[1])


def _known(teacher, batch, objective):
  """Returns the batch with the arrays that a run computes once."""
  ((name, top),) = objective.top_tokens_needed.items()
  size = batch['tokens'].size
  places = np.arange(size, dtype=np.int32).reshape(batch['tokens'].shape)
  step = top_tokens.make_step(teacher.model.module, top, num_places=size)
  found = jax.jit(step)(teacher.params, {**batch, 'places': places})
  return batch | {
    f'{name}_{part}': values.reshape(*places.shape, -1)
    for part, values in found.items()
  }


def _loss(objective, params, batch, model, teacher=None):
  if objective.top_k:
    return objective(params, batch, model)[0]
  return objective(params, batch, model, teacher=teacher)[0]


@pytest.mark.slow
@pytest.mark.parametrize('divergence', distillation.DIVERGENCES)
@pytest.mark.parametrize('temperature', [1.0, 2.0])
def test_the_whole_vocabulary_is_the_exact_divergence(
  models, divergence, temperature
):
  (model, params), teacher = models
  batch = tiny_models.batch(vocab_size=V, num_segments=2, num_padding=3)
  whole = distillation.Distillation(
    teacher='frozen',
    divergence=divergence,
    temperature=temperature,
    imitation_share=0.2,
  )
  of_whole = jax.value_and_grad(functools.partial(_loss, whole))
  expected, expected_grad = of_whole(params, batch, model, teacher)
  for k in (V, V - 1):  # none is left over, or one
    listed = dataclasses.replace(whole, top_k=k)
    known = _known(teacher, batch, listed)
    loss, grad = jax.value_and_grad(functools.partial(_loss, listed))(
      params, known, model
    )
    assert loss == pytest.approx(float(expected), rel=1e-5)
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4),
      grad,
      expected_grad,
    )


@pytest.mark.slow
def test_more_tokens_see_more_of_the_divergence(models):
  (model, params), teacher = models
  batch = tiny_models.batch(vocab_size=V)
  losses = []
  for k in (1, 2, 4, 8, V):
    objective = distillation.Distillation(teacher='frozen', top_k=k)
    known = _known(teacher, batch, objective)
    losses.append(float(_loss(objective, params, known, model)))
  assert losses == sorted(losses)
  assert 0 < losses[0] < 0.9 * losses[-1]


def test_the_tokens_are_the_likeliest_and_all_is_one(models):
  _, teacher = models
  batch = tiny_models.batch(vocab_size=V)
  objective = distillation.Distillation(teacher='frozen', top_k=3)
  known = _known(teacher, batch, objective)
  assert known['teacher_ids'].shape == (*batch['tokens'].shape, 3)
  total = np.exp(np.float64(known['teacher_logprobs'])).sum(axis=-1)
  np.testing.assert_allclose(total, 1, atol=1e-5)
  falling = np.diff(known['teacher_logprobs'][..., :3], axis=-1)
  assert (falling <= 0).all()


@pytest.fixture
def teacher(tmp_path):
  params = transformer.Transformer(RUN_MODEL).init(
    jax.random.key(1), jnp.zeros((1, 1), jnp.int32)
  )
  params, config = layout.unstack(params, RUN_MODEL)
  frozen_dirs.write(tmp_path / 'teacher', params=params, config=config)
  return str(tmp_path / 'teacher')


def _run(corpus, teacher, workdir, num_steps=8, **fields):
  objective = distillation.Distillation(teacher=teacher, top_k=8)
  experiment = tiny_run.experiment(
    corpus,
    objective=objective,
    num_steps=num_steps,
    data={'data_dir': str(workdir.parent / 'data')},
    **fields,
  )
  optimizer = dataclasses.replace(
    experiment.optimizer, schedule='constant', peak_lr=1e-2
  )
  experiment = dataclasses.replace(experiment, optimizer=optimizer)
  _, text = tiny_run.run(experiment, workdir)
  return text


def _trained(workdir):
  return [r for r in metrics_lib.read(workdir) if r['kind'] == 'train']


@pytest.mark.slow
def test_a_run_computes_them_once_and_resumes_bit_for_bit(
  corpus, teacher, tmp_path, monkeypatch
):
  text = _run(corpus, teacher, tmp_path / 'whole')
  assert 'reference  teacher of text_files:' in text
  assert 'forward passes' in text

  def never(scorer, batch):
    raise AssertionError('computed again')

  monkeypatch.setattr(reference._Scorer, '__call__', never)
  _run(corpus, teacher, tmp_path / 'run', num_steps=3)
  _run(corpus, teacher, tmp_path / 'run')
  assert _trained(tmp_path / 'run') == _trained(tmp_path / 'whole')
  train = _trained(tmp_path / 'whole')
  assert train[-1]['divergence'] < train[0]['divergence']
  assert (tmp_path / 'whole' / file_names.FROZEN).is_dir()


@pytest.mark.slow
def test_every_layout_trains_the_same(corpus, teacher, tmp_path):
  ways = {
    'one': {},
    'mesh': {
      'parallel': parallel_config.ParallelConfig(data=2, context=2, tensor=2),
      'num_microbatches': 2,
    },
    'pmap': {'parallel': parallel_config.ParallelConfig(kind='pmap')},
  }
  losses = {}
  for name, fields in ways.items():
    _run(corpus, teacher, tmp_path / name / 'run', num_steps=3, **fields)
    losses[name] = [r['loss'] for r in _trained(tmp_path / name / 'run')]
  np.testing.assert_allclose(losses['mesh'], losses['one'], rtol=1e-5)
  np.testing.assert_allclose(losses['pmap'], losses['one'], rtol=1e-5)


def test_more_tokens_than_there_are_is_refused(corpus, teacher, tmp_path):
  objective = distillation.Distillation(teacher=teacher, top_k=265)
  experiment = tiny_run.experiment(corpus, objective=objective)
  with pytest.raises(ValueError, match='objective.top_k: got 265, expected at'):
    tiny_run.run(experiment, tmp_path / 'run')
