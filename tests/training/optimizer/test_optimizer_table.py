"""One table of optimizers, one battery of tests.

On the parameters of a mixture of experts with scanned layers: matrices in one
stack and in two, tables, norms. Gradients are random numbers; no model is run.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import axes, transformer
from parallel import parallel_config, placement as placement_lib
from tests.helpers import tiny_models
from training import experiment, state as state_lib
from training.checkpoints import checkpoint
from training.optimizer import chain, update_rules

STEPS = 300
# Every size divides by the mesh axes below; the queries' matrix is square.
MODEL = tiny_models.mixture(
  scan_layers=True,
  num_layers=4,
  vocab_size=64,
  model_width=32,
  num_heads=4,
  head_width=8,
  expert_width=16,
  num_shared_experts=0,
)
_FACTORED = update_rules.Adafactor(min_factored_size=8)
_CONSTANT = {'schedule': 'constant'}

# Per row: fields, and bytes of the state per byte of the parameters, where that
# does not depend on their shapes.
TABLE = {
  'adamw': ({}, 2),
  'adamw bfloat16': ({'rule': update_rules.AdamW(state_dtype='bfloat16')}, 1),
  'muon': ({'rule': update_rules.Muon(), 'peak_lr': 2e-2}, None),
  'adafactor': ({'rule': _FACTORED}, None),
  'lion': ({'rule': update_rules.Lion()}, 1),
  'lion bfloat16': ({'rule': update_rules.Lion(state_dtype='bfloat16')}, 0.5),
  'schedule_free': ({'rule': update_rules.ScheduleFree()} | _CONSTANT, 2),
  'ademamix': ({'rule': update_rules.Ademamix()}, 3),
  'frozen': ({'lr_multipliers': (('embed/', 0.0),)}, None),
}
every_optimizer = pytest.mark.parametrize('row', TABLE)


def _config(row, **fields):
  config = chain.OptimizerConfig(
    **{'warmup_steps': 1, 'peak_lr': 1e-2} | TABLE[row][0] | fields
  )
  config.validate(STEPS)
  return config


@functools.cache
def _optimizer(row, is_staged=False):
  return chain.make_optimizer(
    _config(row), STEPS, MODEL, _abstract_params(), is_staged=is_staged
  )


@functools.cache
def _abstract_params():
  return state_lib.abstract_params(transformer.Transformer(MODEL))


def _random(seed, *, scale=1.0):
  """Numbers in the place of parameters or gradients."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda leaf: jnp.asarray(scale * rng.normal(size=leaf.shape), leaf.dtype),
    _abstract_params(),
  )


def _init(row):
  params = _random(0, scale=0.02)
  return state_lib.TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=_optimizer(row).init(params),
    key=jax.random.key(0),
  )


def _take_step(row, state, grads, *, is_staged=False):
  updates, opt_state = _optimizer(row, is_staged).update(
    grads, state.opt_state, state.params
  )
  return state.replace(
    step=state.step + 1,
    params=jax.tree.map(jnp.add, state.params, updates),
    opt_state=opt_state,
  )


@functools.cache
def _jitted(row):
  return (
    jax.jit(functools.partial(_init, row)),
    jax.jit(functools.partial(_take_step, row), donate_argnums=0),
  )


def _run(row, *, first=0, last=3, state=None):
  init, take_step = _jitted(row)
  state = init() if state is None else state
  for index in range(first, last):
    state = take_step(state, _random(index + 1))
  return state


def _abstract(state):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
  )


def _num_bytes(tree):
  return sum(
    math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree)
  )


def test_the_table_has_every_optimizer():
  assert {type(_config(row).rule) for row in TABLE} == set(
    update_rules.RULES.values()
  )


@pytest.mark.fast_cases(2)
@every_optimizer
def test_steps_move_every_parameter_that_is_not_frozen(row):
  state = _run(row)
  frozen = TABLE[row][0].get('lr_multipliers')

  def check(path, before, after):
    assert after.dtype == jnp.float32
    assert np.isfinite(after).all()
    is_frozen = frozen and "['embed']" in jax.tree_util.keystr(path)
    moved = np.abs(after - before).mean()
    # Decayed neither: what is frozen is the very same.
    assert moved == 0 if is_frozen else moved > 1e-5

  jax.tree_util.tree_map_with_path(check, _random(0, scale=0.02), state.params)


