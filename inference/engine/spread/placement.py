"""The placement of an engine: one device, or several that share its model.

Both kinds have the same methods, so that the engine and its programs know no
mesh. Over several devices each program of `compiled` runs inside
`jax.shard_map`: every device runs it on its own parts of weights and pages, see
`spread.layout` and `parallel.tensor.ports`. The host plans once, for all.
"""

from collections.abc import Sequence
import dataclasses
import functools
import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from frozen import format as frozen_format
from hardware import compilation_cache
from inference.engine import (
  adapter_table,
  device_state,
  engine_config,
  execution,
)
from inference.engine.compiled import lowering
from inference.engine.spread import (
  adapters as adapters_lib,
  layout as layout_lib,
  refusals,
  results,
  stored as stored_lib,
)
from models import axes, layout as model_layout, model_config, transformer
from models.linear.stored import tree as stored_tree
from parallel import mesh as mesh_lib, parallel_config, rules
from parallel.tensor import by_part, ports


class Placement(lowering.Placement, Protocol):
  """The devices of an engine, and what each holds."""

  @property
  def num_devices(self) -> int:
    """The number of devices."""
    ...

  @property
  def model(self) -> model_config.ModelConfig:
    """The config of the model that a device computes."""
    ...

  def backend(self, backend: execution.Backend) -> execution.Backend:
    """Returns the backend of a device."""
    ...

  def num_bytes(self, params: device_state.Unread) -> int:
    """Returns the bytes of the weights on a device."""
    ...

  def shapes(
    self, backend: execution.Backend, params: device_state.Unread
  ) -> device_state.Params:
    """Returns the shapes of the params of programs."""
    ...

  def read(
    self, backend: execution.Backend, params: device_state.Unread
  ) -> device_state.Params:
    """Reads params, and returns those of programs."""
    ...

  @property
  def adapters(self) -> adapter_table.Places:
    """The devices of a table of adapters."""
    ...

  @property
  def all_model(self) -> model_config.ModelConfig:
    """The config of the model that the params of all devices belong to."""
    ...

  def of_model(self, params: device_state.Params) -> device_state.Params:
    """Returns params of programs as those of the model.

    Leaves are arrays of the host, or become such one by one, when NumPy asks.
    """
    ...

  @property
  def num_ids(self) -> int:
    """V, ids that may be sampled; `vocab_size` counts those of a device."""
    ...

  def copied(self, tree: Any) -> Any:
    """Returns arrays of which every device has a copy."""
    ...

  def lower_drafts(
    self, function: Any, *args: Any, form: results.Form, **static: Any
  ) -> Any:
    """Returns a jitted function of drafts, traced; `form` is of devices."""
    ...

  def state(
    self, model: transformer.Transformer, **sizes: Any
  ) -> device_state.State:
    """Returns the state of an engine without sequences."""
    ...

  def state_shapes(
    self, model: transformer.Transformer, **sizes: Any
  ) -> device_state.State:
    """Returns the shapes of `state`, without making it."""
    ...


@dataclasses.dataclass(frozen=True)
class OneDevice:
  """The placement of a model that one device holds."""

  device: jax.Device
  model: model_config.ModelConfig
  vocab_size: int
  num_devices = 1
  is_spread = False
  adapters = adapter_table.WHOLE

  def backend(self, backend):
    return backend

  def num_bytes(self, params):
    return params.num_bytes

  def shapes(self, backend, params):
    return backend.shapes(params, self.model)

  def read(self, backend, params):
    return backend.read(params, self.model)

  @property
  def all_model(self):
    return self.model

  def of_model(self, params):
    return model_layout.host_kernels(params)

  def state(self, model, **sizes):
    return device_state.init_state(model, vocab_size=self.vocab_size, **sizes)

  def state_shapes(self, model, **sizes):
    return jax.eval_shape(lambda: self.state(model, **sizes))

  def logits(self, *rows):
    return jax.ShapeDtypeStruct((*rows, self.vocab_size), jnp.float32)

  def lower(self, function, *args, **static):
    return function.lower(*args, **static)

  @property
  def num_ids(self) -> int:
    return self.vocab_size

  def copied(self, tree):
    return tree

  def lower_drafts(self, function, *args, form, **static):
    del form
    return function.lower(*args, **static)


