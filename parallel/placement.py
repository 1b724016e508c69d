"""Runs a pure step across devices: `jit` over a mesh, or `pmap`.

Both take the same step and give the same numbers. A placement knows how a state
is created, laid out and taken back, and how a step is compiled; the loop and
the step know none of it. Steps are built from `build(all_sum, shard_key)`,
because under pmap sums and dropout keys must be told of the other devices,
while over a mesh the compiler sees the whole batch and inserts what is needed.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from parallel import config as config_lib, mesh as mesh_lib, rules

AllSum = Callable[[Any], Any]
ShardKey = Callable[[jax.Array], jax.Array]
BuildStep = Callable[[AllSum, ShardKey], Callable[..., Any]]

_PMAP_AXIS = 'data'


class Placement(Protocol):
  """How states and batches of a run lie on its devices."""

  @property
  def devices(self) -> Sequence[jax.Device]:
    """The devices that the run is spread over."""
    ...

  @property
  def num_batch_shards(self) -> int:
    """Into how many parts the rows of a batch are split."""
    ...

  def init(self, init_fn: Callable[[jax.Array], Any], key: jax.Array) -> Any:
    """Creates a state in place: no device ever holds more than its share."""
    ...

  def put_batch(self, batch: Any) -> Any:
    """Sends a batch of host arrays to the devices."""
    ...

  def compile_train(self, build: BuildStep) -> Callable[..., Any]:
    """Returns step(state, batch) -> (state, metrics). Donates `state`."""
    ...

  def compile_eval(self, build: BuildStep) -> Callable[..., Any]:
    """Returns eval_step(params, batch) -> sums."""
    ...

  def whole(self, state: Any) -> Any:
    """Returns the state as global arrays: what a checkpoint holds."""
    ...

  def restored(self, state: Any) -> Any:
    """The inverse of `whole`."""
    ...

  def abstract_whole(self) -> Any:
    """Returns shapes, dtypes and layout of `whole(state)`."""
    ...


def make(
  config: config_lib.ParallelConfig,
  abstract_state: Any,
  logical_axes: Any,
  devices: Sequence[jax.Device] | None = None,
) -> Placement:
  """Returns the placement that `config` asks for.

  Args:
    config: kind and axis sizes.
    abstract_state: shapes and dtypes of the state.
    logical_axes: the same tree with a tuple of axis names per leaf.
    devices: all devices if None.
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
  return MeshPlacement(
    mesh=mesh,
    abstract_state=abstract_state,
    state_shardings=rules.shardings(mesh, abstract_state, logical_axes),
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshPlacement:
  """`jit` with a NamedSharding for every array."""

  mesh: Mesh
  abstract_state: Any
  state_shardings: Any

  @property
  def devices(self) -> Sequence[jax.Device]:
    return list(self.mesh.devices.flat)

  @property
  def num_batch_shards(self) -> int:
    return self.mesh.shape['data'] * self.mesh.shape['fsdp']

  def init(self, init_fn, key):
    with rules.applied(self.mesh):
      return jax.jit(init_fn, out_shardings=self.state_shardings)(key)

  def put_batch(self, batch):
    return jax.device_put(batch, rules.batch_sharding(self.mesh))

  def compile_train(self, build):
    return self._compiled(
      build,
      donate_argnums=(0,),
      in_shardings=(
        self.state_shardings,
        rules.batch_sharding(self.mesh),
      ),
      out_shardings=(self.state_shardings, rules.replicated(self.mesh)),
    )

  def compile_eval(self, build):
    return self._compiled(
      build,
      in_shardings=(
        self.state_shardings.params,
        rules.batch_sharding(self.mesh),
      ),
      out_shardings=rules.replicated(self.mesh),
    )

  def whole(self, state):
    return state

  def restored(self, state):
    return state

  def abstract_whole(self):
    return jax.tree.map(
      lambda leaf, sharding: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=sharding
      ),
      self.abstract_state,
      self.state_shardings,
    )

  def _compiled(self, build, **jit_options):
    jitted = jax.jit(build(lambda tree: tree, lambda key: key), **jit_options)

    def run(*args):
      with rules.applied(self.mesh):
        return jitted(*args)

    return run


@dataclasses.dataclass(frozen=True, kw_only=True)
class PmapPlacement:
  """One replica per device; gradients are summed through an axis name."""

  devices: tuple[jax.Device, ...]
  abstract_state: Any

  @property
  def num_batch_shards(self) -> int:
    return len(self.devices)

  def init(self, init_fn, key):
    return self.restored(jax.jit(init_fn)(key))

  def put_batch(self, batch):
    return jax.tree.map(
      lambda x: x.reshape((len(self.devices), -1, *x.shape[1:])), batch
    )

  def compile_train(self, build):
    step = build(_psum, _fold_in_device)
    pmapped = jax.pmap(
      step, axis_name=_PMAP_AXIS, devices=self.devices, donate_argnums=(0,)
    )

    def run(state, batch):
      state, metrics = pmapped(state, batch)
      return state, _first(metrics)

    return run

  def compile_eval(self, build):
    pmapped = jax.pmap(
      build(_psum, _fold_in_device),
      axis_name=_PMAP_AXIS,
      devices=self.devices,
    )
    return lambda params, batch: _first(pmapped(params, batch))

  def whole(self, state):
    return _first(state)

  def restored(self, state):
    return jax.tree.map(
      lambda x: jnp.broadcast_to(x[None], (len(self.devices), *x.shape)),
      state,
    )

  def abstract_whole(self):
    sharding = jax.sharding.SingleDeviceSharding(self.devices[0])
    return jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=sharding
      ),
      self.abstract_state,
    )


def _psum(tree):
  return jax.lax.psum(tree, _PMAP_AXIS)


def _fold_in_device(key):
  return jax.random.fold_in(key, jax.lax.axis_index(_PMAP_AXIS))


def _first(tree):
  return jax.tree.map(lambda x: x[0], tree)