@every_optimizer
def test_the_state_is_as_large_as_the_table_says(row):
  state = jax.eval_shape(functools.partial(_init, row))
  share = _num_bytes(state.opt_state) / _num_bytes(state.params)
  expected = TABLE[row][1]
  if expected is not None:
    # Besides the moments there are counts.
    assert share == pytest.approx(expected, abs=1e-3)
    return
  params = state.params['params']
  if row == 'frozen':
    num_numbers = 2 * (_size(params) - _size(params['embed']))
  else:
    num_numbers = sum(
      _numbers_kept(row, jax.tree_util.keystr(path), leaf.shape)
      for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    )
  assert share == pytest.approx(num_numbers / _size(params), abs=1e-3)


def _numbers_kept(row, name, shape):
  size, is_norm = math.prod(shape), 'norm' in name
  if row == 'muon':
    is_hidden = 'layers' in name and not is_norm and 'router' not in name
    return size if is_hidden else 2 * size
  assert row == 'adafactor'
  if is_norm:  # all of the moment, and two placeholders per vector
    return size + 2 * size // shape[-1]
  # A row's worth, a column's worth and a placeholder per matrix.
  num_rows, num_columns = shape[-2:]
  return size // (num_rows * num_columns) * (num_rows + num_columns + 1)


def _size(tree):
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@every_optimizer
def test_every_part_of_the_state_has_axes(row):
  state = jax.eval_shape(functools.partial(_init, row))
  names = state_lib.logical_axes(state, axes.param_axes(state.params))

  def check(leaf, leaf_axes):
    assert len(leaf_axes) == leaf.ndim
    # Numbers that all parameters share, and nothing larger, have no names.
    assert leaf.size <= 3 or any(leaf_axes)

  jax.tree.map(check, state, names)


_MESH = {'fsdp': 2, 'tensor': 2, 'expert': 2}
_STAGES = {'stage': 2, 'stage_repeats': 2, 'fsdp': 2, 'data': 2}
# Those whose state is more than moments are tried on both in the fast suite.
_FAST = {(row, False) for row in ('adamw', 'lion', 'schedule_free')} | {
  (row, staged)
  for row in ('muon', 'adafactor', 'lion bfloat16')
  for staged in (False, True)
}


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize(
  ('row', 'parallel'),
  [
    pytest.param(
      row,
      parallel,
      marks=() if (row, parallel is _STAGES) in _FAST else pytest.mark.slow,
    )
    for row in TABLE
    for parallel in (_MESH, _STAGES)
  ],
  ids=str,
)
def test_a_step_on_a_mesh_is_that_on_one_device(row, parallel):
  abstract = jax.eval_shape(functools.partial(_init, row))
  placement = placement_lib.make(
    parallel_config.ParallelConfig(**parallel),
    abstract,
    state_lib.logical_axes(abstract, axes.param_axes(abstract.params)),
  )
  assert isinstance(placement, placement_lib.MeshPlacement)
  shardings = placement.state_shardings
  state = placement.init(lambda _: _init(row), jax.random.key(0))
  assert (
    _share_of_one_device(state.opt_state)
    < (_MOST_PER_DEVICE_FACTORED if row == 'adafactor' else _MOST_PER_DEVICE)[
      bool(placement.fold.repeats - 1)
    ]
  )
  # A gradient lies, and is folded into stages, as its parameter is.
  take_step = jax.jit(
    functools.partial(_take_step, row, is_staged='stage' in parallel),
    in_shardings=(shardings, shardings.params),
    out_shardings=shardings,
    donate_argnums=0,
  )
  for index in range(2):
    grads = _random(index + 1)
    placed = placement.restored(_init(row).replace(params=grads))
    state = take_step(state, placed.params)
  whole, expected = placement.whole(state), _run(row, last=2)
  # Sums over devices are added in another order. Newton and Schulz's iterations
  # amplify that where a singular value is small; everything else is exact to
  # the last digits of float32, or bfloat16.
  rtol = 1e-2 if 'bfloat16' in row else 1e-4
  jax.tree.map(
    functools.partial(_assert_close, rtol), whole.params, expected.params
  )
  jax.tree.map(
    functools.partial(_assert_close, rtol), whole.opt_state, expected.opt_state
  )


