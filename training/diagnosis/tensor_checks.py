"""Records of every tensor that a function computes.

    watch = Watch(fn)
    out, record = jax.jit(watch)(*args)      # record: small arrays
    for tensor in watch.tensors(record): ... # in the order of the computation

`fn` is traced to its jaxpr. The jaxpr is evaluated operation by operation,
inside the same jit and on the same devices as `fn` would be. The record holds
one number for every float result: its largest magnitude, which is not finite if
any value is not. Loops and inlined calls are entered: a scan over layers gives
a record of each layer. The backward pass is part of the jaxpr of a train step,
and so it is recorded, too. Conditionals, `while` and kernels are recorded by
their results only. Names come from the scopes that Flax modules open.

This file depends on jaxprs (`jax.extend.core`): look here first if a new
version of jax breaks diagnosis.
"""

from collections.abc import Callable, Iterator
import dataclasses
import math
from typing import Any

import jax
from jax.extend import core
import jax.numpy as jnp
import numpy as np

# Calls that are entered, and the parameter that holds their jaxpr.
_CALLS = {
  'jit': 'jaxpr',
  'pjit': 'jaxpr',
  'closed_call': 'call_jaxpr',
  'core_call': 'call_jaxpr',
  'remat2': 'jaxpr',
  'checkpoint': 'jaxpr',
  'custom_jvp_call': 'call_jaxpr',
  'custom_vjp_call': 'call_jaxpr',
}
# Operations whose result keeps the name of their input.
_RENAMES = (
  'broadcast_in_dim', 'convert_element_type', 'copy', 'reshape',
  'sharding_constraint', 'squeeze', 'transpose',
)  # fmt: skip

Key = tuple[int, ...]  # the place of an operation: an index per nested jaxpr


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sight:
  """The record of one tensor."""

  name: str  # of an argument of the function; '' if it was computed
  shape: tuple[int, ...]
  dtype: str
  largest: float  # magnitude; not finite if any value is not finite

  @property
  def is_finite(self) -> bool:
    """Returns whether all values are finite."""
    return math.isfinite(self.largest)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Computed:
  """One operation, in one iteration of every loop around it."""

  key: Key
  operation: str
  scope: str  # jax's name stack, including the scopes of the loops around it
  loops: tuple[tuple[str, int], ...]  # scope and iteration of each loop
  inputs: tuple[Sight, ...]
  outputs: tuple[Sight, ...]

  @property
  def is_finite(self) -> bool:
    """Returns whether all results are finite."""
    return all(sight.is_finite for sight in self.outputs)


class Watch:
  """A function whose tensors are recorded. Trace it once."""

  def __init__(self, fn: Callable[..., Any], names: Any = ()):
    """Wraps a function.

    Args:
      fn: a function of arrays.
      names: names of the leaves of its arguments, flat, for `Sight.name`.
    """
    self._fn = fn
    self._names = tuple(names)
    self._jaxpr: Any = None

  def __call__(self, *args: Any) -> tuple[Any, Any]:
    """Returns the function's result, and the record."""
    return self._run(_seen, args)

  def close_up(
    self, key: Key, look: Callable[[list[jax.Array]], Any]
  ) -> Callable[..., Any]:
    """Returns a function of the same arguments that inspects one operation.

    It returns `look(float results of the operation)`, stacked over the loops
    around it.
    """

    def look_there(at, values):
      if at != key:
        return []
      return look([jnp.asarray(x) for x in values if is_float(x)])

    def run(*args):
      return _at(self._run(look_there, args)[1], key)

    return run

  def tensors(self, record: Any) -> Iterator[Computed]:
    """Yields the operations in order; `record` lies on the host."""
    closed = self._jaxpr
    names = dict(zip(closed.jaxpr.invars, self._names, strict=False))
    yield from _walk(closed.jaxpr, record, names, _Place())

  def _run(self, look, args):
    closed, shapes = jax.make_jaxpr(self._fn, return_shape=True)(*args)
    self._jaxpr = closed
    leaves = [*closed.consts, *jax.tree.leaves(args)]
    outs, record = _evaluate(closed.jaxpr, leaves, look, ())
    return jax.tree.unflatten(jax.tree.structure(shapes), outs), record


def _evaluate(jaxpr, values, look, key):
  """Returns (results, record) of a jaxpr, whose constants come first."""
  env = dict(zip((*jaxpr.constvars, *jaxpr.invars), values, strict=True))

  def read(atom):
    return atom.val if isinstance(atom, core.Literal) else env[atom]

  record: list[Any] = [look((*key, -1), [env[v] for v in jaxpr.invars])]
  for index, eqn in enumerate(jaxpr.eqns):
    at = (*key, index)
    inputs = [read(atom) for atom in eqn.invars]
    if eqn.primitive.name == 'scan':
      outs, inside = _scan(eqn, inputs, look, at)
      seen = [look((*at, -1), outs), inside]
    elif (body := _body(eqn)) is not None:
      if eqn.params.get('differentiated') and eqn.params.get('prevent_cse'):
        # The backward pass computes this a second time. Without a barrier the
        # compiler would keep the first results instead, and their memory.
        inputs = jax.lax.optimization_barrier(inputs)
      outs, inside = _evaluate(body[0], [*body[1], *inputs], look, at)
      seen = [look((*at, -1), outs), inside]
    else:
      params = eqn.primitive.get_bind_params(eqn.params)
      with eqn.ctx.manager:
        outs = eqn.primitive.bind(*inputs, **params)
      outs = outs if eqn.primitive.multiple_results else [outs]
      seen = look(at, outs)
    env.update(zip(eqn.outvars, outs, strict=True))
    record.append(seen)
  return [read(atom) for atom in jaxpr.outvars], record


