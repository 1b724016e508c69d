"""An isolated computation is compiled by itself, with the same result."""

import importlib.metadata
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.linear import isolated

_X = np.random.default_rng(0).normal(size=(32, 24)).astype(np.float32)


def _normalised(x):
  return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True))


def _between_barriers(function, x):
  x = jax.lax.optimization_barrier(x)
  return jax.lax.optimization_barrier(function(x))


def _fused(call) -> list[set[str]]:
  """Returns the operations of each computation of sin, `call`, cos."""

  def around(x):
    return jnp.cos(call(_normalised, jnp.sin(x)))

  with jax.default_device(jax.devices('cpu')[0]):
    text = jax.jit(around).lower(_X).compile().as_text()
  operation = re.compile(r'= \S+ ([\w-]+)\(')
  return [set(operation.findall(part)) for part in text.split('\n}\n')]


def test_nothing_is_fused_across_its_border():
  inside, outside = {'rsqrt', 'reduce'}, {'sine', 'cosine'}
  found = _fused(isolated.call)
  assert any(inside & each for each in found)
  assert any(outside & each for each in found)
  assert not any(inside & each and outside & each for each in found)
  if importlib.metadata.version('jaxlib').startswith('0.10.'):
    # Barriers alone do not prevent it.
    barriers = _fused(_between_barriers)
    assert any(inside & each and outside & each for each in barriers)


@pytest.mark.parametrize('platform', ['cuda', 'tpu'])
def test_other_platforms_have_barriers_in_place_of_the_branch(platform):
  def around(x):
    return isolated.call(_normalised, jnp.sin(x))

  traced = jax.jit(around).trace(_X)
  ours, cpu = (
    traced.lower(lowering_platforms=(each,)).as_text()
    for each in (platform, 'cpu')
  )
  # The barrier on CPU hides the condition. Each text has branches by platform.
  assert ours.count('stablehlo.optimization_barrier') == 2
  assert cpu.count('stablehlo.optimization_barrier') == 1
  assert cpu.count('stablehlo.case') == ours.count('stablehlo.case') + 1


def test_trees_and_closures_and_loops():
  scale = jnp.float32(3)

  def function(pair):
    return {'y': scale * pair['x'] + pair['b'], 'n': jnp.sum(pair['n'])}

  def body(n, x):
    out = isolated.call(function, {'x': x, 'b': x, 'n': jnp.arange(4)})
    return n + out['n'], out['y']

  n, y = jax.jit(lambda x: jax.lax.scan(body, jnp.int32(0), x))(_X)
  np.testing.assert_array_equal(y, 4 * _X)
  assert n == 6 * len(_X)


def test_its_gradient_is_that_of_the_function():
  def loss(x, call):
    return jnp.sum(jnp.sin(call(_normalised, x)))

  own = jax.grad(loss)(_X, isolated.call)
  plain = jax.grad(loss)(_X, lambda function, x: function(x))
  np.testing.assert_allclose(own, plain, rtol=1e-5, atol=1e-6)
