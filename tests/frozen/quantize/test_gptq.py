"""GPTQ beside an independent statement of it, and rounding to nearest."""

import jax.numpy as jnp
import numpy as np
import pytest

from frozen.quantize import gptq
from models.linear.stored import round as rounding


def _correlated(rows: int, columns: int, seed: int):
  """Returns a kernel [I, O], and the second moments of correlated inputs."""
  rng = np.random.default_rng(seed)
  mixing_II = rng.normal(size=(rows, rows)) * rng.lognormal(0, 1, rows)
  x_NI = rng.normal(size=(4 * rows, rows)) @ mixing_II
  w_IO = rng.normal(size=(rows, columns)).astype(np.float32)
  return w_IO, (x_NI.T @ x_NI / len(x_NI)).astype(np.float32)


def _optimal_brain(w_IO, second_II, scale_I, largest):
  """Rounds input by input; the others are moved by least squares.

  Optimal brain quantisation in its own words: each later weight is changed so
  that the damped error of the output is smallest, by solving for it anew.
  """
  second_II = second_II.astype(np.float64)
  damped_II = second_II + 0.01 * np.trace(second_II) / len(second_II) * np.eye(
    len(second_II)
  )
  w_IO, result = w_IO.astype(np.float64).copy(), np.zeros_like(w_IO)
  order = np.argsort(-np.diagonal(second_II), kind='stable')
  for place, i in enumerate(order):
    codes = np.clip(np.round(w_IO[i] / scale_I[i]), -largest, largest)
    result[i] = codes * scale_I[i]
    later = order[place + 1 :]
    change_O = result[i] - w_IO[i]
    if len(later):
      w_IO[later] -= np.linalg.solve(
        damped_II[np.ix_(later, later)],
        np.outer(damped_II[later, i], change_O),
      )
  return result


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize('rows', [16, 200])
def test_rounds_as_optimal_brain_quantisation_does(rows):
  # 200 inputs are more than one block, and no multiple of it.
  w_IO, second_II = _correlated(rows, 5, seed=0)
  kernel = gptq.quantise(w_IO, second_II, 'int8')
  scale_IO = np.broadcast_to(np.asarray(kernel.scales).T, w_IO.shape)
  expected = np.stack(
    [
      _optimal_brain(w_IO[:, o : o + 1], second_II, scale_IO[:, o], 127)[:, 0]
      for o in range(5)
    ],
    axis=1,
  )
  got = np.asarray(kernel.whole(jnp.float32))
  # A number halfway between two steps may go to either in float32, and those
  # after it move with it.
  is_equal = np.abs(got - expected) < 1e-3 * scale_IO
  assert is_equal.mean() > 0.9
  assert _error(got, w_IO, second_II) == pytest.approx(
    _error(expected, w_IO, second_II), rel=0.02
  )


@pytest.mark.fast_cases(5)
@pytest.mark.parametrize('scheme', sorted(rounding.SCHEMES))
@pytest.mark.parametrize('seed', [0, 1])
def test_is_better_than_rounding_to_nearest_on_correlated_inputs(scheme, seed):
  w_IO, second_II = _correlated(256, 24, seed)
  nearest = rounding.by_scheme(w_IO, scheme).whole(jnp.float32)
  kernel = gptq.quantise(w_IO, second_II, scheme)
  found = kernel.whole(jnp.float32)
  # Half of the mean square is less than any of these schemes reached.
  assert _error(found, w_IO, second_II) < 0.5 * _error(nearest, w_IO, second_II)


@pytest.mark.parametrize('scheme', sorted(rounding.SCHEMES))
def test_inputs_that_are_alike_and_independent_are_rounded_to_nearest(scheme):
  w_IO = np.random.default_rng(2).normal(size=(64, 6)).astype(np.float32)
  kernel = gptq.quantise(w_IO, np.eye(64), scheme)
  nearest = rounding.by_scheme(w_IO, scheme)
  np.testing.assert_array_equal(
    np.asarray(kernel.values).view(np.uint8),
    np.asarray(nearest.values).view(np.uint8),
  )


def test_an_input_that_is_always_zero_is_rounded_to_nearest():
  w_IO, second_II = _correlated(32, 4, seed=3)
  second_II[5], second_II[:, 5] = 0, 0
  found = gptq.quantise(w_IO, second_II, 'int8')
  nearest = rounding.by_scheme(w_IO, 'int8')
  assert np.isfinite(np.asarray(found.whole(jnp.float32))).all()
  np.testing.assert_array_equal(found.values[:, 5], nearest.values[:, 5])


def test_a_text_without_any_input_is_rounded_to_nearest():
  w_IO, _ = _correlated(32, 4, seed=4)
  found = gptq.quantise(w_IO, np.zeros((32, 32)), 'int4')
  nearest = rounding.by_scheme(w_IO, 'int4')
  np.testing.assert_array_equal(found.values, nearest.values)


def _error(got_IO, w_IO, second_II) -> float:
  delta_IO = np.asarray(got_IO, np.float64) - w_IO
  return float(np.sum(delta_IO * (second_II @ delta_IO)))
