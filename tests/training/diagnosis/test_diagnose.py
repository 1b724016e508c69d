"""A non-finite step is repeated, and the first broken tensor is named."""

import dataclasses
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.helpers import tiny_models
from tests.helpers.training import tiny_experiment
from training import experiment as experiment_lib, learner as learner_lib
from training.diagnosis import diagnose
from training.lifecycle import exit_codes
from training.optimizer import chain
from training.reporting import reporter

SIZES = {
  'vocab_size': 64,
  'model_width': 32,
  'num_heads': 4,
  'num_kv_heads': 2,
  'head_width': 8,
}
MODEL = tiny_models.llama_like(**SIZES, num_layers=3, scan_layers=True)


def _experiment(**overrides):
  optimizer = chain.OptimizerConfig(
    schedule='constant', end_lr=1e-4, warmup_steps=0
  )
  return tiny_experiment.make(
    data={'batch_size': 8},
    **{'model': MODEL, 'optimizer': optimizer, **overrides},
  )


def _explained(
  experiment, *, failed=1, spoil=lambda state: state, devices=1, batches=None
):
  """Returns the message of a run whose state is spoilt before step 1."""
  learner = learner_lib.make(experiment, jax.devices()[:devices])
  if batches is None:
    batches = [
      tiny_models.batch(seed=i, vocab_size=64, num_segments=2)
      for i in range(failed)
    ]
  error = diagnose.explained(
    reporter.NonFiniteError(f'step {failed}: got loss = nan', failed),
    diagnose.Replay(
      learner=learner,
      train_step=learner.compile_train_step(),
      batches=iter(batches),
      restart=lambda: (spoil(learner.init(jax.random.key(0))), 0),
    ),
  )
  assert isinstance(error, reporter.NonFiniteError)
  assert error.step == failed
  return str(error)


def _spoiling(*path, value, at=...):
  """Returns what sets a part of a parameter."""

  def spoil(state):
    params = jax.tree_util.tree_map_with_path(
      lambda keys, x: (
        # Kept where it lies.
        jax.jit(lambda x: x.at[at].set(value), out_shardings=x.sharding)(x)
        if tuple(key.key for key in keys) == ('params', *path)
        else x
      ),
      state.params,
    )
    return state.replace(params=params)

  return spoil


@pytest.mark.slow
def test_an_overflow_of_a_stacked_layer_is_named():
  message = _explained(
    _experiment(),
    spoil=_spoiling('layers', 'mlp', 'up', 'kernel', value=2e38, at=1),
  )
  assert message.startswith('step 1: got loss = nan\n')
  assert (
    'first not finite: layer 1, mlp/up, forward: dot_general gives'
    ' float32[8, 16, 40]'
  ) in message
  assert 'in all rows of the batch' in message
  assert 'params/layers/mlp/up/kernel float32[32, 40] up to 2e+38' in message
  assert 'before the step' not in message
  assert 'grad_norm = nan' in message


@pytest.mark.slow
@pytest.mark.parametrize(
  ('overrides', 'path', 'expected'),
  [
    (
      {
        'model': dataclasses.replace(MODEL, scan_layers=False),
        'compute_dtype': 'bfloat16',
      },
      ('layer_2', 'attention', 'value', 'kernel'),
      # Which product is taken depends on the platform: a choice, to jax.
      'layer 2, attention/value, forward: cond gives bfloat16[8, 16, 16]',
    ),
    (
      {
        'model': tiny_models.mixture(**SIZES, scan_layers=True),
        'execution': experiment_lib.ExecutionConfig(remat='full'),
      },
      ('layers', 'moe', 'router', 'kernel'),
      'layer 0, moe/router, forward: dot_general gives float32[8, 16, 8]',
    ),
  ],
  ids=['apart-bfloat16', 'mixture-remat'],
)
def test_whatever_the_model_is(overrides, path, expected):
  message = _explained(
    _experiment(**overrides), spoil=_spoiling(*path, value=2e38)
  )
  assert f'first not finite: {expected}' in message


# Of the embedding of one token that only two rows have: an overflow of theirs.
_TOKEN, _ROWS = 63, (3, 6)


def _batch_with_a_token():
  batch = tiny_models.batch(vocab_size=63)
  for row in _ROWS:
    batch['tokens'][row, 5] = _TOKEN
  return batch


