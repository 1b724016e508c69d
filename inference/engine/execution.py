"""The execution of an engine: the model's ports for a platform and numerics."""

import dataclasses
import importlib.metadata
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hardware import peaks
from inference.engine import device_state, engine_config
from inference.engine.compiled import program_store
from models import execution as execution_lib, kv_cache, layout, model_config
from models.attention import supports
from models.layers import table
from models.linear import invariant, products as products_lib
from models.native import build, processor

_KERNELS = {
  'tpu': supports.PAGED_TPU,
  'gpu': supports.PAGED_GPU,
  'cpu': supports.PAGED_CPU,
}


class Backend(NamedTuple):
  """The execution of a step, and the pages that it needs."""

  execution: execution_lib.Execution
  channels: int  # C of pages
  kv_dtype: Any  # of pages
  has_transposed_kernels: bool = False  # `models.layout.transpose_kernels`
  # How weights are multiplied, and after a colon why.
  products: str = ''
  # Whether native code may attend; it does beside native products.
  may_attend_natively: bool = False
  # Per token: of the KV cache of a draft model, whose pages are as many, or of
  # the hidden states that a draft head reads.
  beside_bytes: float = 0.0

  def multiplying(
    self, config: engine_config.EngineConfig, params: Any, dtype: Any,
    platform: str,
  ) -> 'Backend':  # fmt: skip
    """Returns the backend with the products that suit the weights of params.

    Args:
      config: of the engine.
      params: arrays or shapes.
      dtype: of the computation.
      platform: of the device.

    Raises:
      ValueError: the native product is asked for, and cannot be.
    """
    if config.num_parts > 1:  # the placement has the ports of parts
      return self._replace(products=products_lib.PLAIN)
    chosen = products_lib.choose(
      config.native,
      params,
      dtype,
      platform,
      is_invariant=config.numerics == 'invariant',
      is_transposed=self.has_transposed_kernels,
    )
    ports = {
      name: port
      for name in ('stored', 'linear', 'unembed')
      if (port := getattr(chosen, name)) is not None
    }
    execution = dataclasses.replace(self.execution, **ports)
    found = self._replace(execution=execution, products=chosen.reason)
    is_asked = config.attention == 'kernel' and platform == 'cpu'
    if self.may_attend_natively and (chosen.is_native or is_asked):
      return found._attending_natively(is_asked)
    return found

  def _attending_natively(self, is_asked: bool) -> 'Backend':
    # Here: other platforms need no compiler.
    from models.attention.kernels import paged_cpu

    try:
      port = paged_cpu.registered()
    except build.BuildError as error:
      if is_asked:
        raise ValueError(
          f"engine.attention: got 'kernel', but {error}; set engine.attention ="
          ' auto'
        ) from error
      return self
    name, colon, why = self.products.partition(':')
    return self._replace(
      execution=dataclasses.replace(self.execution, attend_cached=port),
      products=f'{name}; attention native{colon}{why}',
    )

  def pool_pages(
    self,
    config: engine_config.EngineConfig,
    model: model_config.ModelConfig,
    weight_bytes: float,
    device: jax.Device,
  ) -> int:
    """Returns the pages of an engine's pool, see `EngineConfig.pool_pages`."""
    return config.pool_pages(
      config.context(model.max_length),
      bytes_per_token=self.bytes_per_token(model),
      weight_bytes=weight_bytes,
      memory_bytes=peaks.memory_bytes(device),
      is_host=device.platform == 'cpu',
    )

  def laid_out(
    self, params: device_state.Params, model: model_config.ModelConfig
  ) -> device_state.Params:
    """Returns the params of a model as steps take them."""
    is_stacked = 'layers' in params['params']
    model = dataclasses.replace(model, scan_layers=is_stacked)
    params, _ = layout.unstack(params, model)
    if self.has_transposed_kernels:
      params = layout.transpose_kernels(params)
    return params

  def shapes(
    self, params: device_state.Unread, model: model_config.ModelConfig
  ) -> device_state.Params:
    """Returns the shapes of `laid_out`."""
    return jax.eval_shape(
      lambda tree: self.laid_out(tree, model), params.shapes
    )

  def read(
    self, params: device_state.Unread, model: model_config.ModelConfig
  ) -> device_state.Params:
    """Reads params, and returns `laid_out`."""
    # Weight by weight, as they are read: no moment has two copies of all.
    read = params.read(
      lambda path, weight: (
        layout.transpose_kernel(path, weight)
        if self.has_transposed_kernels
        else weight
      )
    )
    return self.laid_out(read, model)

  def numerics(
    self, config: engine_config.EngineConfig, device: jax.Device
  ) -> dict[str, str]:
    """Returns what decides the numbers of a step, beside the weights."""
    attend = self.execution.attend_cached
    return {
      'attention': _named(attend),
      'products': self.products.partition(':')[0],
      'ports': program_store.describe_ports(self.execution),
      'kv_dtype': jnp.dtype(self.kv_dtype).name,
      'numerics': config.numerics,
      **_devices(config, jax.process_count()),
      'jax': importlib.metadata.version('jax'),
      'jaxlib': importlib.metadata.version('jaxlib'),
      'device': device.device_kind,
      'xla_flags': os.environ.get('XLA_FLAGS', ''),
    }

  def bytes_per_token(self, model: model_config.ModelConfig) -> float:
    """Returns the bytes of the KV cache of one token, all layers.

    Those of `beside_bytes` are among them.
    """
    dtype = jnp.dtype(self.kv_dtype)
    vector = self.channels * dtype.itemsize
    if dtype.name in kv_cache.QUANTIZED:
      vector += 4  # the float32 scale of the vector
    num_vectors, _ = kv_cache.rows_and_width(model)
    return model.num_layers * num_vectors * vector + self.beside_bytes


