"""Programs compiled for devices that are not here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hardware import targets
from models import execution, kv_cache, model_config, transformer

_COMPILERS = {'h100': 'jax_plugins.xla_cuda13'}  # all others are TPUs


def compile(target: str, f, *args, **options):
  """Compiles `jax.jit(f, **options)` for a target, such as v5e:1x1."""
  pytest.importorskip(
    _COMPILERS.get(target.split(':')[0], 'libtpu'),
    reason='needs requirements-plan.txt',
  )
  targets.prepare_environment()
  mesh = jax.sharding.Mesh(
    np.array(targets.devices(targets.parse(target))), ('data',)
  )
  sharding = jax.NamedSharding(mesh, jax.P())
  args = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args
  )
  with jax.set_mesh(mesh):
    return jax.jit(f, **options).lower(*args).compile()


def check_pages_are_updated_in_place(
  target: str,
  config: model_config.ModelConfig,
  attend_cached: execution.AttendCached,
  positions_1T: jax.ShapeDtypeStruct,
  tables: tuple[jax.ShapeDtypeStruct, ...],
  *,
  num_pages: int,
):
  """Compiles a model over pages; returns the compiled program."""
  model = transformer.Transformer(
    config, jnp.bfloat16, execution.Execution(attend_cached=attend_cached)
  )

  def step(params, pools, tables, tokens_1T, positions_1T):
    cache = tuple(kv_cache.PagedLayer(pool, *tables) for pool in pools)
    hidden_1TD, cache = model.apply(
      params, tokens_1T, positions_1T, cache, method='hidden'
    )
    return hidden_1TD, tuple(layer.pages for layer in cache)

  params = jax.eval_shape(model.init, jax.random.key(0), positions_1T)
  pools = jax.eval_shape(
    functools.partial(
      kv_cache.init_pages,
      config,
      num_pages=num_pages,
      page_size=16,
      dtype=jnp.bfloat16,
    )
  )
  args = params, pools, tables, positions_1T, positions_1T
  compiled = compile(target, step, *args, donate_argnums=1)
  memory = compiled.memory_analysis()
  pool_bytes = sum(pool.kv_PQYC.size * 2 for pool in pools)
  assert memory.alias_size_in_bytes == pool_bytes
  # Nothing is as large as one layer's pool: it is never copied.
  assert memory.temp_size_in_bytes < pool_bytes / config.num_layers
  return compiled
