"""Every tensor of a function is looked at, and in the right order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from training.diagnosis import tensor_checks


def _layers(w_ND, x_BD):
  """Three layers in a loop, each with a call inside, and a loss."""

  @jax.checkpoint
  def layer(x_BD, w_D):
    with jax.named_scope('product'):
      y_BD = x_BD * w_D[None, :]
    return jax.nn.silu(y_BD), jnp.max(y_BD)

  with jax.named_scope('layers'):
    x_BD, tops_N = jax.lax.scan(layer, x_BD, w_ND)
  with jax.named_scope('loss'):
    return jnp.sum(jnp.log(x_BD * x_BD + 1.0)), tops_N


@pytest.fixture(scope='module')
def watched():
  """The value and gradient of `_layers`, watched, and what it gives."""
  fn = jax.value_and_grad(_layers, has_aux=True)
  watch = tensor_checks.Watch(fn, ['weights', 'inputs'])
  return fn, watch, jax.jit(watch)


def _inputs():
  rng = np.random.default_rng(0)
  return (
    rng.normal(size=(3, 4)).astype(np.float32),
    rng.normal(size=(2, 4)).astype(np.float32),
  )


def _first(watch, record):
  return next(
    (t for t in watch.tensors(jax.device_get(record)) if not t.is_finite), None
  )


def test_what_is_watched_is_what_would_be_computed(watched):
  fn, watch, run = watched
  out, record = run(*_inputs())
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
    out,
    jax.jit(fn)(*_inputs()),
  )
  tensors = list(watch.tensors(jax.device_get(record)))
  assert _first(watch, record) is None
  forward = [
    t for t in tensors if t.operation == 'mul' and 'product' in t.scope
  ]
  # Its magnitudes are those of NumPy's.
  w_ND, x_BD = _inputs()
  first = forward[0]
  assert first.loops[0][1] == 0
  np.testing.assert_allclose(
    first.outputs[0].largest, np.abs(x_BD * w_ND[0]).max(), rtol=1e-6
  )
  assert {t.loops[0][1] for t in forward} == {0, 1, 2}


def test_the_first_is_found_inside_a_loop_with_its_iteration(watched):
  _, watch, run = watched
  w_ND, x_BD = _inputs()
  w_ND[1] = 3e38
  w_ND[0, 2] = 1e6
  x_BD[1, 2] = 1e3
  first = _first(watch, run(w_ND, x_BD)[1])
  assert (first.operation, first.loops[0][1]) == ('mul', 1)
  assert first.scope.endswith('product')
  assert [s.name for s in first.inputs if s.name] == ['weights']
  assert all(s.is_finite for s in first.inputs)
  assert first.outputs[0].shape == (2, 4)


def test_a_close_up_is_of_one_operation(watched):
  _, watch, run = watched
  w_ND, x_BD = _inputs()
  x_BD[1, 2] = np.nan
  first = _first(watch, run(w_ND, x_BD)[1])
  masks = jax.jit(
    watch.close_up(first.key, lambda values: ~jnp.isfinite(values[0]))
  )(w_ND, x_BD)
  (index,) = (i for _, i in first.loops)
  np.testing.assert_array_equal(masks[index], np.isnan(x_BD))


def test_a_backward_pass_that_overflows_is_told_from_the_forward_one():
  def fn(x):
    with jax.named_scope('steep'):
      y = jnp.sqrt(x)
    with jax.named_scope('flat'):
      return jnp.sum(y * 2.0)

  watch = tensor_checks.Watch(jax.grad(fn))
  _, record = jax.jit(watch)(jnp.array([0.0, 1.0]))
  first = _first(watch, record)
  assert 'steep' in first.scope
  assert not first.outputs[0].is_finite
