"""The reward objective: closed forms, and cuts that change nothing.

tests/training/objectives/test_reward_peer.py compares it with TRL.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data import data_config
from models import transformer
from models.layers import reward_head
from parallel import parallel_config
from tests.helpers import tiny_models
from training import experiment as experiment_lib, learner as learner_lib
from training.evaluation import validation
from training.objectives import port, reward
from training.optimizer import chain

MODEL = tiny_models.llama_like(
  vocab_size=64,
  num_layers=4,
  model_width=32,
  num_heads=4,
  num_kv_heads=2,
  head_width=8,
  scan_layers=True,
)
# Lengths of the documents of each row: chosen, rejected, chosen, ...
LENGTHS = [
  (3, 5, 2, 4), (7, 6), (1, 1, 8, 2), (5, 5), (2, 9), (4, 3), (6, 6), (8, 4),
]  # fmt: skip


def pairs(lengths=LENGTHS, *, row_length=16, seed=0):
  """Returns rows of units of two documents, with margins, by hand."""
  rng = np.random.default_rng(seed)
  batch = {
    name: np.zeros((len(lengths), row_length), np.int32)
    for name in ('tokens', 'targets', 'positions', 'segment_ids')
  }
  batch |= {
    name: np.zeros((len(lengths), row_length), np.float32)
    for name in ('weights', 'margins')
  }
  for row, sizes in enumerate(lengths):
    start = 0
    for i, size in enumerate(sizes):
      at = row, slice(start, start + size)
      batch['tokens'][at] = rng.integers(0, 64, size)
      batch['targets'][at] = rng.integers(0, 64, size)
      batch['positions'][at] = np.arange(size)
      batch['segment_ids'][at] = i + 1
      batch['weights'][at] = rng.integers(0, 2, size)
      batch['margins'][at] = (i // 2 + 1) / 2
      start += size
  return batch


def _without_margins(batch):
  return {name: x for name, x in batch.items() if name != 'margins'}


@functools.cache
def _params():
  params = transformer.Transformer(MODEL).init(
    jax.random.key(0), jnp.zeros((1, 1), jnp.int32)
  )
  heads = reward.Reward().init_heads(MODEL, jax.random.key(1))
  # Larger, so that rewards differ and no margin is about 0.
  heads = jax.tree.map(lambda x: 3 * x, heads)
  return {**params, 'heads': heads}


def _rewards(batch):
  """Returns the reward of every document by row, each computed alone."""
  model = transformer.Transformer(MODEL)
  found = []
  for row in range(len(batch['tokens'])):
    ids = batch['segment_ids'][row]
    found.append([])
    for segment in range(1, ids.max() + 1):
      tokens_1T = batch['tokens'][row][ids == segment][None]
      hidden_1TD, _ = model.apply(
        {'params': _params()['params']}, tokens_1T, method='hidden'
      )
      kernel_D1 = _params()['heads']['reward']['kernel']
      found[-1].append(float((hidden_1TD[0, -1] @ kernel_D1)[0]))
  return found


def _loss(objective, batch, params=None):
  fn = jax.jit(
    lambda params, batch: objective(
      params, batch, port.Model(transformer.Transformer(MODEL))
    )
  )
  return fn(params or _params(), batch)


@pytest.mark.slow
@pytest.mark.parametrize(
  'objective',
  [
    reward.Reward(),
    reward.Reward(margin=1.0),
    reward.Reward(margin=0.3, centring=0.05),
  ],
  ids=str,
)
def test_the_loss_is_that_of_the_papers_at_the_last_token(objective):
  batch = pairs()
  losses, gaps, all_rewards = [], [], []
  for row in _rewards(batch):
    for pair, (chosen, rejected) in enumerate(
      zip(row[::2], row[1::2], strict=True)
    ):
      margin = objective.margin * (pair + 1) / 2
      # -log sigmoid(x) = log(1 + exp(-x))
      loss = math.log1p(math.exp(-(chosen - rejected - margin)))
      losses.append(loss + objective.centring * (chosen + rejected) ** 2)
      gaps.append(chosen - rejected)
      all_rewards += [chosen, rejected]
  if not objective.margin:
    batch = _without_margins(batch)
  loss, sums = _loss(objective, batch)
  assert float(loss) == pytest.approx(sum(losses), rel=1e-5)
  assert float(sums['weight']) == len(losses) == 10
  assert float(sums['tokens']) == sum(map(sum, LENGTHS))
  assert float(sums['accuracy'].total) == sum(gap > 0 for gap in gaps)
  assert 0 < sum(gap > 0 for gap in gaps) < len(gaps)
  assert float(sums['margin'].total) == pytest.approx(sum(gaps), abs=1e-4)
  assert float(sums['reward'].total) == pytest.approx(
    sum(all_rewards) / 2, abs=1e-4
  )


def test_margins_and_centring_change_the_loss():
  batch = pairs()
  losses = {
    float(_loss(objective, batch)[0])
    for objective in (
      reward.Reward(),
      reward.Reward(margin=1.0),
      reward.Reward(centring=0.1),
    )
  }
  assert len(losses) == 3


def test_packing_and_padding_change_nothing():
  batch = _without_margins(pairs())
  alone, documents = [], []
  for row, sizes in enumerate(LENGTHS):
    ids = batch['tokens'][row]
    edges = np.cumsum((0, *sizes))
    documents += [ids[a:b] for a, b in zip(edges, edges[1:], strict=False)]
  # A unit per row, in rows of another length.
  for chosen, rejected in zip(documents[::2], documents[1::2], strict=True):
    alone.append((len(chosen), len(rejected)))
  spread = _without_margins(pairs(alone, row_length=23))
  for row, unit in enumerate(zip(documents[::2], documents[1::2], strict=True)):
    joined = np.concatenate(unit)
    spread['tokens'][row, : len(joined)] = joined

  grad = jax.jit(
    jax.value_and_grad(
      lambda params, batch: reward.Reward(centring=0.1)(
        params, batch, port.Model(transformer.Transformer(MODEL))
      )[0]
    )
  )
  (packed, packed_grad), (loss, loss_grad) = (
    grad(_params(), b) for b in (batch, spread)
  )
  assert float(packed) == pytest.approx(float(loss), rel=1e-6)
  # The same sums in another order, of gradients of order 1.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5),
    packed_grad,
    loss_grad,
  )


def test_padding_on_the_left_changes_nothing():
  batch = _without_margins(pairs())
  num_padding = (batch['segment_ids'] == 0).sum(axis=1)
  moved = {
    name: np.stack([np.roll(*row) for row in zip(x, num_padding, strict=True)])
    for name, x in batch.items()
  }
  assert (moved['segment_ids'][1] != batch['segment_ids'][1]).any()
  loss, expected = (float(_loss(reward.Reward(), b)[0]) for b in (moved, batch))
  assert loss == pytest.approx(expected, rel=1e-6)


def test_no_gradient_crosses_documents():
  """What one document reads changes no reward of another."""
  batch = _without_margins(pairs())

  def rewards(embedded):
    params = dict(_params())
    params['params'] = {**params['params'], 'embed': {'embedding': embedded}}
    model = port.Model(transformer.Transformer(MODEL))
    hidden = model.hidden(
      params, batch['tokens'], batch['positions'], batch['segment_ids']
    )
    values = reward_head.rewards(params['heads']['reward'], hidden.states_BTD)
    return reward.at_ends(values, batch)[0][0, 1, 0]  # row 0, segment 3

  table_VD = _params()['params']['embed']['embedding']
  moved_V = np.abs(jax.jit(jax.grad(rewards))(table_VD)).sum(axis=1) > 0
  own = batch['tokens'][0][batch['segment_ids'][0] == 3]
  assert set(np.flatnonzero(moved_V)) == set(own)


def _experiment(parallel, **fields):
  return experiment_lib.Experiment(
    **{
      'name': 'reward',
      'model': MODEL,
      'data': data_config.DataConfig(path='-', row_length=16, batch_size=8),
      'optimizer': chain.OptimizerConfig(warmup_steps=0, schedule='constant'),
      'objective': reward.Reward(margin=0.5, centring=0.01),
      'num_steps': 4,
      'parallel': parallel_config.ParallelConfig(**parallel),
      **fields,
    }
  )


def _train(parallel, num_devices, **fields):
  learner = learner_lib.make(
    _experiment(parallel, **fields), jax.devices()[:num_devices]
  )
  state = learner.init(jax.random.key(0))
  train_step = learner.compile_train_step()
  batch = learner.placement.put_batch(pairs())
  metrics = []
  for _ in range(3):
    state, found = train_step(state, batch)
    metrics.append({name: float(value) for name, value in found.items()})
  sums = jax.device_get(learner.compile_eval_step()(state.params, batch))
  params = jax.device_get(learner.placement.whole(state)).params
  return metrics, sums, params


@functools.cache
def _on_one_device():
  return _train({}, 1)


@pytest.mark.slow
def test_a_reward_model_learns_its_pairs():
  metrics, sums, params = _on_one_device()
  assert metrics[-1]['loss'] < metrics[0]['loss']
  assert metrics[0]['weight'] == 10
  assert metrics[0]['tokens'] == sum(map(sum, LENGTHS))
  assert 0 <= metrics[0]['accuracy'] <= 1
  assert float(sums['accuracy'].weight) == 10
  assert params['heads']['reward']['kernel'].shape == (32, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('parallel', 'num_devices', 'fields'),
  [
    ({}, 1, {'num_microbatches': 4}),
    ({'data': 2, 'fsdp': 2, 'tensor': 2}, 8, {}),
    ({'kind': 'pmap'}, 4, {'num_microbatches': 2}),
    # Tokens of a row are reordered over devices.
    ({'data': 2, 'context': 4}, 8, {}),
    pytest.param({'data': 2, 'stage': 4}, 8, {}, marks=pytest.mark.slow),
  ],
  ids=str,
)
def test_no_cut_of_the_batch_changes_a_step(parallel, num_devices, fields):
  expected, expected_sums, expected_params = _on_one_device()
  metrics, sums, params = _train(parallel, num_devices, **fields)
  for found, wanted in zip(metrics, expected, strict=True):
    assert found == pytest.approx(wanted, abs=1e-5, rel=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-5),
    sums,
    expected_sums,
  )
  # Adam divides by the gradient, so that a weight may differ where its gradient
  # is about 0.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=5e-4),
    params,
    expected_params,
  )


@pytest.mark.slow
def test_micro_batches_of_a_mixture_add_up():
  """The routers' losses are means over tokens, whatever a pair weighs."""
  mixture = tiny_models.mixture(vocab_size=64, scan_layers=True)
  found = [
    _train({}, 1, model=mixture, num_microbatches=parts)[0] for parts in (1, 4)
  ]
  assert 'balance_loss' in found[0][0]
  for got, expected in zip(*found, strict=True):
    assert got == pytest.approx(expected, abs=1e-5, rel=1e-5)


