"""Tokens that are not finite, and the queries that do not see them.

A query gets the same bits as if the keys and values that it does not see were
zeros, on every path of attention.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import kv_cache
from models.attention import cached, finite, form as form_lib, paged
from models.attention.kernels import paged_gpu
from models.linear import invariant
from parallel.attention import partial
from tests.helpers import attention_paths
from training.diagnosis import tensor_checks

Form = form_lib.Form
PATHS, RUN = attention_paths.PATHS, attention_paths.RUN
TIME = attention_paths.TIME
CUT = 70  # tokens from here on are not finite, or those before


def _spoilt(x, tokens, value):
  """Returns [B, K, T, C] or [B, T, H, C] with `value` in some numbers."""
  x = x.copy()
  axis = 1 if x.shape[1] == TIME else 2
  x.swapaxes(1, axis)[:, tokens, :, ::3] = value
  return x


def _assert_unspoilt(
  run, inputs, tokens, free, value, spoils=(1, 2), clean=None
):
  """Asserts that queries `free` of spoilt tokens give the bits of zeros.

  Args:
    run: attention of a list of arrays.
    inputs: queries, then keys and values.
    tokens: that are spoilt.
    free: the queries that see none of them.
    value: NaN or infinity.
    spoils: indices of the inputs that are spoilt.
    clean: attention of the inputs with zeros in these tokens; None: `run`.
  """
  got, expected = (
    np.asarray(
      attend(
        *(
          jnp.asarray(_spoilt(x, tokens, each) if n in spoils else x)
          for n, x in enumerate(inputs)
        )
      )
    )
    for attend, each in ((run, value), (clean or run, 0.0))
  )
  assert np.isfinite(expected).all()
  np.testing.assert_array_equal(got[:, free], expected[:, free])
  return got


CAUSAL = slice(CUT, None), slice(None, CUT)  # spoilt tokens, free queries


@pytest.mark.fast_cases(3)
@pytest.mark.parametrize('value', [np.nan, np.inf])
@pytest.mark.parametrize('name', PATHS)
def test_what_no_query_sees_never_enters_a_sum(name, value):
  run = clean = RUN[name]
  if name == 'PAGED_TPU':  # a chunk ends before such a token
    clean = functools.partial(run, length=CUT)
  # The values alone, too: a key that is not finite may hide them.
  for spoils in ((1, 2), (2,)):
    got = _assert_unspoilt(
      run, attention_paths.inputs(), *CAUSAL, value, spoils, clean
    )
    # Queries that do see them say so.
    assert np.isnan(got[:, CUT:]).any((2, 3)).all()


def test_what_a_page_still_holds_never_enters_a_sum_on_tpu():
  run = functools.partial(RUN['PAGED_TPU'], length=CUT)
  _assert_unspoilt(run, attention_paths.inputs(), *CAUSAL, np.nan)


@pytest.mark.fast_cases(4)
@pytest.mark.parametrize(
  'name',
  # The kernel for TPU adds its mask to the scores.
  [
    n for n, path in PATHS.items() if 'window' in path.form and n != 'PAGED_TPU'
  ],
)
def test_what_a_window_has_left_behind_never_enters_a_sum(name):
  form = Form(window=40)
  run = functools.partial(RUN[name], form=form)
  tokens, free = slice(None, 20), slice(59, None)
  got = _assert_unspoilt(run, attention_paths.inputs(), tokens, free, np.nan)
  assert np.isnan(got[:, :59]).any((2, 3)).all()


@pytest.mark.slow
@pytest.mark.parametrize(
  'name', [name for name, path in PATHS.items() if path.has_segments]
)
@pytest.mark.parametrize('is_first', [True, False])
def test_a_document_that_is_not_finite_leaves_the_others_alone(name, is_first):
  segments = jnp.asarray(np.repeat([[1, 2]] * 2, [CUT, TIME - CUT], axis=1))
  run = functools.partial(RUN[name], segment_ids_BT=segments)
  parts = CAUSAL if not is_first else CAUSAL[::-1]
  got = _assert_unspoilt(
    run, attention_paths.inputs(), *parts, np.nan, (0, 1, 2)
  )
  assert np.isnan(got[:, parts[0]]).any((2, 3)).all()

  def gradients(*inputs):
    def total(*inputs):
      return jnp.sum(jnp.sin(run(*inputs)[:, parts[1]]))

    return jax.tree.map(np.asarray, jax.grad(total, (0, 1, 2))(*inputs))

  got, expected = (
    gradients(
      *(jnp.asarray(_spoilt(x, parts[0], v)) for x in attention_paths.inputs())
    )
    for v in (np.nan, 0.0)
  )
  for ours, theirs, axis in zip(got, expected, (1, 2, 2), strict=True):
    np.testing.assert_array_equal(
      ours.swapaxes(1, axis)[:, parts[1]], theirs.swapaxes(1, axis)[:, parts[1]]
    )
    assert np.abs(theirs).max() > 0.1


@pytest.mark.parametrize(
  'name',
  [name for name, path in PATHS.items() if path.has_int8],
)
def test_pages_in_int8_that_no_query_sees_never_enter_a_sum(name):
  # The scale of such a vector is not finite.
  cache, native = attention_paths.paged_cache, attention_paths.native
  run = {
    'PAGED': functools.partial(cache, paged.attend),
    'PAGED_GPU': functools.partial(
      cache, functools.partial(paged_gpu.attend, interpret=True)
    ),
    'PAGED_CPU': functools.partial(attention_paths.paged_decodes, native),
    'INVARIANT': functools.partial(cache, invariant.attend_cached),
  }[name]
  run = functools.partial(run, is_int8=True)
  got = _assert_unspoilt(run, attention_paths.inputs(), *CAUSAL, np.nan)
  assert np.isnan(got[:, CUT:]).any((2, 3)).all()


@pytest.mark.parametrize('is_paged', [True, False])
@pytest.mark.parametrize(
  'attend', [cached.attend, invariant.attend_cached], ids=['fast', 'invariant']
)
def test_latents_that_no_query_sees_never_enter_a_sum(attend, is_paged):
  q, k, _ = attention_paths.inputs()
  positions = jnp.tile(jnp.arange(TIME), (2, 1))

  def dense_latents(q, kv):
    return attend(q, kv_cache.LatentCache(kv), positions, Form())

  run = (
    functools.partial(attention_paths.latent_pages, attend)
    if is_paged
    else dense_latents
  )
  got = _assert_unspoilt(run, [q, k[:, :1]], *CAUSAL, np.nan)
  assert np.isnan(got[:, CUT:]).any((2, 3)).all()


def test_a_row_that_sees_nothing_yet_adds_no_huge_numbers():
  # Finite, but their sum is not: 64 of them beside a weight of 1.
  q, k, v = attention_paths.inputs()
  v[:, :, :64] = 3e38
  got = RUN['PAGED'](*map(jnp.asarray, (q, k, v)), form=Form(window=40))
  assert np.isfinite(got[:, 103:]).all()


def _all_finite(fn, *args):
  """Returns whether every tensor that a function computes is finite."""
  watch = tensor_checks.Watch(fn)
  _, record = jax.jit(watch)(*args)
  return all(each.is_finite for each in watch.tensors(jax.device_get(record)))


@pytest.mark.parametrize(
  'parted', [finite.parted, partial._parted], ids=['one device', 'a mesh']
)
def test_finite_vectors_make_no_tensor_that_is_not(parted):
  """Diagnosis looks for the first such tensor of a step."""
  x = jax.random.normal(jax.random.key(0), (2, 3, 4))
  assert _all_finite(parted, x)
  assert not _all_finite(parted, x.at[1, 2, 3].set(jnp.inf))


def test_a_kernel_is_called_without_a_constant_nan():
  q, k, v = (
    jax.random.normal(jax.random.key(i), (1, 2, 2, 4)) for i in range(3)
  )

  def run(q, k, v):
    return finite.around(lambda q, k, v: q + k + v, q, k, v, None, Form())

  assert _all_finite(run, q, k, v)