@pytest.mark.slow
@pytest.mark.parametrize(
  ('devices', 'parallel', 'microbatches'),
  [
    (8, {'data': 2, 'fsdp': 2, 'tensor': 2}, 2),
    (4, {'kind': 'pmap'}, 1),
    (4, {'stage': 2, 'stage_repeats': 2, 'data': 2}, 1),
  ],
  ids=['mesh', 'pmap', 'pipeline'],
)
def test_rows_are_named_however_the_batch_is_split(
  devices, parallel, microbatches
):
  experiment = _experiment(
    model=dataclasses.replace(MODEL, num_layers=4),
    parallel=parallel,
    num_microbatches=microbatches,
  )
  message = _explained(
    experiment,
    devices=devices,
    spoil=_spoiling_token(parallel.get('kind') == 'pmap'),
    batches=[_batch_with_a_token()],
  )
  # Its square is more than float32 holds.
  assert (
    'first not finite: layer 0, attention_norm, forward: square gives'
  ) in message
  # Of two micro-batches the first that fails has one of the rows.
  named = 'row 6' if microbatches == 2 else 'rows 3, 6'
  assert f', in {named} of the batch' in message


def _spoiling_token(is_pmap):
  at = (slice(None), _TOKEN) if is_pmap else _TOKEN
  return _spoiling('embed', 'embedding', value=1e30, at=at)


@pytest.mark.slow
def test_a_rate_that_overflows_is_the_optimizers():
  # Twice the largest float32: the first step's update is infinite.
  optimizer = chain.OptimizerConfig(
    peak_lr=1e38, end_lr=0.0, schedule='constant', warmup_steps=0,
    weight_decay=100.0,
  )  # fmt: skip
  message = _explained(_experiment(optimizer=optimizer))
  assert "first not finite: the optimizer's update: " in message
  assert 'the step leaves, not finite: params/' in message
  assert 'param_norm = inf' in message


@pytest.mark.slow
def test_what_was_not_finite_before_is_told():
  message = _explained(
    _experiment(),
    spoil=_spoiling('layers', 'mlp', 'up', 'kernel', value=np.nan, at=2),
  )
  assert (
    'before the step the state is not finite already:'
    ' params/layers/mlp/up/kernel (layer 2)'
  ) in message


@pytest.mark.slow
def test_a_step_that_is_finite_when_taken_again_speaks_for_itself():
  message = _explained(_experiment(), failed=2)
  assert 'first not finite' not in message
  assert 'suspect the hardware' in message


def test_a_diagnosis_that_fails_does_not_hide_the_error():
  message = _explained(_experiment(), failed=2, batches=[])
  assert message.startswith('step 2: got loss = nan\n')
  assert 'the cause is not known: StopIteration' in message


@pytest.mark.slow
def test_a_run_that_overflows_says_where_and_exits_with_its_code(tmp_path):
  """Through train.py: a learning rate that no weight survives."""
  corpus = tmp_path / 'corpus'
  for split in ('train', 'validation'):
    (corpus / split).mkdir(parents=True)
    (corpus / split / '0.txt').write_text('the quick brown fox ' * 40)
  command = [
    sys.executable, 'train.py',
    '--config=experiments/pretrain_files.py:text',
    f'--config.data.path={corpus}/{{split}}/*.txt',
    f'--workdir={tmp_path / "run"}',
    '--config.num_steps=6', '--config.checkpoint.every_steps=1',
    '--config.eval_every_steps=0', '--config.log_every_steps=1',
    '--config.data.row_length=32', '--config.model.max_length=32',
    '--config.model.num_layers=2', '--config.data.batch_size=4',
    '--config.data.tokenizer.kind=byte', '--config.optimizer.warmup_steps=2',
    # After step 1 the weights are what they were; after step 2 they are 1e15.
    '--config.optimizer.peak_lr=2e15', '--config.optimizer.decay_steps=1',
  ]  # fmt: skip
  done = subprocess.run(
    command,
    cwd=pathlib.Path(__file__).parents[3],
    env=tiny_models.subprocess_env(),
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == exit_codes.NON_FINITE, done.stderr
  assert re.search(r'error: step 3: got \w+ = (nan|inf)', done.stderr)
  assert 'last good checkpoint: step 2' in done.stderr
  assert re.search(
    r'first not finite: layer 0, [\w/]+, forward: ', done.stderr
  ), done.stderr
