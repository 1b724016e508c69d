"""Sampler and trainer in invariant numerics: the same bits, in float32."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import execution as execution_lib, transformer
from models.linear import invariant_gradient
from tests.helpers import frozen_dirs, tiny_models
from tests.helpers.training import rollout_run
from training.objectives import advantages, port

_IDS = {'vocab_size': 264}
_MODELS = {
  'scanned': tiny_models.llama_like(**_IDS, scan_layers=True),
  'gpt2': tiny_models.gpt2_like(**_IDS),
  'windows': tiny_models.stable(**_IDS, window=5, layer_pattern='lg'),
  'mixture': tiny_models.mixture(**_IDS),
}


def _gaps(directory, numerics, model='scanned', **changes):
  made = rollout_run.experiment(
    directory,
    {'numerics': numerics, 'temperature': 0.7, 'inner_epochs': 1},
    objective={
      'temperature': 0.7,
      'advantages': advantages.Advantages(baseline='group', group_size=2),
    },
    model=_MODELS[model],
    eval_every_steps=0,
    **changes,
  )
  rollout_run.run(made, directory / 'run')
  drawn = rollout_run.records(directory / 'run', 'rollout')
  steps = rollout_run.records(directory / 'run', 'train')
  return [each['gap_max'] for each in drawn], [each['ratio'] for each in steps]


@pytest.mark.slow
@pytest.mark.parametrize('model', _MODELS)
def test_the_gap_is_zero(tmp_path, model):
  gaps, ratios = _gaps(tmp_path, 'invariant', model, num_steps=4)
  assert gaps == [0.0] * 2
  # The first of two steps on a batch: the policy is the one that sampled.
  assert ratios[::2] == [1.0] * 2


@pytest.mark.slow
def test_with_fast_numerics_it_is_not(tmp_path):
  # If this fails, sampler and trainer agree anyway, and `invariant` may go.
  gaps, _ = _gaps(tmp_path, 'fast', num_steps=2)
  assert max(gaps) > 0


@pytest.mark.slow
@pytest.mark.parametrize('model', _MODELS)
def test_loss_and_gradient_are_those_of_plain_execution(model):
  config = dataclasses.replace(_MODELS[model], spare_ids=((260, 264),))
  tokens_BT = np.random.default_rng(0).integers(1, 256, (2, 12))
  positions_BT = np.broadcast_to(np.arange(12), (2, 12))
  segments_BT = (positions_BT < [[12], [9]]).astype(np.int32)
  params = frozen_dirs.params(config, seed=1)

  def loss(params, execution):
    module = transformer.Transformer(config, jnp.float32, execution)
    policy = port.Model(module)
    hidden = policy.hidden(params, tokens_BT, positions_BT, segments_BT)
    found_BT = policy.token_logprobs(
      params, hidden.states_BTD, np.roll(tokens_BT, -1, axis=1), 0.7
    )
    return jnp.sum(found_BT * segments_BT)

  base = execution_lib.Execution()
  of = jax.jit(jax.value_and_grad(loss), static_argnums=1)
  wanted, got = of(params, base), of(params, invariant_gradient.execution(base))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5),
    got,
    wanted,
  )


@pytest.mark.parametrize(
  ('field', 'changes', 'message'),
  [
    (
      'execution',
      {'matmul': 'int8'},
      'execution.matmul: got int8 with rollouts.numerics = invariant',
    ),
    (
      'parallel',
      {'tensor': 2},
      'parallel.tensor: got 2 with rollouts.numerics = invariant',
    ),
  ],
)
def test_a_trainer_with_other_bits_is_refused(
  tmp_path, field, changes, message
):
  if field == 'execution':
    pytest.importorskip('qwix', reason='requirements-quant.txt')
  made = rollout_run.experiment(tmp_path, {'numerics': 'invariant'})
  made = dataclasses.replace(
    made, **{field: dataclasses.replace(getattr(made, field), **changes)}
  )
  with pytest.raises(ValueError, match=message):
    rollout_run.run(made, tmp_path / 'run')
