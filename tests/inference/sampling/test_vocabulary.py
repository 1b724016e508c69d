"""A vocabulary that is split over devices: the same tokens, and few numbers."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec as P
import numpy as np
import pytest

from hardware import hlo
from inference.sampling import (
  logprobs as logprobs_lib,
  penalties,
  sampler as sampler_lib,
  settings as settings_lib,
  vocabulary,
)
from models.layers import cross_entropy
from parallel.tensor import ports

_VOCAB, _PADDED, _ROWS = 300, 512, 24
_Settings = settings_lib.Settings
_KINDS = (
  _Settings(temperature=0.0),
  _Settings(temperature=1.0, logprobs=5),
  _Settings(temperature=0.7, top_k=40, logprobs=20),
  _Settings(temperature=1.5, top_p=0.8),
  _Settings(temperature=1.0, top_k=200, top_p=0.95, min_p=0.01, logprobs=0),
  _Settings(
    temperature=0.9, repetition_penalty=1.4, presence_penalty=0.3,
    frequency_penalty=0.2, logit_bias=((3, 4.0), (290, 5.0)), min_tokens=3,
    logprobs=2,
  ),
)  # fmt: skip


def _batch():
  """Returns logits with ties, settings, token counts and positions."""
  rng = np.random.default_rng(0)
  logits_BV = (2 * rng.standard_normal((_ROWS, _VOCAB))).astype(np.float32)
  # Equal values on different devices: the least id comes first.
  logits_BV[:, [10, 150, 299]] = logits_BV.max(axis=1, keepdims=True)
  logits_BV[:, 40:260:9] = 1.5
  rows = [
    sampler_lib.row(
      _KINDS[n % len(_KINDS)], num_prompt_tokens=5, seed=n, eos_id=10
    )
    for n in range(_ROWS)
  ]
  seen_BV = rng.integers(0, 3, (_ROWS, _VOCAB)).astype(np.int32)
  positions_B = np.full((_ROWS,), 6, np.int32)
  return logits_BV, sampler_lib.stack(rows), seen_BV, positions_B


def _all(logits_BV, sampler, seen_BV, positions_B):
  """Returns everything that a step of an engine takes from logits."""
  tokens_B = sampler_lib.sample(logits_BV, sampler, seen_BV, positions_B)
  scored_BV, wanted_B = sampler_lib.scored_logits(
    logits_BV, sampler, seen_BV, positions_B
  )
  found = logprobs_lib.logprobs(scored_BV, tokens_B, wanted_B)
  seen_BV = penalties.count(seen_BV, jnp.arange(_ROWS), tokens_B)
  is_finite_B = vocabulary.here().all(jnp.isfinite(logits_BV))
  return tokens_B, found, is_finite_B, seen_BV


def _padded(x_BV, value):
  spare = ((0, 0), (0, _PADDED - _VOCAB))
  return np.pad(x_BV, spare, constant_values=value)


@functools.cache
def _split(num_devices: int):
  """Returns `_all` over devices, compiled, and its arguments."""
  devices = np.array(jax.devices()[:num_devices])
  mesh = Mesh(devices.reshape(1, -1), ports.AXIS)
  logits_BV, sampler, seen_BV, positions_B = _batch()
  args = (
    _padded(logits_BV, cross_entropy.MASKED), sampler, _padded(seen_BV, 0),
    positions_B,
  )  # fmt: skip
  split = P(None, ports.AXIS)
  function = jax.jit(
    jax.shard_map(
      _all,
      mesh=mesh,
      in_specs=(split, P(), split, P()),
      out_specs=(P(), P(), P(), split),
      check_vma=False,
    )
  )
  return function.lower(*args).compile(), args


@pytest.mark.fast_cases(2)
@pytest.mark.parametrize('num_devices', [1, 2, 4, 8])
def test_a_split_vocabulary_gives_the_same_tokens(num_devices):
  expected = jax.device_get(jax.jit(_all)(*_batch()))
  function, args = _split(num_devices)
  tokens_B, found, is_finite_B, seen_BV = jax.device_get(function(*args))
  np.testing.assert_array_equal(tokens_B, expected[0])
  assert len({*tokens_B.tolist()}) > 8
  np.testing.assert_array_equal(found.ids_BK, expected[1].ids_BK)
  # Another order of sums: an ulp of a log-probability near -8.
  np.testing.assert_allclose(found.chosen_B, expected[1].chosen_B, atol=2e-6)
  np.testing.assert_allclose(found.values_BK, expected[1].values_BK, atol=2e-6)
  assert is_finite_B.all()
  np.testing.assert_array_equal(seen_BV[:, :_VOCAB], expected[3])


def test_bits_do_not_depend_on_the_number_of_devices():
  results = [
    jax.device_get(function(*args)) for function, args in map(_split, (1, 2, 8))
  ]
  for other in results[1:]:
    jax.tree.map(np.testing.assert_array_equal, results[0], other)


def test_no_device_gathers_logits():
  function, _ = _split(8)
  traffic = hlo.traffic(hlo.parse(function.as_text()))
  largest = max(each.payload_bytes for each in traffic.collectives)
  # The 20 candidates of each row; logits would be 64 per row and device.
  assert largest <= _ROWS * 20 * 4
  assert {each.num_devices for each in traffic.collectives} == {8}


def test_logits_that_are_not_finite_are_seen_by_all_devices():
  function, (logits_BV, *others) = _split(4)
  logits_BV = logits_BV.copy()
  logits_BV[3, 200] = np.nan
  logits_BV[5, 1] = np.inf
  _, _, is_finite_B, _ = function(logits_BV, *others)
  assert np.flatnonzero(~np.asarray(is_finite_B)).tolist() == [3, 5]


def test_noise_is_that_of_jax():
  """Otherwise one device and several would sample other tokens."""
  words = np.array([7, 2**31 + 5], np.uint32)
  ids_V = np.arange(4000, dtype=np.uint32)
  key = jax.random.wrap_key_data(words, impl='threefry2x32')
  np.testing.assert_array_equal(
    jax.jit(vocabulary._gumbel)(words, ids_V),
    jax.jit(lambda key: jax.random.gumbel(key, (4000,)))(key),
  )
