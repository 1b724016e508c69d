"""The decode step of an engine, compiled for devices that are not here.

It is lowered as the engine lowers it: by the placement of `engine.spread` and
`engine.compiled.lowering`. So the plan shows the program that would run.
"""

from collections.abc import Sequence
import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from hardware import compile_ahead
from inference.engine import (
  adapter_table,
  device_state,
  engine_config,
  steps,
)
from inference.engine.compiled import layouts, lowering
from inference.engine.spread import placement as placement_lib
from inference.planning import subject as subject_lib
from models import axes, transformer

_Found = compile_ahead.Program | compile_ahead.OutOfMemory


def decode_step(
  subject: subject_lib.Subject,
  config: engine_config.EngineConfig,
  devices: Sequence[jax.Device],
) -> _Found:
  """Compiles the decode steps of sequences that fill the context.

  Args:
    subject: the model.
    config: of the engine; `tensor` devices share the model, and a batch has
      `max_sequences`.
    devices: of the target, at least `tensor`.

  Raises:
    ValueError: the engine refuses the model over so many devices.
  """
  model = dataclasses.replace(subject.config, scan_layers=False)
  dtype = jnp.dtype(subject.dtype)
  mesh = Mesh(np.array(devices[:1]), ('device',))
  alone = NamedSharding(mesh, PartitionSpec())

  def put(tree):
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=x.sharding or alone
      ),
      tree,
    )

  params = device_state.unread(put(subject.shapes()))
  placement = placement_lib.make(
    config, model, params, vocab_size=model.vocab_size, devices=devices
  )
  if isinstance(placement, placement_lib.Spread):
    mesh = placement.mesh
  served = placement.model
  backend = placement_lib.backend_of(placement, config, params, dtype)
  tokens = config.page_tokens(served.max_length)
  per_sequence = -(-served.max_length // tokens)
  computed = transformer.Transformer(served, dtype, backend.execution)
  count = config.max_sequences
  state = placement.state_shapes(
    computed,
    num_slots=count,
    num_pages=count * per_sequence + 1,
    page_size=tokens,
    kv_dtype=backend.kv_dtype,
    channels=backend.channels,
  )
  weights = placement.shapes(backend, params)
  if config.max_adapters:
    table = adapter_table.shapes(
      params.shapes,
      num_adapters=config.max_adapters,
      rank=config.max_adapter_rank or 0,
      dtype=dtype,
      places=placement.adapters,
    )
    weights = {**weights, axes.ADAPTERS: table}
  lowered = lowering.Lowering(
    model=computed,
    params=put(weights),
    state=put(state),
    layouts=layouts.Layouts(
      chunk_tokens=config.chunk_tokens,
      table_width=config.table_width(served.max_length),
      sample_sizes=[count],
      has_adapters=bool(config.max_adapters),
      is_layered=False,
    ),
    placement=placement,
    vocab_size=model.vocab_size,
    context=served.max_length,
    decode_steps=config.decode_steps,
  )
  with jax.set_mesh(mesh):
    return compile_ahead.compile(lowered.lowered(steps.Shape(count, 0)))