def _named(port: Any) -> str:
  """Returns the name of a port: of a function, or of the class of another."""
  named = port if hasattr(port, '__qualname__') else type(port)
  return f'{named.__module__}.{named.__qualname__}'


def choose(
  config: engine_config.EngineConfig,
  model: model_config.ModelConfig,
  dtype: Any,
  platform: str,
) -> Backend:
  """Returns the backend of a model on 'cpu', 'gpu' or 'tpu'.

  Plain JAX attends on every platform. TPU and GPU have kernels that read keys
  and values from their pages without gathering them; `attention='auto'` takes
  the kernel if `models/attention/supports.py` says that it accepts the model.
  A CPU has native code, which `Backend.multiplying` takes beside native
  products. Invariant numerics have their own attention.

  Raises:
    ValueError: `attention` asks for a kernel that the platform lacks or that
      does not accept the model, or no path accepts the model.
  """
  _, width = kv_cache.rows_and_width(model)
  kv_dtype = _kv_dtype(config, dtype)
  if platform == 'cpu' and kv_dtype == jnp.bfloat16:
    kv_dtype = kv_cache.BFLOAT16_BITS
  backend = Backend(
    execution_lib.Execution(),
    width,
    kv_dtype,
    # Invariant products are loops, before which XLA would transpose.
    platform == 'cpu'
    and dtype == jnp.bfloat16
    and config.numerics == 'fast'
    and processor.has_bfloat16_tiles(),
  )
  path = supports.PAGED
  if config.numerics == 'invariant':
    if config.attention == 'kernel':
      raise ValueError(
        "engine.attention: got 'kernel' with invariant numerics, expected"
        " 'auto'; kernels choose their shapes themselves"
      )
    path = supports.INVARIANT
    backend = backend._replace(execution=invariant.execution())
  elif config.attention != 'reference':
    refusal = (
      f'got platform {platform!r}, expected one of {", ".join(_KERNELS)}; set'
      ' engine.attention = auto'
    )
    if platform in _KERNELS:
      kernel = _KERNELS[platform]
      # On TPU, heads narrower than a register take a register's memory anyway.
      channels = max(width, kernel.page_width)
      request = _request(config, model, dtype, channels)
      request = dataclasses.replace(request, platform=platform)
      refusal = supports.problem(kernel, request)
      if platform == 'cpu':
        refusal = refusal or _native_refusal(config)
        backend = backend._replace(may_attend_natively=not refusal)
      elif not refusal:
        # Here: they import Pallas, without which a CPU starts sooner.
        if platform == 'tpu':
          from models.attention.kernels import paged_tpu as port
        else:
          from models.attention.kernels import paged_gpu as port
        return Backend(
          execution_lib.Execution(attend_cached=port.attend),
          channels,
          kv_dtype,
        )
    if config.attention == 'kernel' and refusal:
      raise ValueError(f"engine.attention: got 'kernel', but {refusal}")
  if refusal := supports.problem(path, _request(config, model, dtype, width)):
    raise ValueError(f'{path.name}: {refusal}')
  if platform == 'cpu' and dtype == jnp.bfloat16:
    backend = backend._replace(
      execution=dataclasses.replace(
        backend.execution, look_up=table.look_up_in_loop
      )
    )
  return backend


