"""Prefill and decode: the two programs that life two consists of.

`prefill` reads all prompts of a batch in one parallel pass and samples each
sequence's first token; `decode_step` then makes one token per call. State in,
state out: the state holds the KV cache and is donated, so a step writes its
keys and values in place.

    state = prefill(params, tokens_BT, lengths_B, sampler, ...)
    state, tokens_B = decode_step(params, state, ...)      # again and again

Both compile once per shape: batch B, prompt bucket T, cache length S. Nothing
here depends on training; both lives share the model and nothing else.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from inference import sampling
from models import kv_cache, transformer

# Shorter prompts are padded to this; every bucket is a power of two.
MIN_BUCKET = 16

Params = Any  # the variables of `models.transformer.Transformer`


class DecodeState(NamedTuple):
  """A batch of sequences in flight."""

  cache: kv_cache.Cache  # holds every token but the last
  tokens_B: jax.Array  # int32, the last token of each sequence
  positions_B: jax.Array  # int32, its position
  sampler: sampling.Sampler


def bucket(num_tokens: int, *, limit: int) -> int:
  """Returns the smallest bucket that holds `num_tokens`, at most `limit`.

  Raises:
    ValueError: more tokens than `limit`.
  """
  if num_tokens > limit:
    raise ValueError(
      f'got {num_tokens} tokens, expected at most {limit}; shorten the text'
    )
  return min(limit, max(MIN_BUCKET, 1 << (num_tokens - 1).bit_length()))


@functools.partial(
  jax.jit, static_argnames=('model', 'cache_length', 'vocab_size')
)
def prefill(
  params: Params,
  tokens_BT: jax.Array,
  lengths_B: jax.Array,
  sampler: sampling.Sampler,
  *,
  model: transformer.Transformer,
  cache_length: int,
  vocab_size: int,
) -> tuple[DecodeState, jax.Array]:
  """Reads the prompts and samples the first token of each sequence.

  Args:
    params: serving params.
    tokens_BT: prompts, padded on the right with any token.
    lengths_B: true length of each prompt, at least 1.
    sampler: settings of each sequence.
    model: what the params belong to.
    cache_length: S >= T, slots for the prompt and all that follows.
    vocab_size: ids that may be sampled; the embedding may have spare rows.

  Returns:
    The state to decode from, and its tokens_B as a buffer of its own.
  """
  batch_size, bucket_length = tokens_BT.shape
  # Attention runs over the prompt's bucket, not over the whole cache.
  cache = kv_cache.init(
    model.config,
    batch_size=batch_size,
    length=bucket_length,
    dtype=model.dtype,
  )
  positions_BT = jnp.broadcast_to(
    jnp.arange(bucket_length)[None, :], tokens_BT.shape
  )
  hidden_BTD, cache = _apply(
    model, params, tokens_BT, positions_BT, cache, method='hidden'
  )
  # The head is the largest matrix: only one position per row needs it.
  last_B11 = lengths_B[:, None, None] - 1
  hidden_BD = jnp.take_along_axis(hidden_BTD, last_B11, axis=1)[:, 0]
  logits_BV = _apply(model, params, hidden_BD, method='unembed')
  tokens_B = sampling.sample(logits_BV[:, :vocab_size], sampler, lengths_B)
  cache = _grow(cache, model, batch_size, cache_length)
  return DecodeState(cache, tokens_B, lengths_B, sampler), tokens_B


@functools.partial(
  jax.jit, static_argnames=('model', 'vocab_size'), donate_argnames='state'
)
def decode_step(
  params: Params,
  state: DecodeState,
  *,
  model: transformer.Transformer,
  vocab_size: int,
) -> tuple[DecodeState, jax.Array]:
  """Feeds each sequence's last token and samples the next. Donates `state`.

  A sequence past the end of its cache writes nothing and stays harmless: the
  host ignores rows that are finished.

  Returns:
    The new state, and its tokens_B as a buffer of its own: the host reads
    this one while the next step has the state.
  """
  logits_B1V, cache = _apply(
    model,
    params,
    state.tokens_B[:, None],
    state.positions_B[:, None],
    state.cache,
  )
  positions_B = state.positions_B + 1
  tokens_B = sampling.sample(
    logits_B1V[:, 0, :vocab_size], state.sampler, positions_B
  )
  return DecodeState(cache, tokens_B, positions_B, state.sampler), tokens_B


def _apply(model: transformer.Transformer, *args, **kwargs) -> Any:
  # Flax's type for what `apply` returns fits no method in particular.
  return model.apply(*args, **kwargs)


def _grow(cache, model, batch_size: int, length: int) -> kv_cache.Cache:
  """Copies a cache into the first slots of a longer one."""
  longer = kv_cache.init(
    model.config, batch_size=batch_size, length=length, dtype=model.dtype
  )
  return jax.tree.map(
    lambda into, entry: jax.lax.dynamic_update_slice(
      into, entry, (0,) * entry.ndim
    ),
    longer,
    cache,
  )