@dataclasses.dataclass(frozen=True)
class Spread:
  """The placement of a model of which each device holds some parts."""

  mesh: Mesh
  layout: layout_lib.Layout
  shapes_of_model: Any  # of its params, with separate layers
  is_invariant: bool
  keeps_hidden: bool = False  # in pages, see `device_state.init_state`
  is_spread = True

  @property
  def num_devices(self) -> int:
    return self.mesh.size

  @property
  def device(self) -> jax.Device:
    # Of this process: the mesh may have devices of several, or none that are
    # here, for a plan.
    devices, index = self.mesh.devices.flat, jax.process_index()
    return next((x for x in devices if x.process_index == index), devices[0])

  @property
  def model(self) -> model_config.ModelConfig:
    return self.layout.config(self.layout.num_parts // self.num_devices)

  @property
  def vocab_size(self) -> int:
    return self.model.vocab_size

  def backend(self, backend):
    given, num = backend.execution, self.layout.num_parts
    spread = dataclasses.replace(
      given,
      look_up=ports.LookUp(given.look_up, self.model.vocab_size),
      masked=ports.Masked(given.masked),
      expert_groups=self.mesh.shape[ports.EXPERT],
    )
    heads, width = self.layout.heads, self.layout.model.head_width
    mean_square = ports.HeadsMeanSquare(
      heads.num_heads * width, heads.num_kv_heads * heads.copies * width
    )
    if self.is_invariant:
      spread = dataclasses.replace(
        spread,
        heads_mean_square=by_part.HeadsMeanSquare(
          given.by_row, mean_square, num
        ),
        linear=by_part.Linear(given.linear, num),
        shared=given.linear,
        by_head=by_part.ByHead(num),
        joined=by_part.Joined(given.linear, num),
        unembed=by_part.Unembed(given.unembed, num),
        attend_cached=by_part.AttendCached(given.attend_cached, num),
        apply_experts=by_part.Experts(
          given.apply_experts,
          given.linear,
          num,
          self.layout.num_expert_groups,
        ),
      )
    else:
      spread = dataclasses.replace(
        spread,
        heads_mean_square=mean_square,
        joined=ports.Joined(given.linear),
        apply_experts=ports.Experts(given.apply_experts, given.linear),
      )
    # Transposed kernels would have no logical axes.
    return backend._replace(
      execution=spread,
      has_transposed_kernels=False,
      products=stored_lib.described(self.layout, self.shapes_of_model)
      or backend.products,
    )

  def num_bytes(self, params):
    return sum(
      math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
      for leaf in jax.tree.leaves(self.shapes(None, params))
    )

  def shapes(self, backend, params):
    del backend

    def placed(path, leaf):
      if stored_tree.is_stored(leaf):
        return stored_lib.cut(self.layout, path, leaf).shapes(self.mesh)
      names = self.layout.names_of(path, leaf)
      shape = {'/'.join(axes.names(path)): self.layout.shape(leaf, names)}
      sharding = rules.shardings(
        self.mesh, shape, dict.fromkeys(shape, names), rules.SERVING
      )
      return jax.tree.map(_lying, shape, sharding).popitem()[1]

    return jax.tree_util.tree_map_with_path(
      placed,
      layout_lib.separate(params.shapes, self.layout.model),
      is_leaf=stored_tree.is_stored,
    )

  def read(self, backend, params):
    del backend
    shapes = layout_lib.separate(params.shapes, self.layout.model)
    cuts = stored_lib.cuts(self.layout, shapes)
    wanted = frozen_format.leaves_by_path(self.shapes(None, params))
    named = {
      '/'.join(axes.names(path)): self.layout.names_of(path, leaf)
      for path, leaf in jax.tree_util.tree_leaves_with_path(
        shapes, is_leaf=stored_tree.is_stored
      )
    }

    def placed(path: str, weight: Any) -> Any:
      """Returns a weight on its devices; of a stack, that of each layer."""
      weight = np.asarray(weight)
      stack, layer = f'/{axes.LAYERS}/', '/layer_{}/'
      if stack not in path:
        return put(path, weight)
      return [
        put(path.replace(stack, layer.format(n)), each)
        for n, each in enumerate(weight)
      ]

    def put(path: str, weight: np.ndarray) -> jax.Array:
      above, _, name = path.rpartition('/')
      if above in cuts:
        weight, sharding = cuts[above].laid_out(name, weight, self.mesh)
      else:
        weight = self.layout.laid_out(weight, named[path])
        sharding = wanted[path].sharding

      def part(index: Any) -> np.ndarray:
        found = weight[index]
        # An array of a CPU device may be a view: a part would keep the whole.
        is_view = self.device.platform == 'cpu' and found.size < weight.size
        return found.copy() if is_view else found

      # Each device gets its part: no device ever holds a whole weight.
      return jax.make_array_from_callback(weight.shape, sharding, part)

    read = params.read(placed)
    read = {name: layout_lib.unstacked(tree) for name, tree in read.items()}

    def served(path, leaf):
      own = cuts.get('/'.join(axes.names(path)))
      return own.served(leaf, self.mesh) if own else leaf

    return jax.tree_util.tree_map_with_path(
      served, read, is_leaf=stored_tree.is_stored
    )

  @property
  def adapters(self):
    return adapters_lib.Places(self.mesh, self.layout)

  @property
  def all_model(self):
    return self.layout.config(self.layout.num_parts)

  def of_model(self, params):

    def lazily(path, like, leaf):
      if stored_tree.is_stored(like):
        cut = stored_lib.cut(self.layout, path, like)
        return cut.of_model(leaf, layout_lib.OfModel)
      names = self.layout.names_of(path, like)
      return layout_lib.OfModel(
        leaf,
        like.shape,
        lambda weight: self.layout.of_model(weight, names, like.shape),
      )

    return jax.tree_util.tree_map_with_path(
      lazily, self.shapes_of_model, params, is_leaf=stored_tree.is_stored
    )

  def state(self, model, **sizes):
    init, shardings = self._init(model, sizes)
    return jax.jit(init, out_shardings=shardings)()

  def state_shapes(self, model, **sizes):
    init, shardings = self._init(model, sizes)
    shapes = jax.eval_shape(init)
    return jax.tree.map(_lying, shapes, jax.tree.broadcast(shardings, shapes))

  def _init(self, model, sizes: dict[str, Any]) -> tuple[Any, Any]:
    """Returns a function that makes the state, and its shardings."""
    del model
    whole = transformer.Transformer(self.all_model)

    def init():
      vocab_size = whole.config.vocab_size
      return device_state.init_state(whole, vocab_size=vocab_size, **sizes)

    shardings = jax.tree.map(
      lambda spec: NamedSharding(self.mesh, spec),
      results.state(whole.config, self.keeps_hidden),
      is_leaf=lambda x: isinstance(x, PartitionSpec),
    )
    return init, shardings

  def logits(self, *rows):
    spec = PartitionSpec(*[None] * len(rows), ports.AXIS)
    return jax.ShapeDtypeStruct(
      (*rows, self.vocab_size * self.num_devices),
      jnp.float32,
      sharding=NamedSharding(self.mesh, spec),
    )

  def lower(self, function, *args, **static):
    form = results.forms(self.model, self.keeps_hidden)[function]
    return self.lower_drafts(function, *args, form=form, **static)

  @property
  def num_ids(self) -> int:
    return self.layout.vocab_size

  def copied(self, tree):
    # Devices of other processes get their copies there. `jax.device_put` onto
    # all would send each array once more, to compare those of all processes.
    sharding = rules.replicated(self.mesh)
    own = sharding.addressable_devices

    def copied(leaf):
      copies = [jax.device_put(leaf, device) for device in own]
      return jax.make_array_from_single_device_arrays(
        leaf.shape, sharding, copies
      )

    return jax.tree.map(copied, tree)

  def lower_drafts(self, function, *args, form, **static):
    given = jax.tree.map(self._abstract, args)
    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, given)
    spread = jax.shard_map(
      functools.partial(function, **static),
      mesh=self.mesh,
      in_specs=specs,
      out_specs=specs[0] if form.results is None else form.results,
      # Results that all devices have alike are so by what they compute.
      check_vma=False,
    )
    return jax.jit(spread, donate_argnums=form.donated).lower(*given)

  def _abstract(self, leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, 'sharding', None)
    if not isinstance(sharding, NamedSharding):
      sharding = rules.replicated(self.mesh)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def make(
  config: engine_config.EngineConfig,
  model: model_config.ModelConfig,
  params: device_state.Unread,
  devices: Sequence[jax.Device] | None = None,
  *,
  vocab_size: int,
) -> Placement:
  """Returns the placement of a model.

  Args:
    config: of the engine.
    model: with separate layers.
    params: of the model.
    devices: of the engine; None: the first ones of this process.
    vocab_size: V, ids that may be sampled.

  Raises:
    ValueError: there are too few devices, or something of the config or of the
      model works on one device only.
  """
  if config.num_parts == 1:
    return OneDevice(params.device, model, vocab_size)
  if devices is None:
    devices = jax.local_devices()
  if len(devices) < config.tensor:
    raise ValueError(
      f'engine.tensor: got {config.tensor}, expected at most the number of'
      f' devices, {len(devices)}; lower it'
    )
  refusals.check(config, model)
  # JAX may have a cache by its own variable: a replica that read a program of
  # several CPU devices from it crashed in its first step.
  compilation_cache.leave_out_collectives()
  mesh = mesh_lib.make_mesh(
    parallel_config.ParallelConfig(
      expert=config.expert_groups,
      tensor=config.tensor // config.expert_groups,
    ),
    devices[: config.tensor],
  )
  layout = layout_lib.Layout(
    model=model,
    vocab_size=vocab_size,
    num_parts=config.num_parts,
    num_expert_groups=config.experts,
  )
  is_invariant = config.numerics == 'invariant'
  shapes = layout_lib.separate(params.shapes, model)
  keeps_hidden = config.speculation == 'head'
  return Spread(mesh, layout, shapes, is_invariant, keeps_hidden)


def backend_of(
  placement: Placement,
  config: engine_config.EngineConfig,
  params: device_state.Unread,
  dtype: Any,
) -> execution.Backend:
  """Returns the backend of a device of a placement.

  Raises:
    ValueError: the config asks for a path that does not accept the model.
  """
  platform = placement.device.platform
  chosen = execution.choose(config, placement.model, dtype, platform)
  chosen = chosen.multiplying(config, params.shapes, dtype, platform)
  return placement.backend(chosen)


def _lying(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
