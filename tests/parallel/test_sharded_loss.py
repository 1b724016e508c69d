"""The loss over a mesh is the loss, and sums the head's gradient once."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.layers import cross_entropy
from parallel import mesh as mesh_lib, parallel_config, rules, sharded_loss

MESHES = (
  {'data': 8},
  {'fsdp': 4, 'tensor': 2},
  {'context': 4, 'data': 2},
  {'stage': 2, 'fsdp': 2, 'tensor': 2},
)
BATCH, TIME, WIDTH, VOCAB = 8, 16, 12, 64
CHUNKS = 4
# A form with every term that a loss may have.
TERMS = {'softcap': 3.0, 'z_weight': 0.1, 'spare_ids': ((60, VOCAB),)}
FORM = cross_entropy.LossForm(dtype=jnp.dtype(jnp.float32), **TERMS)


def _mesh(**sizes):
  return mesh_lib.make_mesh(
    parallel_config.ParallelConfig(**({'data': 1} | sizes))
  )


def _inputs():
  keys = jax.random.split(jax.random.key(0), 4)
  return (
    jax.random.normal(keys[0], (BATCH, TIME, WIDTH)),
    jax.random.normal(keys[1], (VOCAB, WIDTH)),
    jax.random.randint(keys[2], (BATCH, TIME), 0, 60),
    jax.random.uniform(keys[3], (BATCH, TIME)),
  )


def _several_chunks(monkeypatch, mesh):
  """Makes each device cut its tokens into CHUNKS."""
  chunk_logits = BATCH * TIME * VOCAB // mesh.size // CHUNKS
  monkeypatch.setattr(cross_entropy, 'MAX_CHUNK_LOGITS', chunk_logits)


def _compiled(mesh, nll):
  """Returns a jitted gradient of 3 * loss and its placed arguments."""
  shardings = [
    jax.NamedSharding(mesh, spec)
    for spec in (
      jax.P(rules.BATCH_AXES, ('context', 'stage')),
      jax.P('tensor', ('fsdp', 'expert')),
      jax.P(rules.BATCH_AXES, 'context'),
      jax.P(rules.BATCH_AXES, 'context'),
    )
  ]

  def loss(hidden_BTD, head_VD, targets_BT, weights_BT):
    # A factor checks that the cotangent is used.
    sums = nll(hidden_BTD, head_VD, targets_BT, weights_BT, FORM)
    return 3.0 * sums.loss, sums

  gradient = jax.jit(
    jax.value_and_grad(loss, (0, 1), has_aux=True),
    out_shardings=(None, tuple(shardings[:2])),
  )
  return gradient, jax.tree.map(jax.device_put, list(_inputs()), shardings)


@functools.cache
def _expected():
  """Returns sums of one device in one chunk, and gradients of 3 * loss."""

  def loss(hidden_BTD, head_VD, targets_BT, weights_BT):
    sums = cross_entropy.weighted_nll(
      hidden_BTD, head_VD, targets_BT, weights_BT, 1, FORM
    )
    return 3.0 * sums.loss, sums

  (_, sums), grads = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(
    *_inputs()
  )
  return sums, grads


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize('sizes', MESHES, ids=str)
def test_the_split_loss_is_the_loss(sizes, monkeypatch):
  mesh = _mesh(**sizes)
  expected, expected_grads = _expected()
  _several_chunks(monkeypatch, mesh)
  nll = sharded_loss.make_weighted_nll(cross_entropy.chunked_nll, mesh)
  with rules.applied(mesh):
    gradient, arguments = _compiled(mesh, nll)
    (_, beside), grads = gradient(*arguments)
  # Without a gradient it is another program.
  with rules.applied(mesh):
    alone = jax.jit(nll, static_argnums=4)(*arguments, FORM)
  np.testing.assert_allclose(alone, expected, rtol=1e-6)
  np.testing.assert_allclose(beside, expected, rtol=1e-6)
  for a, b in zip(grads, expected_grads, strict=True):
    # 128 float32 terms of order one, in another order.
    np.testing.assert_allclose(a, b, atol=1e-5)


def _collectives(text):
  """Returns (kind, shapes, is in a loop's body) of each collective."""
  found = []
  for line in text.splitlines():
    match = re.search(r'= (.*?) (all-\w+|reduce-scatter)(?:-start)?\(', line)
    if match:
      found.append((match[2], match[1], 'while/body' in line))
  return found


def _of_head(mesh, collectives):
  """Returns sums whose result has a device's part of the vocabulary."""
  rows = VOCAB // mesh.shape['tensor']
  shape = re.compile(rf'\[({rows},\d+|\d+,{rows})\]')
  return [c for c in collectives if c[0] != 'all-gather' and shape.search(c[1])]


@pytest.mark.parametrize('sizes', MESHES, ids=str)
def test_the_head_gradient_is_summed_once_behind_the_loop(sizes, monkeypatch):
  mesh = _mesh(**sizes)
  _several_chunks(monkeypatch, mesh)
  nll = sharded_loss.make_weighted_nll(cross_entropy.chunked_nll, mesh)
  with rules.applied(mesh):
    gradient, arguments = _compiled(mesh, nll)
    text = gradient.lower(*arguments).compile().as_text()
  assert ' while(' in text
  collectives = _collectives(text)
  of_head = _of_head(mesh, collectives)
  assert len(of_head) == 1, collectives
  assert not of_head[0][2], 'summed in every chunk'
  # The vocabulary stays split: whole, nothing but the head would have 64 rows.
  if mesh.shape['tensor'] > 1:
    assert not re.search(rf'f32\[(\d+,)*{VOCAB}(,\d+)*\]', text)


def test_left_to_the_compiler_it_would_be_summed_in_every_chunk(monkeypatch):
  """What this file is about; and the test above can tell."""
  mesh = _mesh(data=8)
  _several_chunks(monkeypatch, mesh)
  with rules.applied(mesh):
    gradient, arguments = _compiled(mesh, cross_entropy.chunked_nll)
    text = gradient.lower(*arguments).compile().as_text()
  assert any(c[2] for c in _of_head(mesh, _collectives(text)))


def test_bfloat16_products(monkeypatch):
  mesh = _mesh(fsdp=4, tensor=2)
  hidden, head, targets, weights = _inputs()
  hidden = hidden.astype(jnp.bfloat16)
  form = cross_entropy.LossForm(dtype=jnp.dtype(jnp.bfloat16), **TERMS)

  def gradient(nll):
    def loss(hidden, head):
      return nll(hidden, head, targets, weights, form).loss

    return jax.jit(jax.grad(loss, (0, 1)))

  expected = gradient(cross_entropy.chunked_nll)(hidden, head)
  _several_chunks(monkeypatch, mesh)
  nll = sharded_loss.make_weighted_nll(cross_entropy.chunked_nll, mesh)
  with rules.applied(mesh):
    got = gradient(nll)(hidden, head)
  assert got[0].dtype == jnp.bfloat16
  assert got[1].dtype == jnp.float32
  # The gradient of a hidden state is rounded to 8 bits, on either side of a
  # boundary; that of the head is summed in float32 from the same products.
  a, b = (np.asarray(x[0], np.float32) for x in (got, expected))
  np.testing.assert_allclose(a, b, atol=2**-8 * np.abs(b).max())
  np.testing.assert_allclose(got[1], expected[1], atol=1e-5)


def test_the_loss_sees_what_a_device_holds():
  seen = []

  def nll(hidden, head, targets, weights, form, *, vocab_shards):
    del head, targets
    assert form is FORM
    seen.append((hidden.shape, vocab_shards))
    return jnp.sum(weights)

  mesh = _mesh(data=2, context=2, tensor=2)
  total = jax.jit(sharded_loss.make_weighted_nll(nll, mesh), static_argnums=4)(
    *_inputs(), FORM
  )
  np.testing.assert_allclose(total, jnp.sum(_inputs()[3]), rtol=1e-6)
  assert seen == [((BATCH // 2, TIME // 2, WIDTH), 2)]


def test_rows_that_do_not_divide_are_refused():
  mesh = _mesh(stage=4, data=2)
  nll = sharded_loss.make_weighted_nll(cross_entropy.chunked_nll, mesh)
  hidden, head, targets, weights = _inputs()
  with pytest.raises(
    ValueError,
    match='data.row_length: got 14, expected a multiple of parallel.stage = 4',
  ):
    nll(hidden[:, :14], head, targets[:, :14], weights[:, :14], FORM)
