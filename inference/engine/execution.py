"""Which execution serves a model: by platform and by numerics."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from inference.engine import engine_config
from models import execution as execution_lib, invariant, kv_cache, model_config
from models.attention import paged_gpu, paged_tpu


class Backend(NamedTuple):
  """How steps are computed, and the width of the pages that this takes."""

  execution: execution_lib.Execution
  channels: int  # C of pages


def choose(
  config: engine_config.EngineConfig,
  model: model_config.ModelConfig,
  dtype: Any,
  platform: str,
) -> Backend:
  """Returns the backend for 'cpu', 'gpu' or 'tpu'.

  Plain JAX attends everywhere. TPU and GPU have kernels that read pages where
  they lie; `attention='auto'` takes them where they take the model. Invariant
  numerics have an attention of their own.

  Raises:
    ValueError: the kernel was asked for and cannot be had.
  """
  _, width = kv_cache.rows_and_width(model)
  if config.numerics == 'invariant':
    if config.attention == 'kernel':
      raise ValueError(
        "engine.attention: got 'kernel' with invariant numerics, expected"
        " 'auto'; kernels choose their shapes themselves"
      )
    return Backend(invariant.execution(), width)
  plain = Backend(execution_lib.Execution(), width)
  kernels = {'tpu': paged_tpu, 'gpu': paged_gpu}
  if config.attention == 'reference':
    return plain
  if platform not in kernels:
    problem = f'got platform {platform!r}, expected one of tpu, gpu'
  elif model.latent_width:
    problem = (
      f'got model.latent_width = {model.latent_width}, expected 0: kernels read'
      ' keys and values of their own'
    )
  else:
    kernel = kernels[platform]
    channels = width
    if platform == 'tpu' and channels < paged_tpu.LANES:
      channels = paged_tpu.LANES  # narrower ones take as much memory there
    problem = kernel.shape_problem(
      *_largest_step(config, model, dtype, channels)
    )
    if not problem:
      execution = execution_lib.Execution(attend_cached=kernel.attend)
      return Backend(execution, channels)
  if config.attention == 'kernel':
    raise ValueError(
      f"engine.attention: got 'kernel', but {problem}; or leave it at 'auto'"
    )
  return plain


def _largest_step(
  config, model: model_config.ModelConfig, dtype, channels: int
):
  """Returns the shapes of queries and cache of the largest step."""
  decodes = config.max_sequences
  blocks = config.max_mixed_chunks
  size = config.page_tokens(model.max_length)
  width = config.table_width(model.max_length)
  kv_dtype = dtype if config.kv_dtype == 'model' else kv_cache.INT8

  def shapes():
    (pool, *_) = kv_cache.init_pages(
      model, num_pages=2, page_size=size, dtype=kv_dtype, channels=channels
    )
    tokens = decodes + blocks * config.chunk_tokens
    heads = model.num_heads, model.head_width
    return jnp.zeros((1, tokens, *heads), dtype), kv_cache.PagedLayer(
      pool,
      jnp.zeros((decodes, width), jnp.int32),
      jnp.zeros((blocks, width), jnp.int32),
    )

  return jax.eval_shape(shapes)
