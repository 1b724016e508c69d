"""Experts in fewer bits, each calibrated on its own tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frozen.quantize import activations, experts
from models.moe import dispatch

_WIDTH, _HIDDEN = 32, 24
# Of three experts the first has most tokens, the second too few for 32 inputs
# and enough for 24, and the third has none.
_TOKENS = {0: 120, 1: 7, 2: 0}
_UP, _GATE, _DOWN = (f'moe/expert_{x}/kernel' for x in ('up', 'gate', 'down'))


@pytest.fixture(scope='module')
def layer():
  rng = np.random.default_rng(0)
  shapes = {_UP: (_WIDTH, _HIDDEN), _GATE: (_WIDTH, _HIDDEN)}
  shapes[_DOWN] = (_HIDDEN, _WIDTH)
  return {
    path: jnp.asarray(rng.normal(size=(3, *shape)) / 5, jnp.float32)
    for path, shape in shapes.items()
  }


@pytest.fixture(scope='module')
def routed():
  rng = np.random.default_rng(1)
  ids_N1 = np.repeat(list(_TOKENS), list(_TOKENS.values()))[:, None]
  # Channels differ in size, and share directions: GPTQ and AWQ can gain.
  mixed = rng.normal(size=(_WIDTH, _WIDTH)) * np.geomspace(3, 0.1, _WIDTH)
  x_ND = rng.normal(size=(len(ids_N1), _WIDTH)) @ mixed.T
  order = rng.permutation(len(ids_N1))
  return activations.Routed(x_ND[order].astype(np.float32), ids_N1[order])


def _outputs(layer, routed, expert):
  """Returns the output of an expert for its own tokens."""
  x_ND = jnp.asarray(routed.x_ND[routed.ids_NA[:, 0] == expert])
  kernels = {
    name: layer[f'moe/expert_{name}/kernel'] for name in ('up', 'gate', 'down')
  }
  ids_1NA = jnp.full((1, len(x_ND), 1), expert, jnp.int32)
  gates_1NA = jnp.ones(ids_1NA.shape)
  return np.asarray(
    dispatch.apply_experts(x_ND[None], ids_1NA, gates_1NA, kernels, 'float32')
  )


def test_errors_are_those_of_the_outputs_on_the_tokens_of_each(layer, routed):
  made = experts.quantise(layer, routed, None, scheme='int4', method='rtn')
  for path in (_UP, _GATE):
    kernel, errors = made.kernels[path], made.errors[path]
    whole = np.asarray(kernel.whole(jnp.float32), np.float64)
    exact, squares = np.asarray(layer[path], np.float64), []
    for e in _TOKENS:
      x_NI = routed.x_ND[routed.ids_NA[:, 0] == e].astype(np.float64)
      delta = x_NI @ (whole[e] - exact[e])
      squares.append(((delta**2).sum(), ((x_NI @ exact[e]) ** 2).sum()))
    error, size = np.sum(squares, axis=0)
    assert errors['output_error'] == pytest.approx(
      np.sqrt(error / size), rel=1e-3
    )
    largest = max(np.sqrt(a / b) for a, b in squares if b)
    assert errors['largest_output_error'] == pytest.approx(largest, rel=1e-3)
    assert errors['weight_error'] == pytest.approx(
      np.linalg.norm(whole - exact) / np.linalg.norm(exact), rel=1e-3
    )
    assert (errors['experts'], errors['fewest_tokens']) == (3, 0)
    assert errors['rounded_experts'] == 0  # as the method says for all


@pytest.mark.parametrize('method', ['gptq', 'awq'])
def test_experts_with_too_few_tokens_are_rounded_and_counted(
  layer, routed, method
):
  made = experts.quantise(layer, routed, None, scheme='int4', method=method)
  nearest = experts.quantise(layer, routed, None, scheme='int4', method='rtn')
  calibrated = {  # experts that the method changes, by path
    'gptq': {_UP: [0], _GATE: [0], _DOWN: [0, 1]},
    'awq': {_UP: [0, 1], _GATE: [], _DOWN: [0, 1]},  # `up` divides its outputs
  }[method]
  for path, changed in calibrated.items():
    few = {'gptq': 3 - len(changed), 'awq': int(path == _DOWN)}[method]
    assert made.errors[path]['rounded_experts'] == few
    for e in _TOKENS:
      same = all(
        np.array_equal(a, b)
        for a, b in zip(
          jax.tree.leaves(made.kernels[path].matrix(e)),
          jax.tree.leaves(nearest.kernels[path].matrix(e)),
          strict=True,
        )
      )
      assert same == (e not in changed), (path, e)


@pytest.mark.parametrize('method', ['gptq', 'awq', 'smoothquant'])
def test_an_expert_computes_nearly_as_in_floats(layer, routed, method):
  made = experts.quantise(layer, routed, None, scheme='int8', method=method)
  for e in (0, 1):
    expected = _outputs(layer, routed, e)
    got = _outputs(made.kernels, routed, e)
    error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
    assert error < 0.015, (e, error)


def test_gptq_is_nearer_than_rounding_on_the_tokens_of_an_expert(layer, routed):
  errors = {
    method: experts.quantise(
      layer, routed, None, scheme='int4', method=method
    ).errors
    for method in ('rtn', 'gptq')
  }
  for path in (_UP, _GATE, _DOWN):
    found = [errors[x][path]['output_error'] for x in ('rtn', 'gptq')]
    assert found[1] < 0.9 * found[0]


def test_the_scale_of_the_common_input_changes_no_function(layer, routed):
  scale_I = jnp.asarray(np.geomspace(0.5, 2, _WIDTH), jnp.float32)
  made = experts.quantise(layer, routed, scale_I, scheme='int8', method='rtn')
  scaled = activations.Routed(routed.x_ND / np.asarray(scale_I), routed.ids_NA)
  expected = _outputs(layer, routed, 0)
  got = _outputs(made.kernels, scaled, 0)
  error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
  assert error < 0.015


def test_a_kernel_that_no_scheme_stores_is_named(layer, routed):
  odd = dict(layer)
  odd[_UP], odd[_GATE] = layer[_UP][..., :23], layer[_GATE][..., :23]
  odd[_DOWN] = layer[_DOWN][:, :23]
  with pytest.raises(ValueError, match=f'{_DOWN}: kernel: got 23 inputs'):
    experts.quantise(odd, routed, None, scheme='int4', method='rtn')
  experts.quantise(odd, routed, None, scheme='int8', method='rtn')
