"""The arrays and programs of an engine, made at the same time."""

from collections.abc import Callable
from concurrent import futures
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from inference.engine import device_state, engine_config, execution
from inference.engine.compiled import programs as programs_lib
from inference.engine.drafting import making
from inference.engine.spread import placement as placement_lib, pool as pool_lib
from models import transformer


class Loaded(NamedTuple):
  """What an engine computes with."""

  state: device_state.State
  programs: programs_lib.Programs
  params: device_state.Params  # as the programs take them
  compile_seconds: float


def load(
  placement: placement_lib.Placement,
  backend: execution.Backend,
  params: device_state.Unread,
  pool: pool_lib.Pool,
  *,
  config: engine_config.EngineConfig,
  dtype: Any,
  vocab_size: int,
  make: Callable[..., programs_lib.Programs] = programs_lib.Programs,
  beside: Callable[[device_state.Params], device_state.Params] = lambda x: x,
  draft: making.Source | None = None,
  compile_all: bool = True,
) -> Loaded:
  """Allocates the state, compiles the programs and reads the weights.

  Args:
    placement: the devices.
    backend: of a device.
    params: of the model.
    pool: the pages.
    config: of the engine.
    dtype: of the computation.
    vocab_size: V, ids that may be sampled.
    make: returns the programs.
    beside: adds the adapters to shapes of params.
    draft: the model or the head that drafts; its programs are compiled, too.
    compile_all: see `programs.Programs`.
  """
  model = transformer.Transformer(
    placement.model, jnp.dtype(dtype), backend.execution
  )
  sizes = pool.sizes(config, backend)

  def allocate() -> device_state.State:
    with jax.default_device(placement.device):
      return placement.state(model, **sizes)

  # Threads read the weights and clear the pages: programs need shapes alone.
  with (
    jax.default_device(placement.device),
    futures.ThreadPoolExecutor(2) as threads,
  ):
    reading = threads.submit(placement.read, backend, params)
    allocating = threads.submit(allocate)
    start = time.perf_counter()
    compiled = make(
      model=model,
      params=beside(placement.shapes(backend, params)),
      state=_shapes(placement, model, sizes),
      config=config,
      context=config.context(placement.model.max_length),
      vocab_size=vocab_size,
      placement=placement,
      compile_all=compile_all,
    )
    state = allocating.result()
    making.compile_now(
      draft, state, placement.shapes(backend, params), compiled, compile_all
    )
    seconds = time.perf_counter() - start
    made = Loaded(state, compiled, reading.result(), seconds)
    if draft:
      draft.use(made.params)
    return made


def _shapes(
  placement: placement_lib.Placement,
  model: transformer.Transformer,
  sizes: dict[str, Any],
) -> device_state.State:
  """Returns the shapes of the state, on the devices that it will have."""
  shapes = placement.state_shapes(model, **sizes)
  if placement.is_spread:
    return shapes
  sharding = jax.sharding.SingleDeviceSharding(placement.device)
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=sharding
    ),
    shapes,
  )
