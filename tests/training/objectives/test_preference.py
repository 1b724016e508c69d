"""Preference: its options, its data, its figures, and the edges of its rows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import transformer
from tests.helpers import tiny_models
from tests.helpers.training import preference_rows, tiny_experiment
from training.objectives import (
  port,
  preference,
  preference_losses,
  segments,
)

LOSSES = list(preference_losses.LOSSES)
MODEL = tiny_models.llama_like()


@pytest.mark.parametrize('loss', LOSSES)
def test_an_option_that_the_loss_does_not_have_is_refused(loss):
  own = preference_losses.LOSSES[loss].options
  values = {
    'label_smoothing': 0.1,
    'length_normalised': True,
    'gamma': 0.5,
    'imitation_weight': 0.5,
    'desirable_weight': 2.0,
    'undesirable_weight': 2.0,
    'reference': 'runs/base/frozen',
  }
  assert own <= values.keys()
  for name, value in values.items():
    objective = preference.Preference(loss=loss, **{name: value})
    if name in own:
      objective.validate()
      continue
    with pytest.raises(
      ValueError,
      match=rf'objective.{name}: got .* with objective.loss = {loss}, expected'
      ' .*: this loss has no such option',
    ):
      objective.validate()


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'loss': 'ppo'}, "objective.loss: got 'ppo', expected one of dpo, robust"),
    ({'beta': 0.0}, 'objective.beta: got 0.0, expected a number above 0'),
    ({'beta': float('nan')}, 'objective.beta: got nan, expected'),
    (
      {'label_smoothing': 0.5},
      'objective.label_smoothing: got 0.5, expected a number from 0 to below',
    ),
    (
      {'loss': 'simpo', 'gamma': -2.0},
      'objective.gamma: got -2.0, expected a number of at least 0, or -1',
    ),
    (
      {'loss': 'kto', 'desirable_weight': 0.0},
      'objective.desirable_weight: got 0.0, expected a number above 0',
    ),
  ],
)
def test_values_that_no_run_can_use_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    preference.Preference(**options).validate()


def test_each_loss_has_the_values_of_its_paper():
  def values(loss):
    objective = preference.Preference(loss=loss)
    return objective._beta, objective._imitation_weight

  assert values('dpo') == (0.1, 0.0)
  assert values('simpo') == (2.0, 0.0)
  assert values('orpo') == values('cpo') == (0.1, 1.0)


@pytest.mark.parametrize('loss', LOSSES)
def test_a_loss_says_which_data_and_which_models_it_needs(loss):
  objective = preference.Preference(loss=loss)
  has_reference = loss not in ('orpo', 'simpo', 'cpo')
  assert objective.examples == (('labelled',) if loss == 'kto' else ('pairs',))
  assert ('ref_logprobs' in objective.batch_spec()) == has_reference
  assert ('labels' in objective.batch_spec()) == (loss == 'kto')
  assert not objective.models_needed
  if not has_reference:
    objective.check_start('')
    return
  with pytest.raises(
    ValueError, match='no frozen model for ref_logprobs, .* set config.init_f'
  ):
    objective.check_start('')
  objective.check_start('runs/base/frozen')
  dataclasses.replace(objective, reference='runs/other').check_start('')


def test_a_run_without_the_examples_of_its_objective_is_refused():
  experiment = tiny_experiment.make(
    objective=preference.Preference(loss='simpo')
  )
  with pytest.raises(
    ValueError,
    match='data.examples: got text, expected pairs for the objective Pref',
  ):
    experiment.validate()


def test_the_sums_of_segments_are_those_of_each_document():
  segment_ids_BT = np.array(
    [[1, 1, 2, 2, 2, 3, 4, 0], [0, 0, 0, 1, 2, 2, 2, 2], [0] * 8]
  )
  values_BT = np.arange(24.0, dtype=np.float32).reshape(3, 8)
  found_BU2 = segments.sums(jnp.asarray(values_BT), jnp.asarray(segment_ids_BT))
  assert found_BU2.shape == (3, 4, 2)
  expected_BU2 = np.zeros((3, 4, 2))
  expected_BU2[0, :2] = [[0 + 1, 2 + 3 + 4], [5, 6]]
  expected_BU2[1, 0] = [11, 12 + 13 + 14 + 15]
  np.testing.assert_array_equal(found_BU2, expected_BU2)
  # Time may be laid out in any order over devices.
  order = np.random.default_rng(0).permutation(8)
  again = segments.sums(
    values_BT[:, order], jnp.asarray(segment_ids_BT[:, order])
  )
  np.testing.assert_array_equal(again, expected_BU2)


def test_sums_of_long_rows_hold_no_array_of_tokens_by_segments():
  """A row of 3000 tokens has room for 1500 units, which are summed in parts."""
  rng = np.random.default_rng(0)
  ids_BT = np.sort(rng.integers(0, 3001, (4, 3000)), axis=1).astype(np.int32)
  values_BT = rng.normal(size=ids_BT.shape).astype(np.float32)

  def loss(values_BT, ids_BT):
    sums_BU2 = segments.sums(values_BT, ids_BT)
    return jnp.sum(sums_BU2**2), sums_BU2

  gradient = jax.jit(jax.grad(loss, has_aux=True))
  compiled = gradient.lower(values_BT, ids_BT).compile()
  memory = compiled.memory_analysis().temp_size_in_bytes
  assert memory < 4 * 3000 * 3000  # a byte for each
  grads_BT, sums_BU2 = compiled(values_BT, ids_BT)
  expected_BS = np.zeros((4, 3001))
  for b in range(4):
    np.add.at(expected_BS[b], ids_BT[b], values_BT[b])
  expected_BS[:, 0] = 0
  np.testing.assert_allclose(
    sums_BU2.reshape(4, 3000), expected_BS[:, 1:], atol=1e-5
  )
  np.testing.assert_allclose(
    grads_BT, 2 * np.take_along_axis(expected_BS, ids_BT, 1), atol=1e-5
  )


def _loss(objective, batch):
  module = transformer.Transformer(MODEL)
  model = port.Model(module)
  params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
  batch = {k: jnp.asarray(batch[k]) for k in objective.batch_spec()}
  totals = objective.totals(params, batch, model)

  def loss(params):
    given = {} if totals is None else {'totals': totals}
    return objective(params, batch, model, **given)

  return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)


@pytest.mark.slow
@pytest.mark.parametrize('loss', LOSSES)
def test_rows_of_padding_and_empty_answers_have_no_part_in_it(loss):
  units = preference_rows.draw(4, vocab_size=61, labelled=True, seed=1)
  rows = [units[:2], units[2:]]
  batch = preference_rows.batch(rows, row_length=64)
  (expected, sums), gradient = _loss(preference.Preference(loss=loss), batch)
  # A unit whose first answer is cut off, and a row of padding.
  more = preference_rows.batch([*rows, units[:1]], row_length=64, num_rows=4)
  more['weights'][2][more['segment_ids'][2] == 1] = 0.0
  if loss == 'kto':  # its mismatched answer counts for the divergence
    more['weights'][2] = 0.0
  # An id that no token has is a target of probability 0.
  more['ref_logprobs'][more['weights'] == 0] = -np.inf
  (got, more_sums), more_gradient = _loss(
    preference.Preference(loss=loss), more
  )
  assert got == pytest.approx(float(expected), rel=1e-6)
  assert more_sums['weight'] == sums['weight'] == 4
  assert more_sums['tokens'] == sums['tokens']
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
    more_gradient,
    gradient,
  )


@pytest.mark.slow
@pytest.mark.parametrize('loss', LOSSES)
def test_a_batch_of_padding_has_a_loss_and_a_gradient_of_zero(loss):
  batch = preference_rows.batch([], row_length=16, num_rows=2)
  (value, _), gradient = _loss(preference.Preference(loss=loss), batch)
  assert value == 0
  assert not any(np.any(x) for x in jax.tree.leaves(gradient))


@pytest.mark.parametrize('score', [-1e-9, -1e-4, -0.5, -0.7, -5.0, -80.0])
def test_odds_are_exact_for_every_probability(score):
  """Against float64: ORPO's odds of answers that are nearly certain."""
  got, slope = jax.value_and_grad(preference_losses._log1mexp)(
    jnp.float32(score)
  )
  rounded = min(np.float64(np.float32(score)), -1e-7)
  assert got == pytest.approx(np.log(-np.expm1(rounded)), rel=1e-5, abs=1e-30)
  if score < -1e-7:
    assert slope == pytest.approx(1 - 1 / -np.expm1(rounded), rel=1e-4)
  assert np.isfinite(slope)
