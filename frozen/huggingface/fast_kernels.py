"""The matrices of an import that stay quantised, for speed on this machine."""

from collections.abc import Mapping
import functools
from typing import Any

import jax
import jax.numpy as jnp

from hardware import peaks
from models.linear import plain, products
from models.linear.native import product as native_product
from models.linear.stored import product, repack

# Tokens per step that are measured on an accelerator: one stream, and many.
_ROWS = 1, 64
_BUDGET_S = 0.2  # of each measurement, after it was compiled
_COPIES_BYTES, _MOST_COPIES = 2**28, 16  # more than caches hold


def choose(kept: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
  """Returns the kernels with which this machine computes fast, and notes.

  Native code of a CPU decodes with them faster than with floats; plain JAX is
  several times slower. On GPU and TPU the largest matrix of each form is
  measured: a form stays if it is at least as fast as bfloat16. Blocks of a GGUF
  file get their scales apart there, as kernels read them.

  Args:
    kept: stored kernels, by path.
  """
  if not kept:
    return {}, []
  platform = jax.default_backend()
  if platform != 'cpu':
    return _measured(kept, platform)
  chosen = products.choose('auto', dict(kept), jnp.float32, platform)
  if chosen.stored is product.in_blocks:
    return {}, [
      f'matrices become floats, since products are in {chosen.reason};'
      ' --weights=kept leaves them as they are nevertheless'
    ]
  found = {
    path: kernel
    for path, kernel in kept.items()
    if not native_product.refusal(kernel, jnp.float32)
  }
  return found, [
    f'{len(found)} of {len(kept)} matrices stay quantised, since products are'
    f' {chosen.reason}; --weights=float dequantises all, for a machine without'
    ' a compiler'
  ]


def _measured(
  kept: Mapping[str, Any], platform: str
) -> tuple[dict[str, Any], list[str]]:
  """Returns the kernels whose form is fast on an accelerator, and notes."""
  largest: dict[str, Any] = {}
  for each in kept.values():
    form = _form(each)
    if form not in largest or each.nbytes > largest[form].nbytes:
      largest[form] = each
  notes, fast = [], set[str]()
  for form, each in largest.items():
    kernel = _apart(each)
    chosen = products.on_accelerator([kernel], jnp.bfloat16, platform)
    if not chosen.is_native:
      notes.append(f'{form} becomes floats, since {chosen.reason}')
      continue
    ratios = _ratios(kernel, chosen.stored)
    if max(ratios) <= 1:
      fast.add(form)
    times = ', '.join(
      f'{ratio:.2f} for {rows} tokens'
      for rows, ratio in zip(_ROWS, ratios, strict=True)
    )
    verdict = 'stays' if form in fast else 'becomes floats'
    notes.append(
      f'{form} {verdict}: products took {times} of the time of bfloat16'
      f' [{" x ".join(map(str, kernel.shape))}]'
    )
  found = {
    path: _apart(each) for path, each in kept.items() if _form(each) in fast
  }
  notes.append(
    f'{len(found)} of {len(kept)} matrices stay quantised;'
    ' --weights=kept or --weights=float decides for all'
  )
  return found, notes


def _form(kernel: Any) -> str:
  return getattr(kernel, 'form', '') or f'blocks {kernel.kind}'


def _apart(kernel: Any) -> Any:
  return repack.repacked(kernel) if hasattr(kernel, 'kind') else kernel


def _ratios(kernel: Any, stored: product.Computed) -> list[float]:
  """Returns the time of products in fewer bits, in times of bfloat16.

  A call multiplies by several copies, one after the other: a single product
  takes less time than its launch, and finds its matrix in a cache.
  """
  matrix = kernel if kernel.ndim == 2 else kernel.matrix(0)
  num = max(1, min(_MOST_COPIES, _COPIES_BYTES // matrix.nbytes))
  sides = [
    [jax.tree.map(jnp.copy, each) for _ in range(num)]
    for each in (matrix, matrix.whole(jnp.bfloat16))
  ]

  @jax.jit
  def multiply(x_RI: jax.Array, matrices: list[Any]) -> jax.Array:
    for w_IO in matrices:
      if isinstance(w_IO, jax.Array):
        y_RO: Any = plain.linear(x_RI, w_IO, None, x_RI.dtype)
      else:
        y_RO: Any = product.linear(
          x_RI, w_IO, None, x_RI.dtype, computed=stored
        )
      x_RI += 0 * y_RO[:, :1]  # each product waits for the one before
    return x_RI

  found = []
  for rows in _ROWS:
    x_RI = jnp.ones((rows, matrix.shape[0]), jnp.bfloat16)
    times = [
      peaks.best_seconds(functools.partial(multiply, x_RI, side), _BUDGET_S)
      for side in sides
    ]
    found.append(times[0] / times[1])
  return found
