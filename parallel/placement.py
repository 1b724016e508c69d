"""Placements: a state and a step on the devices of a run, by mesh or by pmap.

Both kinds take the same step and give the same numbers. A placement creates a
state, lays it out, gathers it for a checkpoint and compiles the steps; the loop
and the step know nothing of devices. Steps come from `build(all_sum,
shard_key)`: under pmap, sums and dropout keys have to include the other
devices. Over a mesh both functions are identities, because the compiler sees
the whole batch and inserts the collectives.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any, Protocol

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from parallel import mesh as mesh_lib, parallel_config, rules, stage_layout
from parallel.attention import context

AllSum = Callable[[Any], Any]  # sums a tree over the shards of a batch
ShardKey = Callable[[jax.Array], jax.Array]  # the key of this shard
BuildStep = Callable[[AllSum, ShardKey], Callable[..., Any]]

_PMAP_AXIS = 'data'


class Placement(Protocol):
  """The layout of states and batches on the devices of a run."""

  @property
  def devices(self) -> Sequence[jax.Device]:
    """The devices over which the run is spread."""
    ...

  @property
  def num_batch_shards(self) -> int:
    """The number of shards into which the rows of a batch are split."""
    ...

  def init(self, init_fn: Callable[[jax.Array], Any], key: jax.Array) -> Any:
    """Returns a new state, created in place on its devices.

    Over a mesh no device ever holds more than its own shards.
    """
    ...

  def put_batch(self, batch: Any) -> Any:
    """Returns a batch of host arrays [B, T] as arrays on the devices."""
    ...

  def compile_train(
    self, build: BuildStep, options: Mapping[str, Any] | None = None
  ) -> Callable[..., Any]:
    """Returns step(state, batch) -> (state, metrics). Donates `state`.

    Args:
      options: options of the compiler; pmap takes none.
    """
    ...

  def compile_eval(
    self, build: BuildStep, fields: Sequence[str] = ()
  ) -> Callable[..., Any]:
    """Returns eval_step(params, batch, *fields of the state) -> sums."""
    ...

  def compile_probe(self, build: BuildStep) -> Callable[..., Any]:
    """Returns probe(state, batch) -> small arrays. Donates nothing.

    `build` returns a function of a whole state. Each result gets one more axis
    in front: of size 1 over a mesh, with one entry per device under pmap.
    """
    ...

  def compile_weights(self, read: Callable[[Any], Any]) -> Callable[..., Any]:
    """Returns fn(state) -> a tree with the structure and layout of params."""
    ...

  def whole(self, state: Any) -> Any:
    """Returns the state as global arrays, in the layout of a checkpoint."""
    ...

  def restored(self, state: Any) -> Any:
    """Returns the placed state of a whole one: the inverse of `whole`."""
    ...

  def abstract_whole(self) -> Any:
    """Returns shapes, dtypes and shardings of `whole(state)`."""
    ...


def make(
  config: parallel_config.ParallelConfig,
  abstract_state: Any,
  logical_axes: Any,
  devices: Sequence[jax.Device] | None = None,
) -> Placement:
  """Returns the placement of `config`.

  Args:
    logical_axes: the same tree with a tuple of axis names per leaf.
    devices: all devices if None.

  Raises:
    ValueError: the sizes do not fit the devices, or the state the sizes.
  """
  devices = tuple(jax.devices() if devices is None else devices)
  if config.kind == 'pmap':
    if config.data not in (-1, len(devices)):
      raise ValueError(
        f'parallel.data: got {config.data} with kind=pmap, expected -1 or the'
        f' number of devices, {len(devices)}'
      )
    return PmapPlacement(devices=devices, abstract_state=abstract_state)
  mesh = mesh_lib.make_mesh(config, devices)
  folded = stage_layout.Fold(logical_axes, config.stage_repeats)
  return MeshPlacement(
    mesh=mesh,
    abstract_state=abstract_state,
    fold=folded,
    state_shardings=rules.shardings(
      mesh, jax.eval_shape(folded.fold, abstract_state), folded.logical_axes
    ),
    whole_shardings=rules.shardings(mesh, abstract_state, logical_axes),
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshPlacement:
  """`jit` with a NamedSharding for every array."""

  mesh: Mesh
  abstract_state: Any  # of a whole state, as in a checkpoint
  fold: stage_layout.Fold  # from whole to placed, for a circular pipeline
  state_shardings: Any  # of a placed state
  whole_shardings: Any  # of a whole state

  @property
  def devices(self) -> Sequence[jax.Device]:
    return list(self.mesh.devices.flat)

  @property
  def num_batch_shards(self) -> int:
    return rules.num_parts(self.mesh, rules.BATCH_AXES)

  def init(self, init_fn, key):
    init = jax.jit(
      lambda key: self.fold.fold(init_fn(key)),
      out_shardings=self.state_shardings,
    )
    with rules.applied(self.mesh):
      return init(key)

  def put_batch(self, batch):
    sharding = rules.batch_sharding(self.mesh)
    order_T = context.balanced_order(
      next(iter(batch.values())).shape[1], self.mesh.shape['context']
    )

    def put(x_BT):
      if order_T is not None:
        x_BT = x_BT[:, order_T]
      # Every process has the whole batch and sends its devices their shards.
      return jax.make_array_from_callback(
        x_BT.shape, sharding, lambda index: x_BT[index]
      )

    return jax.tree.map(put, batch)

  def compile_train(self, build, options=None):
    return self._compiled(
      build,
      compiler_options=dict(options) if options else None,
      donate_argnums=(0,),
      in_shardings=(self.state_shardings, rules.batch_sharding(self.mesh)),
      out_shardings=(self.state_shardings, rules.replicated(self.mesh)),
    )

  def compile_eval(self, build, fields=()):
    return self._compiled(
      build,
      in_shardings=(
        self.state_shardings.params,
        rules.batch_sharding(self.mesh),
        *(getattr(self.state_shardings, name) for name in fields),
      ),
      out_shardings=rules.replicated(self.mesh),
    )

  def compile_probe(self, build):
    def build_whole(all_sum, shard_key):
      probe = build(all_sum, shard_key)
      return lambda state, batch: jax.tree.map(
        lambda x: x[None], probe(self.fold.unfold(state), batch)
      )

    return self._compiled(
      build_whole,
      in_shardings=(self.state_shardings, rules.batch_sharding(self.mesh)),
      out_shardings=rules.replicated(self.mesh),
    )

  def compile_weights(self, read):
    return jax.jit(
      read,
      in_shardings=(self.state_shardings,),
      out_shardings=self.state_shardings.params,
    )

  def whole(self, state):
    if self.fold.is_identity:
      return state
    return jax.jit(self.fold.unfold, out_shardings=self.whole_shardings)(state)

  def restored(self, state):
    if self.fold.is_identity:
      return state
    return jax.jit(self.fold.fold, out_shardings=self.state_shardings)(state)

  def abstract_whole(self):
    return _abstract(self.abstract_state, self.whole_shardings)

  def lower_train(self, build, batch, options=None):
    """Returns the lowered train step, from shapes alone; allocates nothing."""
    placed = _abstract(
      jax.eval_shape(self.fold.fold, self.abstract_state), self.state_shardings
    )
    sharding = rules.batch_sharding(self.mesh)
    batch = _abstract(batch, jax.tree.map(lambda _: sharding, batch))
    return self.compile_train(build, options).lower(placed, batch)

  def _compiled(self, build, **jit_options):
    # Sums and keys cover the whole batch already: nothing to add or to split.
    step = jax.jit(build(lambda tree: tree, lambda key: key), **jit_options)
    return _UnderMesh(step, self.mesh)


class _UnderMesh:
  """A jitted function that is traced and called inside its mesh's context."""

  def __init__(self, step: Any, mesh: Mesh):
    self._step = step
    self._mesh = mesh

  def __call__(self, *args):
    with rules.applied(self._mesh):
      return self._step(*args)

  def lower(self, *args):
    with rules.applied(self._mesh):
      return self._step.lower(*args)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PmapPlacement:
  """`pmap` with one replica per device and sums through an axis name.

  With several processes, each process calls the step with the shards of its own
  devices and gets the results of these devices.
  """

  devices: tuple[jax.Device, ...]
  abstract_state: Any

  @property
  def num_batch_shards(self) -> int:
    return len(self.devices)

  def init(self, init_fn, key):
    return self.restored(jax.jit(init_fn)(key))

  def put_batch(self, batch):
    # Every process has the whole batch and sends its devices their shards.
    mine = [i for i, device in enumerate(self.devices) if _is_mine(device)]
    return jax.tree.map(
      lambda x: x.reshape((len(self.devices), -1, *x.shape[1:]))[mine], batch
    )

  def compile_train(self, build, options=None):
    del options
    step = build(_psum, _fold_in_device)
    pmapped = jax.pmap(
      step, axis_name=_PMAP_AXIS, devices=self.devices, donate_argnums=(0,)
    )

    def run(state, batch):
      state, metrics = pmapped(state, batch)
      return state, _first(metrics)

    return run

  def compile_eval(self, build, fields=()):
    del fields  # replicas are laid out alike
    pmapped = jax.pmap(
      build(_psum, _fold_in_device), axis_name=_PMAP_AXIS, devices=self.devices
    )
    return lambda *args: _first(pmapped(*args))

  def compile_probe(self, build):
    probe = build(_psum, _fold_in_device)
    pmapped = jax.pmap(
      lambda *args: jax.lax.all_gather(probe(*args), _PMAP_AXIS),
      axis_name=_PMAP_AXIS,
      devices=self.devices,
    )
    return lambda state, batch: _first(pmapped(state, batch))

  def compile_weights(self, read):
    return jax.pmap(read, axis_name=_PMAP_AXIS, devices=self.devices)

  def whole(self, state):
    state = _first(state)
    if self._is_alone:
      return state
    # One global array of all processes, replicated on every device.
    return multihost_utils.host_local_array_to_global_array(
      state, self._mesh, PartitionSpec()
    )

  def restored(self, state):
    mine = [device for device in self.devices if _is_mine(device)]
    if not self._is_alone:
      return jax.tree.map(
        lambda x: jnp.broadcast_to(
          x.addressable_data(0)[None], (len(mine), *x.shape)
        ),
        state,
      )
    # A restored array is committed to one device, which pmap would refuse.
    sharding = NamedSharding(self._mesh, PartitionSpec(_PMAP_AXIS))
    return jax.tree.map(
      lambda x: jax.make_array_from_single_device_arrays(
        (len(mine), *x.shape),
        sharding,
        [jax.device_put(x[None], device) for device in mine],
      ),
      state,
    )

  @property
  def _is_alone(self) -> bool:
    return all(map(_is_mine, self.devices))

  @property
  def _mesh(self) -> Mesh:
    return Mesh(np.array(self.devices), (_PMAP_AXIS,))

  def abstract_whole(self):
    sharding = (
      jax.sharding.SingleDeviceSharding(self.devices[0])
      if self._is_alone
      else NamedSharding(self._mesh, PartitionSpec())
    )
    return jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=sharding
      ),
      self.abstract_state,
    )


def _abstract(shapes, shardings):
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=sharding
    ),
    shapes,
    shardings,
  )


def _is_mine(device: jax.Device) -> bool:
  return device.process_index == jax.process_index()


def _psum(tree):
  return jax.lax.psum(tree, _PMAP_AXIS)


def _fold_in_device(key):
  return jax.random.fold_in(key, jax.lax.axis_index(_PMAP_AXIS))


def _first(tree):
  # From the first shard: indexing the global array would run a program on all
  # devices.
  return jax.tree.map(lambda x: x.addressable_data(0)[0], tree)
