"""The fused cross-entropy against the plain formula, autodiff and sizes."""

import functools

import jax
from jax import test_util
import jax.numpy as jnp
import numpy as np
import pytest

from models.layers import cross_entropy


def _loss_inputs(batch=3, time=12, width=5, vocab=11):
  keys = jax.random.split(jax.random.key(0), 4)
  hidden = jax.random.normal(keys[0], (batch, time, width))
  head = jax.random.normal(keys[1], (vocab, width))
  # The last three ids are spare in one form.
  targets = jax.random.randint(keys[2], (batch, time), 0, vocab - 3)
  weights = jax.random.bernoulli(keys[3], 0.7, (batch, time))
  return hidden, head, targets, weights.astype(jnp.float32)


def _form(dtype=jnp.float32, **terms):
  return cross_entropy.LossForm(dtype=jnp.dtype(dtype), **terms)


PLAIN = _form()


FORMS = {
  'plain': PLAIN,
  'capped': _form(softcap=2.0),
  'z': _form(z_weight=0.1),
  'capped_z': _form(softcap=2.0, z_weight=0.1),
  'spare': _form(softcap=2.0, z_weight=0.1, spare_ids=((8, 9), (10, 11))),
}


def _plain_sums(hidden, head, targets, weights, form=PLAIN):
  """Returns the sums by the formulas of the module docstring."""
  logits = hidden @ head.T
  if form.softcap:
    logits = form.softcap * jnp.tanh(logits / form.softcap)
  spare = {i for first, end in form.spare_ids for i in range(first, end)}
  kept = [i for i in range(head.shape[0]) if i not in spare]
  log_z = jax.nn.logsumexp(logits[..., jnp.array(kept)], axis=-1)
  chosen = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
  nll = jnp.sum((log_z - chosen) * weights)
  z = jnp.sum(log_z**2 * weights)
  return cross_entropy.LossSums(nll + form.z_weight * z, nll, z)


@pytest.mark.fast_cases(5)
@pytest.mark.parametrize('form', FORMS.values(), ids=FORMS)
@pytest.mark.parametrize('chunks', [1, 3, 12])
def test_fused_cross_entropy_equals_the_plain_one(chunks, form):
  hidden, head, targets, weights = _loss_inputs()

  def fused(hidden, head):
    # A factor checks that the cotangent is used.
    sums = cross_entropy.weighted_nll(
      hidden, head, targets, weights, chunks, form
    )
    return 3.0 * sums.loss, sums

  def plain(hidden, head):
    sums = _plain_sums(hidden, head, targets, weights, form)
    return 3.0 * sums.loss, sums

  value_and_grad = jax.value_and_grad(plain, (0, 1), has_aux=True)
  (_, expected), expected_grads = value_and_grad(hidden, head)
  # Evaluated without a gradient, and with: two implementations.
  alone = fused(hidden, head)[1]
  value_and_grad = jax.value_and_grad(fused, (0, 1), has_aux=True)
  (_, beside), grads = value_and_grad(hidden, head)
  for got in (alone, beside):
    np.testing.assert_allclose(got, expected, rtol=1e-6)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
    grads,
    expected_grads,
  )
  for first, end in form.spare_ids:
    np.testing.assert_array_equal(grads[1][first:end], 0)


@pytest.mark.parametrize('form', FORMS.values(), ids=FORMS)
def test_fused_gradients_agree_with_finite_differences(form):
  hidden, head, targets, weights = _loss_inputs(batch=2, time=4)

  def loss(hidden, head):
    return cross_entropy.weighted_nll(
      hidden, head, targets, weights, 2, form
    ).loss

  # Steps of 0.01 have an error of 1e-4, float32 differences over them 1e-3.
  test_util.check_grads(
    loss, (hidden, head), order=1, modes=['rev'], eps=1e-2, rtol=5e-3
  )


def test_only_the_loss_has_a_gradient():
  """The terms nll and z are for metrics and have no gradient."""
  hidden, head, targets, weights = _loss_inputs()

  def terms(hidden):
    sums = cross_entropy.weighted_nll(
      hidden, head, targets, weights, 2, FORMS['capped_z']
    )
    return sums.nll + sums.z

  np.testing.assert_array_equal(jax.grad(terms)(hidden), 0.0)


def test_capped_logits_stay_below_the_cap_and_small_ones_as_they_are():
  logits = jnp.array([-1e6, -0.01, 0.0, 0.01, 5.0, 1e6])
  # tanh(x) = x - x^3 / 3 + ...
  np.testing.assert_allclose(
    cross_entropy.capped(logits, 5.0),
    [-5, -0.01, 0, 0.01, 5 * np.tanh(1), 5],
    rtol=1e-5,
  )
  assert cross_entropy.capped(logits, 0.0) is logits


@pytest.mark.parametrize(
  ('batch', 'time', 'vocab', 'expected'),
  [
    (8, 256, 100, 1),  # fits into one
    (4, 256, 50_304, 1),  # 51 million logits: fits
    (8, 1024, 50_304, 8),  # 7 would do, 8 divides
    (1, 7, 2**26, 7),  # a token a time
    (1, 6, 2**30, 6),  # never less than a token
  ],
)
def test_chunks_divide_time(batch, time, vocab, expected):
  assert cross_entropy.num_chunks(batch, time, vocab) == expected


@pytest.mark.parametrize(('vocab_shards', 'chunks'), [(1, 6), (2, 3)])
def test_a_split_vocabulary_is_cut_into_fewer_chunks(
  vocab_shards, chunks, monkeypatch
):
  inputs = _loss_inputs(batch=3, time=12, vocab=10)
  monkeypatch.setattr(cross_entropy, 'MAX_CHUNK_LOGITS', 3 * 12 * 10 // 6)
  jaxpr = jax.make_jaxpr(
    lambda *inputs: cross_entropy.chunked_nll(
      *inputs, PLAIN, vocab_shards=vocab_shards
    )
  )(*inputs)
  assert f' length={chunks}\n' in str(jaxpr)


def test_a_large_vocabulary_is_never_materialised():
  """The compiled gradient needs a fraction of the [B, T, V] logits."""
  batch, time, width, vocab = 8, 512, 16, 32_768
  logits_bytes = 4 * batch * time * vocab
  arguments = (
    jax.ShapeDtypeStruct((batch, time, width), jnp.float32),
    jax.ShapeDtypeStruct((vocab, width), jnp.float32),
    jax.ShapeDtypeStruct((batch, time), jnp.int32),
    jax.ShapeDtypeStruct((batch, time), jnp.float32),
  )

  def temporaries(sums):
    loss = jax.grad(lambda *arguments: sums(*arguments).loss, (0, 1))
    compiled = jax.jit(loss).lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert temporaries(_plain_sums) > logits_bytes
  # A chunk is a sixteenth of the logits, stored as logits and as their
  # gradient. On CPU the derivative of the cap is a third array; on TPU it is
  # not.
  for form, most in ((PLAIN, 0.2), (FORMS['capped_z'], 0.26)):
    fused = functools.partial(cross_entropy.weighted_nll, chunks=16, form=form)
    assert temporaries(fused) < most * logits_bytes
