"""The slot of an objective: batches, frozen models and heads of its own.

Objectives that the product does not have, each one dataclass: preferences
against a reference model (DPO), a reward head, and distillation with a value
head through a whole run.
"""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data import data_config, sources
from frozen import format as frozen_format, freeze
from models import layout, transformer
from parallel import parallel_config
from storage import file_names
from tests.helpers import frozen_dirs, tiny_models
from tests.helpers.training import tiny_run
from training import experiment as experiment_lib, learner as learner_lib
from training.objectives import next_token, port
from training.optimizer import chain, param_groups
from training.planning import memory
from training.reporting import metrics as metrics_lib

MODEL = tiny_models.llama_like(
  vocab_size=64,
  num_layers=4,
  model_width=32,
  num_heads=4,
  num_kv_heads=2,
  head_width=8,
  scan_layers=True,
)
SIDES = 'chosen', 'rejected'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dpo(port.Objective):
  """Direct preference optimisation (arXiv:2305.18290, equation 7)."""

  reference: port.ModelSource
  beta: float = 0.1

  @property
  def models_needed(self):
    return {'reference': self.reference}

  def batch_spec(self):
    return {
      f'{side}_{name}': spec
      for side in SIDES
      for name, spec in port.TOKEN_ROWS.items()
    }

  def __call__(self, params, batch, model, *, reference):
    chosen_B, rejected_B = (
      self._logprob(model, params, batch, side)
      - self._logprob(reference.model, reference.params, batch, side)
      for side in SIDES
    )
    margins_B = self.beta * (chosen_B - rejected_B)
    loss = -jnp.sum(jax.nn.log_sigmoid(margins_B))
    return loss, {
      'weight': jnp.asarray(margins_B.size, jnp.float32),
      'accuracy': jnp.sum(margins_B > 0, dtype=jnp.float32),
    }

  def _logprob(self, model, params, batch, side):
    get = lambda name: batch[f'{side}_{name}']  # noqa: E731
    hidden = model.hidden(
      params, get('tokens'), get('positions'), get('segment_ids')
    )
    logprobs_BT = model.token_logprobs(
      params, hidden.states_BTD, get('targets')
    )
    return jnp.sum(logprobs_BT * get('weights'), axis=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reward(Dpo):
  """A reward model: the sum of the head over tokens (Bradley and Terry)."""

  @property
  def models_needed(self):
    return {}

  def init_heads(self, config, key):
    kernel = 0.02 * jax.random.normal(key, (config.model_width, 1))
    return {'reward': {'kernel': kernel, 'bias': jnp.zeros(1)}}

  def __call__(self, params, batch, model):
    head = params['heads']['reward']

    def reward_B(side):
      hidden = model.hidden(
        params,
        batch[f'{side}_tokens'],
        batch[f'{side}_positions'],
        batch[f'{side}_segment_ids'],
      )
      rewards_BT1 = hidden.states_BTD @ head['kernel']
      rewards_BT = (rewards_BT1 + head['bias'][None, None, :])[:, :, 0]
      return jnp.sum(rewards_BT * batch[f'{side}_weights'], axis=1)

    margins_B = reward_B('chosen') - reward_B('rejected')
    return -jnp.sum(jax.nn.log_sigmoid(margins_B)), {
      'weight': jnp.asarray(margins_B.size, jnp.float32)
    }


def _experiment(objective, **fields):
  experiment = experiment_lib.Experiment(
    **{
      'name': 'preferences',
      'model': MODEL,
      'data': data_config.DataConfig(
        open_source=sources.text_files, path='-', row_length=16, batch_size=8
      ),
      'optimizer': chain.OptimizerConfig(warmup_steps=0, schedule='constant'),
      'objective': objective,
      'num_steps': 4,
      **fields,
    }
  )
  experiment.validate()
  return experiment


def _key():
  return jax.random.key(0)


def _preferences(seed=0):
  """Two continuations of the same rows, by hand."""
  batches = [
    tiny_models.batch(vocab_size=64, num_padding=2, seed=2 * seed + i)
    for i in range(2)
  ]
  return {
    f'{side}_{name}': value
    for side, batch in zip(SIDES, batches, strict=True)
    for name, value in batch.items()
  }


@pytest.fixture(scope='module')
def reference(tmp_path_factory):
  """A frozen directory with the first weights of every run from `_key`."""
  learner = learner_lib.make(
    _experiment(next_token.NextToken()), jax.devices()[:1]
  )
  state = learner.init(_key())
  params, config = layout.unstack(jax.device_get(state.params), MODEL)
  directory = tmp_path_factory.mktemp('reference') / 'frozen'
  frozen_dirs.write(directory, params=params, config=config)
  return port.ModelSource(str(directory))


def _train(objective, parallel, num_devices, num_steps=2, **fields):
  """Returns the losses, and the whole state before and after the steps."""
  experiment = _experiment(
    objective, parallel=parallel_config.ParallelConfig(**parallel), **fields
  )
  learner = learner_lib.make(experiment, jax.devices()[:num_devices])
  batch = _preferences()
  shapes = learner.batch_shapes()
  assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
    k: (v.shape, v.dtype) for k, v in shapes.items()
  }
  state = learner.init(_key())
  before = jax.device_get(learner.placement.whole(state))
  train_step = learner.compile_train_step()
  batch = learner.placement.put_batch(batch)
  losses = []
  for _ in range(num_steps):
    state, metrics = train_step(state, batch)
    losses.append(float(metrics['loss']))
  frozen = () if state.frozen_params is None else (state.frozen_params,)
  sums = learner.compile_eval_step()(state.params, batch, *frozen)
  losses.append(float(sums['loss'] / sums['weight']))
  return losses, before, jax.device_get(learner.placement.whole(state))