def _native_refusal(config: engine_config.EngineConfig) -> str:
  """Returns why a config has no native attention, '' if it may have it."""
  if config.native == 'off':
    return 'engine.native is off; set engine.native = auto'
  if config.num_parts > 1:
    return (
      f'got {config.num_parts} devices that share the model, expected 1; set'
      ' engine.attention = auto'
    )
  return ''


def _devices(
  config: engine_config.EngineConfig, num_processes: int
) -> dict[str, str]:
  """Returns what decides the order of sums over devices; nothing for one."""
  if config.num_parts == 1:
    return {}
  if config.numerics == 'invariant':  # however many devices share the parts
    found = {'tensor_parts': str(config.num_parts)}
  else:
    found = {'tensor': str(config.tensor)}
    if num_processes > 1:  # their sums are made in another order
      found['processes'] = str(num_processes)
  if config.experts > 1:
    found['experts'] = str(config.experts)
  return found


def _kv_dtype(config: engine_config.EngineConfig, dtype: Any) -> Any:
  """Returns the dtype of pages."""
  own = {'int8': kv_cache.INT8, 'fp8': kv_cache.FP8_BITS}
  return own.get(config.kv_dtype, dtype)


def _request(
  config: engine_config.EngineConfig,
  model: model_config.ModelConfig,
  dtype: Any,
  channels: int,
) -> supports.Request:
  """Returns the request of the largest step, for the table of attention."""
  of_model = supports.of_model(model)
  return dataclasses.replace(
    supports.of_call(
      *_largest_step(config, model, dtype, channels), of_model.form
    ),
    latent_width=model.latent_width,
  )


def _largest_step(
  config: engine_config.EngineConfig,
  model: model_config.ModelConfig,
  dtype: Any,
  channels: int,
) -> tuple[Any, kv_cache.PagedLayer]:
  """Returns the shapes of queries and cache of the largest step."""
  decodes = config.max_sequences
  chunks = config.max_mixed_chunks
  context = config.context(model.max_length)
  size, width = config.page_tokens(context), config.table_width(context)
  kv_dtype = _kv_dtype(config, dtype)

  def shapes():
    (pool, *_) = kv_cache.init_pages(
      model, num_pages=2, page_size=size, dtype=kv_dtype, channels=channels
    )
    tokens = decodes + chunks * config.chunk_tokens
    heads = model.num_heads, model.head_width
    return jnp.zeros((1, tokens, *heads), dtype), kv_cache.PagedLayer(
      pool,
      jnp.zeros((decodes, width), jnp.int32),
      jnp.zeros((chunks, width), jnp.int32),
    )

  return jax.eval_shape(shapes)
