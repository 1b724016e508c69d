"""What joins a model to its devices: the ports it is given, and refusals."""

import jax
import pytest

from models import execution
from models.attention import dense
from models.layers import cross_entropy
from tests.helpers import tiny_models
from tests.helpers.training import tiny_experiment
from training import learner as learner_lib


def _make(*, num_devices=8, row_length=16, parallel=None, **model):
  experiment = tiny_experiment.make(
    model=tiny_models.llama_like(vocab_size=64, scan_layers=True, **model),
    data={'row_length': row_length},
    parallel=parallel,
    num_steps=4,
  )
  return learner_lib.make(experiment, jax.devices()[:num_devices])


def test_one_device_computes_in_place():
  ports = _make(num_devices=1).model.execution
  assert ports == execution.Execution()


def test_a_mesh_sums_the_loss_by_hand_and_pmap_does_not():
  assert _make().model.execution.weighted_nll is not cross_entropy.chunked_nll
  pmap = _make(parallel={'kind': 'pmap'}).model.execution
  assert pmap.weighted_nll is cross_entropy.chunked_nll


@pytest.mark.parametrize(
  ('kind', 'collective'),
  [('ring', 'collective_permute'), ('gather', 'all_gather')],
)
def test_split_rows_are_attended_to_as_asked(kind, collective):
  parallel = {'context': 2, 'context_attention': kind}
  learner = _make(parallel=parallel)
  lowered = learner.placement.lower_train(
    learner.build_train_step, learner.batch_shapes()
  )
  assert collective in lowered.as_text()
  whole = _make(parallel={'data': 8})
  assert whole.model.execution.attend is dense.attend


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (
      {'parallel': {'context': 2}, 'dropout_rate': 0.1},
      'parallel.context_attention = ring: got dropout of attention weights',
    ),
    (
      {'parallel': {'context': 2, 'tensor': 4}, 'num_heads': 6},
      'got model.num_heads = 6 with num_kv_heads = 2 and parallel.tensor = 4,'
      ' expected a multiple of both, hence of 4',
    ),
    (
      {'parallel': {'context': 4}, 'row_length': 12},
      'got data.row_length = 12, expected a multiple of 2 x parallel.context',
    ),
    (
      {'parallel': {'stage': 2}, 'row_length': 15},
      'data.row_length: got 15, expected a multiple of parallel.stage = 2',
    ),
  ],
)
def test_what_cannot_be_split_is_refused_before_compiling(options, message):
  with pytest.raises(ValueError, match=message):
    _make(**options)
