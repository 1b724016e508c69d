"""Invariant execution: a token has the same bits in every batch and cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import execution as execution_lib, kv_cache, transformer
from models.linear import invariant
from tests.helpers import tiny_models

_SIZE, _PAGES = 16, 8  # tokens of a page, pages of a sequence
_SEQUENCES, _LENGTH = 9, 90
_MODELS = {
  'llama': tiny_models.llama_like,
  'gpt2': tiny_models.gpt2_like,
  'mixture': tiny_models.mixture,
}
_TABLE = 1 + np.random.default_rng(5).permutation(_SEQUENCES * _PAGES).reshape(
  _SEQUENCES, _PAGES
)


class _Paged:
  """A model with a paged cache, whose calls hold several sequences."""

  def __init__(self, kind, execution):
    # Wider than other tiny models: sums long enough to have several orders.
    config = _MODELS[kind](num_layers=1, scan_layers=False, max_length=128)
    self.config = config
    self.model = transformer.Transformer(config, jnp.float32, execution)
    rng = np.random.default_rng(0)
    self.params = jax.tree.map(
      lambda leaf: jnp.asarray(rng.normal(0, 0.2, leaf.shape), leaf.dtype),
      jax.eval_shape(
        transformer.Transformer(config).init,
        jax.random.key(0),
        jnp.zeros((1, 1), jnp.int32),
      ),
    )
    size = _SEQUENCES, _LENGTH
    self.tokens = rng.integers(0, config.vocab_size, size).astype(np.int32)
    self.apply = jax.jit(self.model.apply)
    self.empty()

  def empty(self):
    self.pools = kv_cache.init_pages(
      self.config, num_pages=_TABLE.size + 1, page_size=_SIZE
    )

  def step(self, decodes, chunks, *, rows=32, num_decodes=1, num_chunks=0):
    """Runs [(sequence, position)] and [(sequence, start, length)]."""
    num_tokens = num_decodes + num_chunks * rows
    tokens_T = np.zeros(num_tokens, np.int32)
    positions_T = np.full(num_tokens, -1, np.int32)
    tables = np.zeros((num_decodes + num_chunks, _PAGES), np.int32)
    for row, (sequence, position) in enumerate(decodes):
      tokens_T[row] = self.tokens[sequence, position]
      positions_T[row] = position
      tables[row] = _TABLE[sequence]
    for chunk, (sequence, start, length) in enumerate(chunks):
      at = num_decodes + chunk * rows
      part = slice(start, start + length)
      tokens_T[at : at + length] = self.tokens[sequence, part]
      positions_T[at : at + length] = range(start, start + length)
      tables[num_decodes + chunk] = _TABLE[sequence]
    cache = tuple(
      kv_cache.PagedLayer(pool, tables[:num_decodes], tables[num_decodes:])
      for pool in self.pools
    )
    logits_1TV, cache = self.apply(
      self.params, tokens_T[None], positions_T[None], cache
    )
    self.pools = tuple(layer.pages for layer in cache)
    return np.asarray(logits_1TV[0])

  def in_chunks(self):
    """Returns the logits of sequence 0, computed in chunks of 32."""
    self.empty()
    return np.concatenate(
      [
        self.step([], [(0, start, size)], num_chunks=1)[1 : 1 + size]
        for start, size in ((0, 32), (32, 32), (64, 26))
      ]
    )

  def alone(self):
    """Returns them for a prompt of 58 and one token at a time, alone."""
    self.empty()
    first = self.step([], [(0, 0, 58)], rows=64, num_chunks=1)[1:59]
    rest = [self.step([(0, at)], []) for at in range(58, _LENGTH)]
    return np.concatenate([first, *rest])

  def in_a_crowd(self):
    """Returns them with other sequences that decode and prefill."""
    self.empty()
    prompts = [(each, 0, 58) for each in range(7)]
    logits = [
      self.step([], prompts, rows=64, num_decodes=9, num_chunks=7)[9 : 9 + 58]
    ]
    for at in range(58, _LENGTH):
      order = [(row + at) % 7 for row in range(7)]
      out = self.step(
        [(each, at) for each in order],
        [(8, 0, 40), (8, 40, 20)],
        rows=40,
        num_decodes=9,
        num_chunks=2,
      )
      logits.append(out[order.index(0)][None])
    return np.concatenate(logits)

  def dense(self):
    """Returns them from a dense cache: a prompt, then one token at a time."""
    cache = kv_cache.init(self.config, batch_size=1, length=_LENGTH)
    logits = []
    for part in (slice(0, 58), *(slice(at, at + 1) for at in range(58, 90))):
      out, cache = self.apply(
        self.params,
        self.tokens[:1, part],
        np.arange(_LENGTH)[None, part],
        cache,
      )
      logits.append(np.asarray(out[0]))
    return np.concatenate(logits)


@functools.cache
def _logits(kind, is_invariant):
  execution = (
    invariant.execution() if is_invariant else execution_lib.Execution()
  )
  paged = _Paged(kind, execution)
  full, _ = paged.apply(paged.params, paged.tokens[:1])
  ways = 'in_chunks', 'alone', 'in_a_crowd', 'dense'
  return np.asarray(full[0]), {way: getattr(paged, way)() for way in ways}


@pytest.mark.slow
@pytest.mark.parametrize('kind', _MODELS)
def test_a_token_has_the_same_bits_in_whatever_company(kind):
  full, ways = _logits(kind, is_invariant=True)
  for way in ways.values():
    np.testing.assert_array_equal(way, ways['in_chunks'])
  # The forward of training attends by itself; float32 sums in another order.
  np.testing.assert_allclose(ways['in_chunks'], full, atol=2e-5)


def test_without_fixed_shapes_the_bits_do_differ():
  # What the test above would not notice if it could not fail.
  full, ways = _logits('llama', is_invariant=False)
  differences = [np.abs(way - ways['in_chunks']).max() for way in ways.values()]
  assert any(difference > 0 for difference in differences)
  for way in ways.values():
    np.testing.assert_allclose(way, full, atol=2e-5)


@pytest.mark.slow
def test_ports_compute_what_the_usual_ones_do():
  rng = np.random.default_rng(0)

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  usual, ours = execution_lib.Execution(), invariant.execution()
  x_BTD, w_DF, bias_F = normal(3, 15, 24), normal(24, 40), normal(40)
  for name, args in (
    ('linear', (x_BTD, w_DF, bias_F, jnp.float32)),
    ('exact_linear', (x_BTD, w_DF, None, jnp.float32)),
    ('unembed', (x_BTD, w_DF.T, jnp.float32)),
    ('by_row', (lambda rows: rows.sum(-1), x_BTD)),
  ):
    np.testing.assert_allclose(
      getattr(ours, name)(*args), getattr(usual, name)(*args), atol=2e-5
    )
  kernels = {name: normal(4, 24, 16) for name in ('up', 'gate')}
  kernels['down'] = normal(4, 16, 24)
  ids_BTA = jnp.asarray(
    rng.permuted(np.tile(np.arange(4), (3, 15, 1)), axis=-1)
  )
  gates_BTA = jax.nn.softmax(normal(3, 15, 2))
  for mixture in (kernels, {k: v for k, v in kernels.items() if k != 'gate'}):
    args = x_BTD, ids_BTA[..., :2], gates_BTA, mixture, jnp.float32
    np.testing.assert_allclose(
      ours.apply_experts(*args),
      usual.apply_experts(*args),
      atol=2e-3,
      rtol=1e-4,
    )
