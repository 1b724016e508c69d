"""Averages of the weights: what they are, and that runs keep and serve them."""

import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frozen import format as frozen_format, freeze, seals
from parallel import parallel_config
from storage import file_names
from tests.helpers import tiny_models
from tests.helpers.training import tiny_experiment, tiny_run
from training import experiment as experiment_lib, learner as learner_lib
from training.optimizer import average, chain, update_rules
from training.planning import memory
from training.reporting import metrics


def test_the_average_is_the_weighted_sum_of_all_that_were_passed():
  rng = np.random.default_rng(0)
  points = rng.normal(size=(9, 3)).astype(np.float32)
  expected = points[0].astype(np.float64)
  kept = {'w': jnp.asarray(points[0])}
  for t, point in enumerate(points[1:]):
    decay = min(0.6, (1 + t) / (10 + t))
    expected = decay * expected + (1 - decay) * point
    kept = average.update(
      kept, {'w': jnp.asarray(point)}, num_updates=jnp.int32(t), decay=0.6
    )
  np.testing.assert_allclose(kept['w'], expected, rtol=1e-5)


def test_a_skipped_step_is_no_part_of_it():
  kept = {'w': jnp.ones(3)}
  moved = average.update(
    kept,
    {'w': jnp.zeros(3)},
    num_updates=jnp.int32(4),
    decay=0.9,
    skipped=jnp.array(True),
  )
  np.testing.assert_array_equal(moved['w'], kept['w'])


@pytest.mark.parametrize(
  ('rule', 'decay', 'weights', 'message'),
  [
    (
      update_rules.AdamW(),
      1.0,
      'auto',
      'config.ema_decay: got 1.0, expected 0 <= ema_decay < 1',
    ),
    (update_rules.AdamW(), np.nan, 'auto', 'config.ema_decay: got nan'),
    (
      update_rules.AdamW(),
      0.999999,
      'auto',
      'config.ema_decay: got 0.999999, expected at most 0.999992: float32',
    ),
    (
      update_rules.ScheduleFree(),
      0.9,
      'auto',
      'config.ema_decay: got 0.9 with rule ScheduleFree, expected 0',
    ),
    (
      update_rules.AdamW(),
      0.9,
      'best',
      "freeze.weights: got 'best', expected one of auto, raw",
    ),
    (
      update_rules.AdamW(),
      0.0,
      'average',
      'freeze.weights: got average of a run that keeps none',
    ),
  ],
)
def test_averages_that_there_are_not_are_refused(rule, decay, weights, message):
  with pytest.raises(ValueError, match=message):
    average.validate(rule, decay, weights)


def _averaged(parallel, num_devices):
  """Three steps; returns average and params, as a checkpoint has them."""
  experiment = tiny_experiment.make(
    model=tiny_models.llama_like(
      vocab_size=64,
      num_layers=4,
      model_width=32,
      num_heads=4,
      num_kv_heads=2,
      head_width=8,
      scan_layers=True,
    ),
    data={'batch_size': 8},
    optimizer=chain.OptimizerConfig(warmup_steps=0),
    parallel=parallel,
    ema_decay=0.2,
  )
  learner = learner_lib.make(experiment, jax.devices()[:num_devices])
  placement = learner.placement
  state = learner.init(jax.random.key(0))
  train_step = learner.compile_train_step()
  for seed in range(3):
    batch = placement.put_batch(tiny_models.batch(vocab_size=64, seed=seed))
    previous = state
    state, _ = train_step(state, batch)
    assert all(x.is_deleted() for x in jax.tree.leaves(previous.average))
  read = placement.compile_weights(lambda state: state.average)(state)
  # Laid out as the params are: what evaluates those evaluates it.
  jax.tree.map(
    lambda a, p: _assert_equal(a.sharding, p.sharding), read, state.params
  )
  whole = placement.whole(state)
  return jax.device_get((whole.average, whole.params))


@functools.cache
def _on_one_device():
  return _averaged({}, 1)


def _assert_equal(a, b):
  assert a == b


@pytest.mark.slow
@pytest.mark.parametrize(
  ('parallel', 'num_devices'),
  [
    ({'data': 2, 'fsdp': 2, 'tensor': 2}, 8),
    pytest.param({'kind': 'pmap'}, 4, marks=pytest.mark.slow),
    # A pipeline that passes each stage twice stacks its layers otherwise.
    pytest.param(
      {'data': 2, 'stage': 2, 'stage_repeats': 2}, 4, marks=pytest.mark.slow
    ),
  ],
  ids=str,
)
def test_every_way_across_devices_keeps_the_same(parallel, num_devices):
  expected, params = _on_one_device()
  kept, _ = _averaged(parallel, num_devices)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), kept, expected
  )
  moved = jax.tree.map(lambda a, p: np.abs(a - p).max(), expected, params)
  assert min(jax.tree.leaves(moved)) > 0


def _experiment(corpus, **overrides):
  fields = {
    'optimizer': chain.OptimizerConfig(
      schedule='constant', end_lr=1e-4, warmup_steps=0, peak_lr=1e-2
    ),
    'ema_decay': 0.8,
    'num_steps': 4,
    'log_every_steps': 4,
    'eval_every_steps': 2,
    'checkpoint': experiment_lib.CheckpointConfig(every_steps=2),
  }
  return tiny_run.experiment(corpus, **{**fields, **overrides})


def _run(experiment, workdir):
  return tiny_run.run(experiment, workdir)[1]


def _item(workdir, step, item):
  """Returns an item of a checkpoint, on one device."""
  path = workdir / file_names.CHECKPOINTS / str(step) / item
  return freeze._restore_params(path)


