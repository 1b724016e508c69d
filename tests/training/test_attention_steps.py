"""One training step through every attention path: one set of golden numbers.

Rows have 128 tokens: two packed documents and padding. Kernels for accelerators
run interpreted, or as their unfused equivalent. Paths over several devices run
on fake devices, with the ports that `training.learner` chooses.
"""

import dataclasses
import functools

import jax
import pytest

from models.attention import dense
from models.attention.kernels import cudnn_gpu, splash_tpu
from tests.helpers import tiny_models
from tests.helpers.training import tiny_experiment
from training import learner as learner_lib
from training.optimizer import chain

# If you meant to change the mathematics, put the new numbers here and say so
# in the commit.
GOLDEN = {'loss': 5.518987, 'grad_norm': 1.759946, 'weight': 4 * 120.0}

MODEL = tiny_models.llama_like(
  vocab_size=64,
  num_layers=1,
  model_width=32,
  head_width=8,
  max_length=128,
  scan_layers=True,
  init_std=0.3,  # so that attention is sharp, and matters to the loss
)


def _metrics(attend=None, **parallel):
  experiment = tiny_experiment.make(
    model=MODEL,
    data={'row_length': 128, 'batch_size': 4},
    optimizer=chain.OptimizerConfig(warmup_steps=1),
    parallel=parallel,
    num_steps=2,
  )
  num_devices = 4 if parallel else 1
  learner = learner_lib.make(experiment, jax.devices()[:num_devices])
  if attend is not None:
    execution = dataclasses.replace(learner.model.execution, attend=attend)
    learner = dataclasses.replace(
      learner, model=learner.model.clone(execution=execution)
    )
  batch = tiny_models.batch(
    batch_size=4, row_length=128, vocab_size=64, num_segments=2, num_padding=8
  )
  placement = learner.placement
  _, metrics = learner.compile_train_step()(
    learner.init(jax.random.key(0)), placement.put_batch(batch)
  )
  return {name: float(metrics[name]) for name in GOLDEN}


@pytest.mark.fast_cases(2)
@pytest.mark.parametrize(
  ('attend', 'parallel'),
  [
    (dense.attend, {}),
    (functools.partial(splash_tpu.attend, interpret=True), {}),
    (functools.partial(cudnn_gpu.attend, implementation='xla'), {}),
    (None, {'context': 4}),
    (None, {'context': 4, 'context_attention': 'gather'}),
    (None, {'stage': 1, 'tensor': 2}),
  ],
  ids=['reference', 'splash', 'cudnn', 'ring', 'gather', 'tensor'],
)
def test_golden_step(attend, parallel):
  # Float32 sums in another order, of which the step's numbers are means.
  assert _metrics(attend, **parallel) == pytest.approx(GOLDEN, rel=1e-5)


def test_a_wrong_path_is_noticed():
  def attend(*args, segment_ids_BT, dropout, form):
    del segment_ids_BT, dropout, form
    return dense.attend(*args)

  assert _metrics(attend) != pytest.approx(GOLDEN, rel=1e-3)