def test_evaluation_reports_accuracy_with_its_error():
  """The error is that of a mean of zeros and ones, over all batches."""
  parts = [(3.0, 4.0), (5.0, 6.0)]

  def eval_step(params, batch):
    total, weight = parts[batch['index']]
    return {
      'loss': np.float32(2.0),
      'weight': np.float32(weight),
      'accuracy': port.Share(np.float32(total), np.float32(weight)),
      'margin': port.Mean(np.float32(total), np.float32(weight)),
    }

  values = validation.evaluate(
    eval_step,
    None,
    [{'index': 0}, {'index': 1}],
    put_batch=lambda batch: batch,
    num_bytes_V=np.zeros(1),
    predicts_text=False,
  )
  answers = [1.0] * 8 + [0.0] * 2
  assert values == {
    'loss': pytest.approx(0.4),
    'accuracy': pytest.approx(0.8),
    'accuracy_error': pytest.approx(np.std(answers, ddof=1) / math.sqrt(10)),
    'margin': pytest.approx(0.8),
  }
  assert 'accuracy 0.8000 +- 0.1333' in validation.report(values)


@pytest.mark.parametrize(
  ('objective', 'message'),
  [
    (reward.Reward(margin=-1), 'objective.margin: got -1, expected a number'),
    (reward.Reward(centring=math.inf), 'objective.centring: got inf, expected'),
    (reward.Reward(centring=math.nan), 'objective.centring: got nan, expected'),
  ],
)
def test_wrong_hyper_parameters_are_refused(objective, message):
  with pytest.raises(ValueError, match=message):
    objective.validate()


def test_text_makes_no_pairs():
  experiment = _experiment({})
  with pytest.raises(
    ValueError, match='data.examples: got text, expected pairs'
  ):
    experiment.validate()