def _assert_same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope='module')
def whole_run(corpus, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('whole')
  return workdir, _run(_experiment(corpus), workdir)


@pytest.mark.slow
def test_the_average_is_evaluated_saved_and_frozen(whole_run):
  workdir, printed = whole_run
  last = [r for r in metrics.read(workdir) if r['kind'] == 'eval'][-1]
  assert last['average_loss'] != last['loss']
  assert last['average_bits_per_byte'] != last['bits_per_byte']
  assert f'averaged weights {last["average_loss"]:.4f}' in printed
  kept, raw = _item(workdir, 4, 'average'), _item(workdir, 4, 'params')
  frozen = frozen_format.read(workdir / 'frozen')
  _assert_same(frozen.params, kept)
  assert frozen.manifest.weights == 'average'
  with pytest.raises(ValueError, match="weights: got 'best', expected one of"):
    freeze.freeze_checkpoint(workdir, out=workdir / 'no', weights='best')
  # Either can be had of any checkpoint.
  for weights, expected in (('raw', raw), ('average', kept)):
    out = workdir.parent / weights
    manifest = freeze.freeze_checkpoint(workdir, out=out, weights=weights)
    assert manifest.weights == weights
    _assert_same(frozen_format.read(out).params, expected)


@pytest.mark.slow
def test_a_checkpoint_is_judged_by_what_would_be_frozen(whole_run):
  workdir, _ = whole_run
  evals = [r for r in metrics.read(workdir) if r['kind'] == 'eval']
  seal = seals.read(workdir / file_names.CHECKPOINTS / '4')
  assert seal.eval_loss == evals[-1]['average_loss']


@pytest.mark.slow
def test_a_resumed_run_keeps_the_same_average(whole_run, corpus, tmp_path):
  workdir, _ = whole_run
  _run(_experiment(corpus, num_steps=2), tmp_path)
  _run(_experiment(corpus), tmp_path)
  for item in ('params', 'average'):
    _assert_same(_item(tmp_path, 4, item), _item(workdir, 4, item))
  evals = [
    [r for r in metrics.read(w) if r['kind'] == 'eval']
    for w in (workdir, tmp_path)
  ]
  assert evals[0] == evals[1]


@pytest.mark.slow
def test_an_average_may_begin_and_end_with_any_start(corpus, tmp_path):
  """It begins with the weights of the step that the run goes on from."""
  _run(_experiment(corpus, num_steps=2, ema_decay=0.0), tmp_path)
  assert not (tmp_path / file_names.CHECKPOINTS / '2' / 'average').exists()
  start = _item(tmp_path, 2, 'params')
  with pytest.raises(ValueError, match='got average, but .* has none'):
    freeze.freeze_checkpoint(tmp_path, out=tmp_path / 'no', weights='average')
  shutil.copytree(tmp_path, tmp_path / 'copy')
  _run(_experiment(corpus, num_steps=3), tmp_path)
  # t = 2 steps were taken before this one.
  share = 1 - min(0.8, 3 / 12)
  jax.tree.map(
    lambda kept, a, b: np.testing.assert_allclose(
      kept, a + share * (b - a), rtol=1e-6, atol=1e-7
    ),
    _item(tmp_path, 3, 'average'),
    start,
    _item(tmp_path, 3, 'params'),
  )
  _run(_experiment(corpus, ema_decay=0.0), tmp_path)
  assert not (tmp_path / file_names.CHECKPOINTS / '4' / 'average').exists()
  assert frozen_format.read(tmp_path / 'frozen').manifest.weights == 'raw'


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['mesh', 'pmap'])
def test_a_schedule_free_run_serves_its_average(corpus, tmp_path, kind):
  optimizer = chain.OptimizerConfig(
    rule=update_rules.ScheduleFree(),
    schedule='constant',
    warmup_steps=0,
    peak_lr=1e-2,
  )
  experiment = _experiment(
    corpus,
    optimizer=optimizer,
    ema_decay=0.0,
    num_steps=2,
    parallel=parallel_config.ParallelConfig(kind=kind),
  )
  _run(experiment, tmp_path)
  raw, kept = _item(tmp_path, 2, 'params'), _item(tmp_path, 2, 'average')
  _assert_same(frozen_format.read(tmp_path / 'frozen').params, kept)
  # y = beta1 x + (1 - beta1) z: of the three the state has y and z.
  opt_state = _item(tmp_path, 2, 'opt_state')
  (z,) = _subtrees(opt_state, 'z')
  jax.tree.map(
    lambda y, x, z: np.testing.assert_allclose(
      y, 0.9 * x + 0.1 * z, rtol=1e-4, atol=1e-6
    ),
    raw,
    kept,
    z,
  )
  last = [r for r in metrics.read(tmp_path) if r['kind'] == 'eval'][-1]
  assert last['average_loss'] != last['loss']


def _subtrees(tree, name):
  """Returns what is called `name` anywhere in nested containers."""
  if isinstance(tree, dict):
    items = tree.items()
  elif isinstance(tree, list | tuple):
    items = enumerate(tree)
  else:
    return []
  return [
    found
    for key, value in items
    for found in ([value] if key == name else _subtrees(value, name))
  ]


def test_the_plan_counts_it(corpus):
  experiment = _experiment(corpus)
  with_it, without = (
    memory.estimate(learner_lib.make(e, jax.devices()[:1]))
    for e in (experiment, dataclasses.replace(experiment, ema_decay=0.0))
  )
  assert with_it.average == with_it.params > 0
  assert with_it.total - without.total == with_it.params