@functools.cache
def _dpo_on_one_device(reference):
  return _train(Dpo(reference=reference), {}, 1)


def test_preferences_are_learnt_from_the_reference_on(reference):
  losses, before, after = _dpo_on_one_device(reference)
  # Policy and reference agree: every margin is 0, and -log sigmoid(0) is log 2.
  # The two may round differently, by an ulp of a log-probability of about 60.
  assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
  assert losses[2] < losses[1] < losses[0]
  frozen_before = before.frozen_params['reference']
  jax.tree.map(np.testing.assert_array_equal, frozen_before, before.params)
  jax.tree.map(
    np.testing.assert_array_equal,
    frozen_before,
    after.frozen_params['reference'],
  )
  moved = jax.tree.map(
    lambda a, b: np.abs(a - b).max(), before.params, after.params
  )
  assert min(jax.tree.leaves(moved)) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
  ('parallel', 'num_devices'),
  [
    ({'data': 2, 'fsdp': 2, 'tensor': 2}, 8),
    ({'kind': 'pmap'}, 4),
    # A pipeline that passes each stage twice stacks its layers otherwise.
    pytest.param(
      {'data': 2, 'stage': 2, 'stage_repeats': 2}, 4, marks=pytest.mark.slow
    ),
  ],
  ids=str,
)
def test_with_a_reference_every_way_across_devices_trains_the_same(
  reference, parallel, num_devices
):
  expected, _, expected_state = _dpo_on_one_device(reference)
  losses, before, state = _train(
    Dpo(reference=reference), parallel, num_devices
  )
  # Sums over devices are added in another order; Adam's first steps divide by
  # the gradient, so that a weight may differ where its gradient is about 0.
  np.testing.assert_allclose(losses, expected, atol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=5e-4),
    state.params,
    expected_state.params,
  )
  for tree in (before, state):
    jax.tree.map(
      np.testing.assert_array_equal,
      tree.frozen_params,
      expected_state.frozen_params,
    )


@pytest.mark.slow
def test_micro_batches_of_preferences_add_up(reference):
  expected, _, _ = _dpo_on_one_device(reference)
  losses, _, _ = _train(Dpo(reference=reference), {}, 1, num_microbatches=2)
  np.testing.assert_allclose(losses, expected, atol=1e-5)


def test_a_reference_is_split_as_the_model_is(reference):
  parallel = parallel_config.ParallelConfig(fsdp=2, tensor=2, data=2)
  learner = learner_lib.make(
    _experiment(Dpo(reference=reference), parallel=parallel)
  )
  state = learner.init(_key())
  estimated = memory.estimate(learner)
  assert estimated.frozen == estimated.params > 0
  own = jax.tree.map(lambda x: x.sharding, state.params)
  of_reference = jax.tree.map(
    lambda x: x.sharding, state.frozen_params['reference']
  )
  assert own == of_reference
  assert any(not s.is_fully_replicated for s in jax.tree.leaves(own))


