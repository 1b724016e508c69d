"""The ports of a model in parts, with bits that no number of devices changes.

A model is cut into a fixed number of parts, and a device holds one part or
several. It computes its parts one by one, all in the same shapes, so that the
order of no sum within a part depends on the number of devices. Where parts are
added, devices exchange the terms of all parts, and each adds them in one fixed
order, a tree of pairs. So 1, 2, 4 and 8 devices compute the same bits.

The price: a sum of P terms is sent as P terms in place of one, and products are
P times as many, each a P-th as large.

Reference: Zhang et al., "Deterministic inference across tensor parallel sizes
that eliminates training-inference mismatch", arXiv:2511.17826: one binary tree
for the sums within a device and between devices, in kernels of their own.

The ports wrap those of `models.linear.invariant`, which take care of batches.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from parallel.tensor import ports


@dataclasses.dataclass(frozen=True)
class Linear:
  """The port `linear`: outputs are split over the parts."""

  linear: Callable[..., Any]
  num_parts: int  # of all devices

  def __call__(self, x, w_IO, bias_O, dtype):
    num = _num_here(self.num_parts)
    biases = [None] * num
    if bias_O is not None:
      biases = jnp.split(bias_O, num)
    return jnp.concatenate(
      [
        _apart(lambda x, w, b: self.linear(x, w, b, dtype), x, w_Ip, bias_p)
        for w_Ip, bias_p in zip(jnp.split(w_IO, num, 1), biases, strict=True)
      ],
      axis=-1,
    )

  def over_parts(self, of_part, x, w_IO, dtype, pair=None):
    """Returns the product of a kernel, stored or with an adapter."""
    product = functools.partial(of_part, self.linear)
    return _side_by_side(product, x, w_IO, pair, self.num_parts).astype(dtype)


@dataclasses.dataclass(frozen=True)
class Joined:
  """The port `joined`: inputs are split over the parts."""

  linear: Callable[..., Any]
  num_parts: int

  def __call__(self, x, w_IO, bias_O, dtype):
    num = _num_here(self.num_parts)
    terms = [
      _apart(lambda x, w: self.linear(x, w, None, dtype), x_p, w_pO)
      for x_p, w_pO in zip(
        jnp.split(x, num, -1), jnp.split(w_IO, num), strict=True
      )
    ]
    return ports.biased(_summed(terms, dtype), bias_O, dtype)

  def over_parts(self, of_part, x, w_IO, dtype, pair=None):
    """Returns the product of a kernel that is cut as one of floats."""
    num = _num_here(self.num_parts)
    pairs = [None] * num
    if pair is not None:
      a, b = pair
      pairs = [(a_p, b) for a_p in jnp.split(a, num)]
    parts = zip(jnp.split(x, num, -1), _split(w_IO, num, 0), pairs, strict=True)
    product = functools.partial(of_part, self.linear)
    terms = [_apart(product, *each).astype(dtype) for each in parts]
    return _summed(terms, dtype)

  def across_parts(self, of_part, x, w_IO, dtype):
    """Returns the product of a kernel of which parts have some outputs."""
    y = _side_by_side(
      functools.partial(of_part, self.linear),
      ports.gathered(x, w_IO.places),
      w_IO.kernel,
      None,
      self.num_parts,
    )
    return ports.gathered(y.astype(dtype))[..., : w_IO.width]


@dataclasses.dataclass(frozen=True)
class HeadsMeanSquare:
  """The port `heads_mean_square`: heads are split over the parts."""

  by_row: Callable[..., Any]
  whole: ports.HeadsMeanSquare
  num_parts: int

  def __call__(self, x, name):
    def summed(x):
      return self.by_row(lambda x: jnp.sum(x * x, axis=-1, keepdims=True), x)

    parts = jnp.split(x, _num_here(self.num_parts), -1)
    terms = [_apart(summed, x_p) for x_p in parts]
    return _summed(terms, jnp.float32) / self.whole.count(name)


@dataclasses.dataclass(frozen=True)
class Unembed:
  """The port `unembed`: rows of the head are split over the parts."""

  unembed: Callable[..., jax.Array]
  num_parts: int

  def __call__(self, hidden, head_VD, dtype):
    return jnp.concatenate(
      [
        _apart(lambda x, w: self.unembed(x, w, dtype), hidden, head_pD)
        for head_pD in jnp.split(head_VD, _num_here(self.num_parts))
      ],
      axis=-1,
    )

  def over_parts(self, of_part, x, w_IO, dtype, pair=None):
    """Returns the logits of a stored table [D, V], part by part."""
    product = functools.partial(of_part, self.unembed)
    return _side_by_side(product, x, w_IO, pair, self.num_parts).astype(dtype)


@dataclasses.dataclass(frozen=True)
class AttendCached:
  """The port `attend_cached`: heads are split over the parts."""

  attend_cached: Callable[..., jax.Array]
  num_parts: int

  def __call__(self, q_1THC, cache, positions_1T, form):
    num = _num_here(self.num_parts)

    def attend(q_1THC, pages):
      return self.attend_cached(
        q_1THC, cache._replace(pages=pages), positions_1T, form
      )

    def pages_of(part: int):
      def own(pool):
        if pool.shape[2] == 1:  # latents, which all heads read
          return pool
        per_part = pool.shape[2] // num
        return pool[:, :, part * per_part : (part + 1) * per_part]

      return jax.tree.map(own, cache.pages)

    outs = [
      jax.lax.optimization_barrier(
        attend(jax.lax.optimization_barrier(q_1TpC), pages_of(part))
      )
      for part, q_1TpC in enumerate(jnp.split(q_1THC, num, 2))
    ]
    return jnp.concatenate(outs, axis=2)


@dataclasses.dataclass(frozen=True)
class ByHead:
  """The port `by_head`: heads are split over the parts."""

  num_parts: int

  def __call__(self, function, x_BTHI, w_UHC):
    num = _num_here(self.num_parts)
    parts = zip(
      jnp.split(x_BTHI, num, 2), jnp.split(w_UHC, num, 1), strict=True
    )
    return jnp.concatenate([_apart(function, *each) for each in parts], axis=2)


@dataclasses.dataclass(frozen=True)
class Experts:
  """The port `apply_experts`: parts have some experts, or share their width."""

  apply_experts: Callable[..., jax.Array]
  linear: Callable[..., Any]
  num_parts: int
  num_groups: int = 1  # of experts; the parts of a group share their width

  def __call__(self, x_BTD, ids_BTA, gates_BTA, kernels, dtype, **stored):
    groups = self.num_groups // jax.lax.axis_size(ports.EXPERT)
    slices = _num_here(self.num_parts) // groups
    down = kernels['down']
    held = down.shape[0]
    here_BTA = ports.ids_here(ids_BTA, held)
    per_group = held // groups

    def applied(group: int, own: Any, **how: Any):
      local_BTA = here_BTA - group * per_group
      is_own_BTA = (local_BTA >= 0) & (local_BTA < per_group)
      local_BTA = jnp.where(is_own_BTA, local_BTA, per_group)
      return _apart(
        lambda x, ids, kernels: self.apply_experts(
          x, ids, gates_BTA, kernels, dtype, **stored, **how
        ),
        x_BTD,
        local_BTA,
        own,
      )

    def of_group(group: int):
      """Returns the kernels of a group; every array of one has all experts."""
      start, end = group * per_group, (group + 1) * per_group
      return jax.tree.map(lambda x: x[start:end], kernels)

    if ports.is_across(down):
      port = _ExpertsAcross(self.linear, slices)
      terms = [applied(g, of_group(g), multiply=port) for g in range(groups)]
      # A device has some columns of the terms of its groups.
      terms = ports.gathered(jnp.stack(terms), over=ports.TENSOR)
      terms = list(terms[..., : down.width])
      return _summed(terms, dtype, over=ports.EXPERT)
    terms = []
    for group in range(groups):
      parts = {
        name: _split_experts(kernel, slices, 0 if name == 'down' else 1)
        for name, kernel in of_group(group).items()
      }
      for part in range(slices):  # in the shapes that all parts have
        own = {name: each[part] for name, each in parts.items()}
        terms.append(applied(group, own))
    return _summed(terms, dtype)


@dataclasses.dataclass(frozen=True)
class _ExpertsAcross:
  """The products of experts of whose `down` parts have some outputs."""

  linear: Callable[..., Any]
  num_here: int  # parts of the width of these experts

  def over_parts(self, of_part, x_JI, w_EIO, dtype, pair=None):
    """Returns the product of `up` or `gate`, of the columns that are here."""
    del dtype, pair
    product = functools.partial(of_part, self.linear)
    parts = _split_experts(w_EIO, self.num_here, 1)
    return jnp.concatenate([_apart(product, x_JI, w) for w in parts], axis=-1)

  def across_parts(self, of_part, x_JI, w_EIO, dtype):
    """Returns the outputs of `down` that are here."""
    x_JI = ports.gathered(x_JI, over=ports.TENSOR)
    return self.over_parts(of_part, x_JI, w_EIO.kernel, dtype)


def _side_by_side(
  product: Callable[..., jax.Array],
  x: jax.Array,
  w_IO: Any,
  pair: tuple[jax.Array, jax.Array] | None,
  num_parts: int,
) -> jax.Array:
  """Returns the products with the parts of a kernel, [..., O]."""
  num = _num_here(num_parts)
  pairs = [None] * num
  if pair is not None:
    a, b = pair
    pairs = [(a, b_p) for b_p in jnp.split(b, num, -1)]
  return jnp.concatenate(
    [
      _apart(product, x, *each)
      for each in zip(_split(w_IO, num, 1), pairs, strict=True)
    ],
    axis=-1,
  )


def _split(w_IO: Any, num: int, axis: int) -> list[Any]:
  """Returns the parts of a kernel of floats, of a stored one or of none."""
  if w_IO is None:
    return [None] * num
  if isinstance(w_IO, jax.Array):
    return jnp.split(w_IO, num, axis)
  return w_IO.split(num, axis)


def _split_experts(w_EIO: Any, num: int, axis: int) -> list[Any]:
  """Returns the parts of inputs (0) or outputs (1) of a kernel of experts."""
  if isinstance(w_EIO, jax.Array):
    return jnp.split(w_EIO, num, 1 + axis)
  return w_EIO.split(num, axis)


def _num_here(num_parts: int) -> int:
  """Returns the parts of a device."""
  return num_parts // jax.lax.axis_size(ports.AXIS)


def _apart(function: Callable[..., Any], *args: Any) -> Any:
  """Returns function(*args), which XLA does not merge with other parts.

  XLA:CPU may fuse it with the code around it all the same; the sums within the
  ports have borders of their own (`models.linear.isolated`).
  """
  args = jax.lax.optimization_barrier(args)
  return jax.lax.optimization_barrier(function(*args))


def _summed(
  terms: Sequence[jax.Array], dtype: Any, over: Any = ports.AXIS
) -> jax.Array:
  """Returns the sum of the terms of all parts, in their order.

  Args:
    terms: of the parts of a device.
    dtype: of the result.
    over: the axes of the mesh along which devices have other terms.
  """
  terms_P = jax.lax.all_gather(jnp.stack(terms), over, tiled=True)
  total = ports.in_order(terms_P.astype(jnp.float32))
  return total.astype(dtype)