@pytest.mark.slow
@pytest.mark.parametrize('row', ['muon', 'adafactor', 'schedule_free'])
def test_replicas_take_the_same_step(row):
  abstract = jax.eval_shape(functools.partial(_init, row))
  placement = placement_lib.make(
    parallel_config.ParallelConfig(kind='pmap'),
    abstract,
    state_lib.logical_axes(abstract, axes.param_axes(abstract.params)),
  )
  state = placement.init(lambda _: _init(row), jax.random.key(0))
  grads = jax.tree.map(lambda x: jnp.stack([x] * 8), _random(1))
  state = jax.pmap(functools.partial(_take_step, row), donate_argnums=0)(
    state, grads
  )
  expected = _run(row, last=1)
  close = functools.partial(_assert_close, 1e-5)
  jax.tree.map(close, placement.whole(state).params, expected.params)
  rule = _config(row).rule
  if not rule.keeps_average:
    return
  average, expected_average = (
    rule.average(s.opt_state, s.params) for s in (state, expected)
  )
  for device in range(8):
    of_device = jax.tree.map(lambda x, i=device: x[i], average)
    jax.tree.map(close, of_device, expected_average)


def _assert_close(rtol, found, expected):
  found, expected = np.array(found, np.float32), np.array(expected, np.float32)
  np.testing.assert_allclose(
    found, expected, rtol=rtol, atol=rtol * np.abs(expected).max()
  )


# Matrices are split in eight on the first mesh and in four (of two replicas) on
# the second, but tables of the latter and norms not; of a factored matrix rows
# are split along one axis, columns along the other.
_MOST_PER_DEVICE = 0.2, 0.4
_MOST_PER_DEVICE_FACTORED = 0.5, 0.75


def _share_of_one_device(tree):
  device = jax.devices()[0]
  on_device = sum(
    shard.data.nbytes
    for leaf in jax.tree.leaves(tree)
    for shard in leaf.addressable_shards
    if shard.device == device
  )
  return on_device / _num_bytes(tree)


@pytest.mark.fast_cases(2)
@every_optimizer
def test_a_restored_run_goes_on_bit_for_bit(row, tmp_path):
  checkpoints = checkpoint.Checkpoints(tmp_path, experiment.CheckpointConfig())
  half = _run(row, last=2)
  checkpoints.save(half, checkpoint.Progress())
  checkpoints.wait()
  restored, _ = checkpoints.restore(_abstract(half))
  checkpoints.close()
  assert jax.tree.structure(restored.opt_state) == jax.tree.structure(
    half.opt_state
  )
  resumed, whole = _run(row, first=2, state=restored), _run(row)
  jax.tree.map(
    np.testing.assert_array_equal,
    (resumed.params, resumed.opt_state),
    (whole.params, whole.opt_state),
  )


@pytest.mark.parametrize(
  ('saved', 'wanted', 'message'),
  [
    (
      'adamw bfloat16',
      'adamw',
      'optimizer state: got bfloat16, .*expected float32.*; set optimizer',
    ),
    (
      'lion',
      'adamw',
      'opt_state.*the model or optimizer of this experiment is',
    ),
    ('muon', 'adafactor', 'opt_state.*the model or optimizer of this'),
    ('adamw', 'frozen', 'opt_state.*the model or optimizer of this'),
  ],
)
def test_the_state_of_another_optimizer_is_not_taken(
  saved, wanted, message, tmp_path
):
  checkpoints = checkpoint.Checkpoints(tmp_path, experiment.CheckpointConfig())
  checkpoints.save(_run(saved, last=1), checkpoint.Progress())
  checkpoints.wait()
  with pytest.raises(ValueError, match=message):
    checkpoints.restore(_abstract(_run(wanted, last=0)))
  checkpoints.close()
