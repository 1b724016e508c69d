"""Experts on a mesh give the results of one device, for any routing."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from models.moe import dispatch
from parallel import expert_parallel, mesh as mesh_lib, parallel_config, rules
from tests.helpers import tiny_models
from tests.helpers.training import tiny_experiment
from training import learner
from training.optimizer import chain

ROWS, TIME, WIDTH, EXPERTS, EXPERT_WIDTH = 8, 4, 6, 8, 10


def _mesh(**sizes):
  return mesh_lib.make_mesh(parallel_config.ParallelConfig(**sizes))


def _operands(choice='random', seed=0):
  """Returns tokens, ids, gates, kernels, and weights of a loss."""
  rng = np.random.default_rng(seed)
  tokens = ROWS, TIME
  if choice == 'random':
    ids_BTA = np.argsort(rng.random((*tokens, EXPERTS)))[..., :2]
  else:  # all to the first device of a group, or all to the last
    ids_BTA = np.zeros((*tokens, 2), int) + ([0, 1] if choice == 0 else [6, 7])
  into = EXPERTS, WIDTH, EXPERT_WIDTH
  shapes = {'gate': into, 'up': into, 'down': (EXPERTS, EXPERT_WIDTH, WIDTH)}
  return (
    jnp.asarray(rng.normal(size=(*tokens, WIDTH)), jnp.float32),
    jnp.asarray(ids_BTA, jnp.int32),
    jnp.asarray(rng.random((*tokens, 2)), jnp.float32),
    {
      name: jnp.asarray(rng.normal(0, 0.4, shape), jnp.float32)
      for name, shape in shapes.items()
    },
    jnp.asarray(rng.normal(size=(*tokens, WIDTH)), jnp.float32),
  )


@functools.cache
def _value_and_grad(apply_experts):
  def loss(x_BTD, gates_BTA, kernels, ids_BTA, weights_BTD):
    y_BTD = apply_experts(x_BTD, ids_BTA, gates_BTA, kernels, jnp.float32)
    return jnp.sum(y_BTD * weights_BTD), y_BTD

  return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))


def _run(apply_experts, operands):
  x_BTD, ids_BTA, gates_BTA, kernels, weights_BTD = operands
  (_, y_BTD), grads = _value_and_grad(apply_experts)(
    x_BTD, gates_BTA, kernels, ids_BTA, weights_BTD
  )
  return y_BTD, grads


@functools.cache
def _spread(**sizes):
  return expert_parallel.spread(dispatch.apply_experts, _mesh(**sizes))


def _assert_equal(ours, theirs):
  # float32 sums of at most 64 terms of order 1, in other orders.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5),
    ours,
    theirs,
  )


@pytest.mark.parametrize('choice', ['random', 0, 1])
@pytest.mark.parametrize(
  'sizes',
  [{'expert': 8}, {'expert': 2, 'fsdp': 2, 'tensor': 2}],
  ids=str,
)
def test_no_token_is_dropped_and_no_gradient_lost(sizes, choice):
  """Even if all tokens of the batch choose the experts of one device."""
  operands = _operands(choice)
  with rules.applied(_mesh(**sizes)):
    spread = _run(_spread(**sizes), operands)
  _assert_equal(spread, _run(dispatch.apply_experts, operands))


def test_tokens_split_along_rows_and_along_time():
  sizes = {'data': 2, 'expert': 2, 'context': 2}
  operands = _operands()
  with rules.applied(_mesh(**sizes)):
    spread = _run(_spread(**sizes), operands)
  _assert_equal(spread, _run(dispatch.apply_experts, operands))


@pytest.mark.slow
def test_stages_side_by_side():
  """As in a pipeline: stages are an array axis, mapped to the mesh axis."""
  sizes = {'stage': 2, 'data': 1, 'expert': 4}
  stages = [_operands(seed=seed) for seed in range(2)]
  stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *stages)
  with rules.applied(_mesh(**sizes)):
    spread = jax.jit(
      jax.vmap(
        functools.partial(_run, _spread(**sizes)), spmd_axis_name='stage'
      )
    )(stacked)
  alone = [_run(dispatch.apply_experts, operands) for operands in stages]
  _assert_equal(spread, jax.tree.map(lambda *xs: jnp.stack(xs), *alone))


def test_a_device_reads_no_kernels_but_its_own():
  """A device gathers the tokens of its own group only."""
  mesh = _mesh(data=2, expert=4)
  x_BTD, ids_BTA, gates_BTA, kernels, _ = _operands()
  at = functools.partial(jax.sharding.NamedSharding, mesh)
  kernels = {
    name: jax.device_put(w, at(PartitionSpec('expert')))
    for name, w in kernels.items()
  }
  tokens = [
    jax.device_put(part, at(PartitionSpec(rules.BATCH_AXES)))
    for part in (x_BTD, ids_BTA, gates_BTA)
  ]
  apply = jax.jit(_spread(data=2, expert=4), static_argnums=4)
  with rules.applied(mesh):
    text = apply.lower(*tokens, kernels, 'float32').compile().as_text()
  # Half the rows: those of one group.
  assert f'f32[{ROWS // 2},{TIME},{WIDTH}]' in text
  assert f'f32[{ROWS},{TIME},{WIDTH}]' not in text
  assert f'f32[{EXPERTS // 4},{WIDTH},{EXPERT_WIDTH}]' in text
  assert f'f32[{EXPERTS},{WIDTH},{EXPERT_WIDTH}]' not in text


def test_one_device_needs_no_spreading():
  mesh = mesh_lib.make_mesh(parallel_config.ParallelConfig(), jax.devices()[:1])
  apply = expert_parallel.spread(dispatch.apply_experts, mesh)
  assert apply is dispatch.apply_experts


# Sizes that divide by every mesh axis below.
MODEL = tiny_models.mixture(
  vocab_size=64,
  model_width=32,
  head_width=8,
  expert_width=16,
  scan_layers=True,
)


def _experiment(model=MODEL, **parallel):
  return tiny_experiment.make(
    model=model,
    optimizer=chain.OptimizerConfig(warmup_steps=2, peak_lr=1e-2),
    parallel=parallel,
  )


@functools.cache
def _trajectory(num_devices, **parallel):
  """Returns the metrics of ten steps, [steps, metrics]."""
  learns = learner.make(_experiment(**parallel), jax.devices()[:num_devices])
  state = learns.init(jax.random.key(0))
  train_step = learns.compile_train_step()
  reported = []
  for index in range(10):
    batch = tiny_models.batch(
      batch_size=16,
      row_length=16,
      vocab_size=64,
      num_segments=2,
      num_padding=index % 4,
      seed=index % 4,
    )
    state, metrics = train_step(state, learns.placement.put_batch(batch))
    reported.append([float(metrics[name]) for name in sorted(metrics)])
  return sorted(metrics), np.array(reported)


@pytest.mark.slow
@pytest.mark.parametrize(
  'parallel',
  [
    {'expert': 4, 'fsdp': 2},
    *(
      pytest.param(parallel, marks=pytest.mark.slow)
      for parallel in (
        {'expert': 8},
        {'data': 2, 'expert': 2, 'tensor': 2},
        {'fsdp': 8},
        {'kind': 'pmap'},
        {'stage': 2, 'expert': 2, 'fsdp': 2},
        {'context': 2, 'expert': 4},
      )
    ),
  ],
  ids=str,
)
def test_every_way_across_devices_trains_the_same(parallel):
  names, expected = _trajectory(1)
  same_names, found = _trajectory(8, **parallel)
  assert same_names == names
  loss = names.index('loss')
  assert expected[-1, loss] < expected[0, loss]
  # The bound for dense models; 2e-6 was seen. Counts of tokens per
  # expert are whole numbers: a single token elsewhere would show as 2e-3.
  np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize(
  ('model', 'parallel', 'message'),
  [
    (
      tiny_models.llama_like(),
      {'expert': 2},
      'parallel.expert: got 2 with a dense model, expected 1: there are no',
    ),
    (
      MODEL,
      {'expert': 16},
      'got 16, expected a divisor of model.num_experts = 8',
    ),
    (
      tiny_models.mixture(num_experts=6),
      {'expert': 4},
      'got 4, expected a divisor of model.num_experts = 6',
    ),
  ],
)
def test_experts_that_cannot_be_dealt_out_are_refused(model, parallel, message):
  with pytest.raises(ValueError, match=message):
    learner.make(_experiment(model, **parallel))