@pytest.mark.slow
@pytest.mark.parametrize(
  ('parallel', 'num_devices'),
  [
    ({'data': 2, 'fsdp': 2, 'tensor': 2}, 8),
    pytest.param({'kind': 'pmap'}, 4, marks=pytest.mark.slow),
  ],
  ids=str,
)
def test_a_head_is_trained_beside_the_model(reference, parallel, num_devices):
  objective = Reward(reference=reference)
  runs = [
    _train(objective, place, devices)
    for place, devices in (({}, 1), (parallel, num_devices))
  ]
  (expected, before, after), (losses, before_there, after_there) = runs
  np.testing.assert_allclose(losses, expected, atol=1e-5)
  assert expected[2] < expected[0]
  assert before.params.keys() == {'params', 'heads'}
  jax.tree.map(
    np.testing.assert_array_equal, before.params, before_there.params
  )
  kernel = [s.params['heads']['reward']['kernel'] for s in (before, after)]
  assert np.abs(kernel[1] - kernel[0]).max() > 1e-4
  np.testing.assert_allclose(
    after_there.params['heads']['reward']['kernel'], kernel[1], atol=5e-4
  )
  # A head is no hidden matrix, which Muon would orthogonalise.
  is_hidden = param_groups.is_hidden_matrix(before.params)
  assert not any(jax.tree.leaves(is_hidden['heads']))
  assert any(jax.tree.leaves(is_hidden['params']))
  # The model begins where it does without a head.
  plain = learner_lib.make(
    _experiment(next_token.NextToken()), jax.devices()[:1]
  ).init(_key())
  jax.tree.map(
    np.testing.assert_array_equal,
    jax.device_get(plain.params['params']),
    before.params['params'],
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distil(port.Objective):
  """Cross-entropy with a teacher's distribution, and a head for its entropy."""

  teacher: port.ModelSource

  @property
  def models_needed(self):
    return {'teacher': self.teacher}

  def init_heads(self, config, key):
    del key
    return {'entropy': {'kernel': jnp.zeros((config.model_width, 1))}}

  def __call__(self, params, batch, model, *, teacher):
    inputs = batch['tokens'], batch['positions'], batch['segment_ids']
    states_BTD = model.hidden(params, *inputs).states_BTD
    logits_BTV = teacher.model.logits(
      teacher.params, teacher.model.hidden(teacher.params, *inputs).states_BTD
    )
    logprobs_BTV = jax.nn.log_softmax(logits_BTV)
    probs_BTV = jnp.exp(logprobs_BTV)
    own_BTV = jax.nn.log_softmax(model.logits(params, states_BTD))
    cross_BT = -jnp.sum(probs_BTV * own_BTV, axis=-1)
    entropy_BT = -jnp.sum(probs_BTV * logprobs_BTV, axis=-1)
    guess_BT = (states_BTD @ params['heads']['entropy']['kernel'])[:, :, 0]
    weights_BT = batch['weights']
    head_loss = jnp.sum(weights_BT * (guess_BT - entropy_BT) ** 2)
    return jnp.sum(weights_BT * cross_BT) + head_loss, {
      'weight': jnp.sum(weights_BT),
      'head_loss': head_loss,
    }


def _teacher(directory, seed=0):
  config = tiny_models.llama_like(vocab_size=264, num_layers=1)
  params = transformer.Transformer(config).init(
    jax.random.key(seed), jnp.zeros((1, 1), jnp.int32)
  )
  params, config = layout.unstack(params, config)
  return frozen_dirs.write(directory, params=params, config=config)


@pytest.mark.slow
def test_a_run_keeps_its_heads_and_knows_its_teacher(corpus, tmp_path):
  manifest = _teacher(tmp_path / 'teacher')
  source = port.ModelSource(str(tmp_path / 'teacher'))
  # Half a run: a schedule that decays would decay sooner.
  optimizer = chain.OptimizerConfig(warmup_steps=2, schedule='constant')
  experiment = tiny_run.experiment(
    corpus, objective=Distil(teacher=source), num_steps=8, optimizer=optimizer
  )
  workdir = tmp_path / 'run'
  half = dataclasses.replace(experiment, num_steps=4)
  tiny_run.run(half, workdir)
  recorded = json.loads((workdir / 'run.json').read_text())
  assert recorded['lineage'] == {'teacher': manifest.weights_digest}
  assert recorded['config']['objective'] == {
    'type': f'{Distil.__module__}.Distil',
    'teacher': {
      'type': 'training.objectives.port.ModelSource',
      'path': source.path,
    },
  }
  saved = workdir / file_names.CHECKPOINTS / '4'
  assert {path.name for path in saved.iterdir() if path.is_dir()} == {
    'params',
    'opt_state',
  }
  # Resumed is uninterrupted, bit for bit.
  tiny_run.run(experiment, workdir)
  tiny_run.run(experiment, tmp_path / 'whole')
  params, whole = (
    freeze._restore_params(d / file_names.CHECKPOINTS / '8' / 'params')
    for d in (workdir, tmp_path / 'whole')
  )
  jax.tree.map(np.testing.assert_array_equal, params, whole)
  assert np.abs(params['heads']['entropy']['kernel']).max() > 0
  # The frozen directory is that of a plain model, with its lineage.
  frozen = frozen_format.read(workdir / 'frozen')
  assert frozen.params.keys() == {'params'}
  assert frozen.manifest.lineage == {'teacher': manifest.weights_digest}
  records = metrics_lib.read(workdir)
  losses = [r['loss'] for r in records if r['kind'] == 'train']
  assert losses[-1] < losses[0]
  assert all('head_loss' in r for r in records if r['kind'] == 'train')


@pytest.mark.slow
def test_a_run_is_not_resumed_with_another_teacher(corpus, tmp_path):
  _teacher(tmp_path / 'teacher')
  _teacher(tmp_path / 'other', seed=1)
  experiment = tiny_run.experiment(
    corpus,
    objective=Distil(teacher=port.ModelSource(str(tmp_path / 'teacher'))),
    num_steps=4,
  )
  tiny_run.run(experiment, tmp_path / 'run')
  other = dataclasses.replace(
    experiment,
    objective=Distil(teacher=port.ModelSource(str(tmp_path / 'other'))),
    num_steps=8,
  )
  with pytest.raises(
    ValueError, match='objective.teacher: got a model with weights .*, expected'
  ):
    tiny_run.run(other, tmp_path / 'run')


@pytest.mark.parametrize(
  ('path', 'message'),
  [
    ('absent', "objective.reference: got '.*absent', expected a frozen dir"),
    (
      'small',
      'objective.reference: got a model of 60 tokens, expected model.v',
    ),
  ],
)
def test_a_reference_that_does_not_fit_is_refused(tmp_path, path, message):
  if path == 'small':
    frozen_dirs.write(
      tmp_path / path, config=tiny_models.llama_like(vocab_size=60)
    )
  objective = Dpo(reference=port.ModelSource(str(tmp_path / path)))
  with pytest.raises(ValueError, match=message):
    learner_lib.make(_experiment(objective))


def test_an_objective_whose_arrays_the_data_lacks_is_refused(
  corpus, tmp_path, reference
):
  experiment = tiny_run.experiment(
    corpus, objective=Reward(reference=reference)
  )
  with pytest.raises(
    ValueError,
    match=r'config.objective: got batches with tokens \(int32 BT\), .*, '
    r'expected chosen_tokens \(int32 BT\), .* for Reward; use an objective',
  ):
    tiny_run.run(experiment, tmp_path / 'run')
  assert not (tmp_path / 'run' / 'run.json').exists()


@pytest.mark.slow
def test_token_logprobs_are_those_of_the_logits_in_any_number_of_chunks(
  monkeypatch,
):
  module = transformer.Transformer(MODEL)
  params = jax.jit(module.init)(_key(), jnp.zeros((1, 1), jnp.int32))
  batch = tiny_models.batch(vocab_size=64, num_segments=2)
  model = port.Model(module)

  def logprobs(params):
    hidden = model.hidden(
      params, batch['tokens'], batch['positions'], batch['segment_ids']
    )
    return model.token_logprobs(params, hidden.states_BTD, batch['targets'])

  logits_BTV, _ = module.apply(
    params, batch['tokens'], batch['positions'], None, batch['segment_ids']
  )
  expected = np.take_along_axis(
    np.asarray(jax.nn.log_softmax(logits_BTV)),
    batch['targets'][:, :, None],
    axis=-1,
  )[:, :, 0]
  np.testing.assert_allclose(jax.jit(logprobs)(params), expected, atol=1e-5)
  gradient = jax.jit(jax.grad(lambda p: logprobs(p).sum()))(params)
  monkeypatch.setattr(
    'models.layers.cross_entropy.MAX_CHUNK_LOGITS', 8 * 4 * 64
  )
  np.testing.assert_allclose(
    jax.jit(lambda p: logprobs(p))(params), expected, atol=1e-5
  )
  chunked = jax.jit(jax.grad(lambda p: 1.0 * logprobs(p).sum()))(params)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), chunked, gradient
  )