def _scan(eqn, inputs, look, at):
  params = eqn.params
  body = params['jaxpr']
  num_consts, num_carry = _scan_counts(eqn)
  consts = inputs[:num_consts]

  def step(carry, xs):
    outs, seen = _evaluate(
      body.jaxpr, [*body.consts, *consts, *carry, *xs], look, at
    )
    return outs[:num_carry], (outs[num_carry:], seen)

  carry, (ys, seen) = jax.lax.scan(
    step,
    inputs[num_consts : num_consts + num_carry],
    inputs[num_consts + num_carry :],
    length=params['length'],
    reverse=params['reverse'],
    unroll=params['unroll'],
  )
  return [*carry, *ys], seen


def _scan_counts(eqn) -> tuple[int, int]:
  """Returns the numbers of constants and of carried values of a scan.

  Derived from the numbers of axes: a scanned value has one more axis outside of
  the body. The parameters with the numbers are named differently in each
  version of jax.
  """
  body = eqn.params['jaxpr'].jaxpr
  num_scanned, num_carry = (
    sum(a.aval.ndim - b.aval.ndim == more for a, b in zip(*both, strict=True))
    for both, more in (
      ((eqn.invars, body.invars), 1),
      ((eqn.outvars, body.outvars), 0),
    )
  )
  return len(eqn.invars) - num_scanned - num_carry, num_carry


def _body(eqn):
  """Returns (jaxpr, constants) of a call that is entered."""
  name = _CALLS.get(eqn.primitive.name)
  if name is None:
    return None
  jaxpr = eqn.params[name]
  if isinstance(jaxpr, core.ClosedJaxpr):
    return jaxpr.jaxpr, jaxpr.consts
  return jaxpr, ()


def _seen(at, values):
  del at
  return [summary(x) for x in values if is_float(x)]


def summary(x: jax.Array) -> jax.Array:
  """Returns the largest magnitude; not finite if any value is not finite."""
  x = jnp.asarray(x)  # a jaxpr's literals are plain numbers
  if not x.size:
    return jnp.zeros(())
  axes = tuple(range(x.ndim))
  return jax.lax.reduce_max(jax.lax.abs(x), axes).astype(jnp.float32)


def is_float(x: Any) -> bool:
  """Returns whether an array, or its abstract value, can hold NaN."""
  return hasattr(x, 'dtype') and jnp.issubdtype(x.dtype, jnp.floating)


@dataclasses.dataclass(frozen=True)
class _Place:
  """The place of a nested jaxpr, and of its part of the record."""

  key: Key = ()
  scope: str = ''
  loops: tuple[tuple[str, int], ...] = ()

  def read(self, stats) -> np.ndarray:
    return np.asarray(stats)[tuple(index for _, index in self.loops)]


def _walk(jaxpr, record, names, place) -> Iterator[Computed]:
  """Yields the operations of a jaxpr, whose inputs have `names`."""
  names = dict(names)
  sights = _sights(jaxpr.invars, record[0], names, place)
  for index, (eqn, entry) in enumerate(
    zip(jaxpr.eqns, record[1:], strict=True)
  ):
    scope = _join(place.scope, str(eqn.source_info.name_stack))
    inner = _Place((*place.key, index), scope, place.loops)
    given = [
      '' if isinstance(a, core.Literal) else names.get(a, '')
      for a in eqn.invars
    ]
    if eqn.primitive.name == 'scan':
      yield from _walk_scan(eqn, entry[1], given, inner)
      sights |= _sights(eqn.outvars, entry[0], names, inner)
    elif (body := _body(eqn)) is not None:
      inputs = dict(zip(body[0].invars, given, strict=True))
      yield from _walk(body[0], entry[1], inputs, inner)
      sights |= _sights(eqn.outvars, entry[0], names, inner)
    else:
      if eqn.primitive.name in _RENAMES:
        names[eqn.outvars[0]] = given[0]
      sights |= _sights(eqn.outvars, entry, names, inner)
      yield Computed(
        key=inner.key,
        operation=eqn.primitive.name,
        scope=scope,
        loops=place.loops,
        inputs=tuple(
          sights[a]
          for a in eqn.invars
          if not isinstance(a, core.Literal) and a in sights
        ),
        outputs=tuple(sights[v] for v in eqn.outvars if v in sights),
      )


def _walk_scan(eqn, record, names, place):
  length = eqn.params['length']
  order = range(length)
  body = eqn.params['jaxpr'].jaxpr
  # A carried value is the named argument in the first iteration only.
  start, num_carry = _scan_counts(eqn)
  stop = start + num_carry
  names = [*names[:start], *[''] * (stop - start), *names[stop:]]
  inputs = dict(zip(body.invars, names, strict=True))
  for index in reversed(order) if eqn.params['reverse'] else order:
    loops = (*place.loops, (place.scope, index))
    yield from _walk(
      body, record, inputs, _Place(place.key, place.scope, loops)
    )


def _sights(variables, stats, names, place):
  """Joins float variables to their records."""
  floats = [v for v in variables if is_float(v.aval)]
  sights = {}
  for variable, stat in zip(floats, stats, strict=True):
    sights[variable] = Sight(
      name=names.get(variable, ''),
      shape=variable.aval.shape,
      dtype=variable.aval.dtype.name,
      largest=float(place.read(stat)),
    )
  return sights


def _at(record, key):
  """Returns the part of a record that belongs to one operation."""
  *calls, last = key
  for index in calls:
    record = record[index + 1][-1]
  return record[last + 1]


def _join(outer: str, inner: str) -> str:
  return f'{outer}/{inner}' if outer and inner else outer or inner
