"""Rounding to nearest: a kernel of floats becomes a stored one.

The scale of a tile follows from its largest magnitude, and each number becomes
the nearest number of the form. For uint4, scale and min follow from the
smallest and the largest number.

The largest magnitude is 127 steps of int8. It is 7.5 steps of int4: clipping it
costs less than wider steps do. The smallest codes, -128 and -8, are not used.

References: OCP Microscaling Formats v1.0, section 6.3 (scales of fp4 that are
powers of two); QLoRA, arXiv:2305.14314 (nf4).
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax.numpy as jnp

from checks import expect
from models.linear.stored import kernel as kernel_lib, packing

_LARGEST = {
  'int8': 127.0,
  'int4': 7.5,
  'nf4': 1.0,
  'fp8': float(jnp.finfo(jnp.float8_e4m3fn).max),
  'fp4': packing.FP4_LARGEST,
}
_E4M3_LARGEST = _LARGEST['fp8']


@dataclasses.dataclass(frozen=True)
class Scheme:
  """A named way to store kernels."""

  form: str  # one of kernel.FORMS
  tile_in: int | None  # None: a whole row has one scale
  scales: str = 'float32'  # dtype


SCHEMES: Mapping[str, Scheme] = {
  'int8': Scheme('int8', None),
  'int8-g32': Scheme('int8', 32),
  'int4': Scheme('int4', 128),
  'uint4': Scheme('uint4', 128),
  'nf4': Scheme('nf4', 64),
  'fp8': Scheme('fp8', None),
  'mxfp4': Scheme('fp4', 32, 'float8_e8m0fnu'),
  'nvfp4': Scheme('fp4', 16, 'float8_e4m3fn'),
}


def by_scheme(w_IO: Any, scheme: str) -> kernel_lib.Kernel:
  """Returns a kernel [..., in, out] as a scheme stores it.

  The last tile is smaller where the scheme's tile does not divide the inputs.
  """
  expect.one_of('scheme', scheme, SCHEMES)
  wanted = SCHEMES[scheme]
  rows = w_IO.shape[-2]
  tile = (1, min(rows, wanted.tile_in or rows))
  return quantise(w_IO, wanted.form, tile, scales=wanted.scales)


def quantise(
  w_IO: Any,
  form: str,
  tile: tuple[int, int],
  *,
  scales: str = 'float32',
  largest: float | None = None,
) -> kernel_lib.Kernel:
  """Returns a kernel [..., in, out] in a form, rounded to nearest.

  Args:
    w_IO: the kernel; rounding computes in float32.
    form: one of `kernel.FORMS`.
    tile: outputs and inputs that share a scale.
    scales: dtype of the scales. float8_e8m0fnu: powers of two. float8_e4m3fn:
      the kernel gets a gain, so that the largest scale is the largest number
      of this dtype.
    largest: magnitude of a tile's largest number before rounding, in steps;
      None: the value of the form. uint4 does not use it.

  Raises:
    ValueError: the form stores two inputs per byte, and their number is odd.
  """
  expect.one_of('form', form, kernel_lib.FORMS)
  rows = w_IO.shape[-2]
  if form in kernel_lib.PACKED and rows % 2:
    raise ValueError(
      f'kernel: got {rows} inputs, expected an even number: {form} stores two'
      ' per byte; store this kernel in int8 or fp8'
    )
  w_OI = jnp.swapaxes(jnp.asarray(w_IO), -1, -2).astype(jnp.float32)
  mins, gain = None, None
  if form == 'uint4':
    least = _of_tiles(w_OI, tile, jnp.min)
    steps = _whole_steps((_of_tiles(w_OI, tile, jnp.max) - least) / 15)
    # Scales are rounded first, so that codes match the scales that are stored.
    mins, kept = least.astype(scales), steps.astype(scales)
  else:
    steps = _of_tiles(jnp.abs(w_OI), tile, jnp.max) / (
      largest or _LARGEST[form]
    )
    kept, gain = _kept(_whole_steps(steps), scales)
  columns = w_OI.shape[-2]

  def of_each(of_tiles):
    return kernel_lib.spread(of_tiles.astype(jnp.float32), tile, columns, rows)

  if mins is not None:
    w_OI = w_OI - of_each(mins)
  codes = codes_of(w_OI, of_each(kernel_lib.with_gain(kept, gain)), form)
  return kernel_lib.Kernel.make(
    packing.pack(codes) if form in kernel_lib.PACKED else codes,
    kept,
    form=form,
    tile=tile,
    mins=mins,
    gain=gain,
  )


def _of_tiles(w_OI, tile, function):
  """Returns a function of each tile, [..., out / tile_out, in / tile_in]."""
  *leading, columns, rows = w_OI.shape
  of_out, of_in = tile
  # Padding repeats the edge: it changes neither the smallest nor the largest
  # number.
  padding = [(0, 0)] * len(leading) + [
    (0, -columns % of_out),
    (0, -rows % of_in),
  ]
  w_OI = jnp.pad(w_OI, padding, mode='edge')
  shape = *leading, -(-columns // of_out), of_out, -(-rows // of_in), of_in
  return function(w_OI.reshape(shape), axis=(-3, -1))


def _whole_steps(steps):
  """Returns the steps, 1 for a tile of equal numbers, as in qwix."""
  smallest = float(jnp.finfo(jnp.float32).tiny) ** 0.5
  return jnp.where(steps < smallest, 1.0, steps)


def _kept(steps, scales: str):
  """Returns the scales as they are stored, and the gain or None."""
  if scales == 'float8_e8m0fnu':
    # The exponent of the largest number becomes the exponent of 4, the form's
    # largest power of two: numbers above 6 are clipped, which costs less than a
    # step twice as wide.
    exponents = jnp.floor(jnp.log2(steps * (_LARGEST['fp4'] / 4)))
    return jnp.exp2(jnp.clip(exponents, -127, 127)).astype(scales), None
  if scales == 'float8_e4m3fn':
    gain = jnp.max(steps, axis=(-2, -1)) / _E4M3_LARGEST
    return (steps / gain[..., None, None]).astype(scales), gain
  return steps.astype(scales), None


def codes_of(w_OI, scales_OI, form: str):
  """Returns the code of each number."""
  # A scale of e4m3 may be 0: its numbers are too small for the kernel's gain.
  is_some = scales_OI > 0
  ratio = jnp.where(is_some, w_OI / jnp.where(is_some, scales_OI, 1), 0)
  if form == 'uint4':
    return jnp.clip(jnp.round(ratio), 0, 15)
  if form in ('int8', 'int4'):
    # The largest number may lie halfway between two steps. It is clipped to the
    # same step everywhere, however XLA rounds the division.
    most = int(_LARGEST[form])
    return jnp.clip(jnp.round(ratio), -most, most).astype(jnp.int8)
  if form == 'fp8':
    most = _LARGEST[form]
    return jnp.clip(ratio, -most, most).astype(jnp.float8_e4m3fn)
  return packing.nearest(ratio, packing.NF4 if form == 'nf4' else packing.FP4)
