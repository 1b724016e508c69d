"""The kernels in fewer bits of a frozen directory, as its manifest lists them.

    "quantization": {
      "kind": "stored",
      "kernels": {
        "params/layer_0/mlp/up/kernel": {
          "form": "int4", "tile": [1, 128],
          "arrays": {"values": "uint8", "scales": "float32"}
        },
        "params/embed/embedding": {"blocks": "Q8_0"}
      },
      "record": {"scheme": "int4", "method": "rtn"}
    }

Without such kernels the field is {"kind": "none"}. Shapes are not listed: they
follow from the model. The arrays lie under the path of the kernel:
`.../kernel/values`, `.../kernel/scales`, of blocks `.../kernel/data`. A table,
[V, D], is the kernel of its product: rows of D numbers, V of them.
"""

from collections.abc import Mapping
import math
from typing import Any

import jax
import jax.numpy as jnp

from checks import expect
from models import axes
from models.linear.stored import (
  block_kinds,
  blocks as blocks_lib,
  kernel as kernel_lib,
  tree as stored_tree,
)

NONE: Mapping[str, Any] = {'kind': 'none'}
_KIND = 'stored'
_FIELDS = ('kind', 'kernels', 'record')


def by_path(params: Any) -> dict[str, Any]:
  """Returns the leaves by path; a stored kernel is one leaf."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(
    params, is_leaf=stored_tree.is_stored
  )
  return {'/'.join(axes.names(keys)): leaf for keys, leaf in leaves}


def described(params: Any) -> dict[str, dict[str, Any]]:
  """Returns the manifest's entry of each stored kernel, by path."""
  found = {}
  for path, leaf in by_path(params).items():
    if isinstance(leaf, kernel_lib.Kernel):
      arrays = {name: getattr(leaf, name) for name in kernel_lib.ARRAYS}
      found[path] = {
        'form': leaf.form,
        'tile': list(leaf.tile),
        'arrays': {
          name: jnp.dtype(array.dtype).name
          for name, array in arrays.items()
          if array is not None
        },
      }
    elif isinstance(leaf, blocks_lib.Blocks):
      found[path] = {'blocks': leaf.kind}
  return found


def quantization(
  params: Any, record: Mapping[str, Any] | None
) -> dict[str, Any]:
  """Returns the field `quantization` of a manifest.

  Args:
    params: the variables that are written.
    record: how the kernels were made: JSON values.
  """
  if not (kernels := described(params)):
    return dict(NONE)
  return {'kind': _KIND, 'kernels': kernels, 'record': dict(record or {})}


def with_kernels(shapes: Any, quantization: Mapping[str, Any]) -> Any:
  """Returns the shapes of a model whose kernels are stored as a manifest says.

  Args:
    shapes: shapes of the variables in floats.
    quantization: field `quantization` of the manifest.

  Raises:
    ValueError: the manifest lists a kernel that the model does not have, or
      one that cannot be stored so.
  """
  if quantization == NONE:
    return shapes
  if quantization.get('kind') != _KIND or set(quantization) != set(_FIELDS):
    raise ValueError(
      f'quantization: got {expect.shown(dict(quantization))}, expected kind'
      f' {_KIND!r} with {", ".join(_FIELDS[1:])}; use the code that wrote it'
    )
  left = dict(quantization['kernels'])

  def replaced(keys, leaf):
    path = '/'.join(axes.names(keys))
    if (told := left.pop(path, None)) is None:
      return leaf
    try:
      _check_path(path, leaf)
      return _abstract(leaf, told, is_table=_is_table(path))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
      raise ValueError(
        f'quantization of {path}: {error}; copy or freeze the directory again'
      ) from None

  found = jax.tree_util.tree_map_with_path(replaced, shapes)
  if left:
    raise ValueError(
      f'quantization: got a kernel {min(left)}, expected kernels of the model'
      ' that the config describes; copy or freeze the directory again'
    )
  return found


def check(params: Any, abstract: Any) -> None:
  """Raises ValueError for a stored kernel that no product can read.

  Args:
    params: the variables to write.
    abstract: shapes of the model in floats.
  """
  floats = by_path(abstract)
  for path in described(params):
    if path in floats:
      _check_path(path, floats[path])


def num_bytes(shapes: Any) -> int:
  """Returns the bytes of variables, or of their shapes, as they are stored."""
  return sum(
    math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize
    for leaf in jax.tree.leaves(shapes)
  )


def summary(quantization: Mapping[str, Any], shapes: Any) -> str:
  """Returns the forms of the kernels and their bits per weight; '' for none.

  Args:
    quantization: field `quantization` of the manifest.
    shapes: shapes of the variables, as `with_kernels` returns them.
  """
  if quantization == NONE:
    return ''
  counts: dict[str, int] = {}
  weights, size = 0, 0
  for _, leaf in by_path(shapes).items():
    if stored_tree.is_stored(leaf):
      name = leaf.kind if isinstance(leaf, blocks_lib.Blocks) else leaf.form
      counts[name] = counts.get(name, 0) + 1
      weights += math.prod(leaf.shape)
      size += leaf.nbytes
  record = quantization['record']
  made = [str(record[key]) for key in ('scheme', 'method') if key in record]
  made += ['turned'] if 'rotation' in record else []
  forms = ', '.join(f'{n} x {name}' for name, n in sorted(counts.items()))
  return (
    f'{forms}{f" ({chr(32).join(made)})" if made else ""}:'
    f' {8 * size / weights:.3g} bits per weight of {weights:,}; with the rest'
    f' {num_bytes(shapes):,} bytes'
  )


def _is_table(path: str) -> bool:
  return path.split('/')[-2] in ('embed', 'head')


def _check_path(path: str, leaf: Any) -> None:
  """Raises ValueError for a parameter that must be in floats."""
  collection, *_, owner, kind = path.split('/')
  is_matrix = kind == 'kernel' and owner not in stored_tree.WHOLE
  is_table = kind == 'embedding' and _is_table(path)
  if collection != 'params' or not (is_matrix or is_table):
    raise ValueError(
      f'{path}: got a parameter in fewer bits, expected floats,'
      f' {list(leaf.shape)}: only matrices of linear layers and experts,'
      ' embeddings and heads are multiplied as they are stored'
    )


def _abstract(leaf: Any, told: Mapping[str, Any], *, is_table: bool) -> Any:
  """Returns the shapes of a stored kernel, from the shape of its floats."""
  *leading, rows, columns = leaf.shape
  if is_table:
    rows, columns = columns, rows

  def shape(*own, dtype):
    return jax.ShapeDtypeStruct(
      (*leading, *own), jnp.dtype(dtype), sharding=leaf.sharding
    )

  if set(told) == {'blocks'}:
    expect.one_of('blocks', told['blocks'], block_kinds.KINDS)
    kind = block_kinds.KINDS[told['blocks']]
    expect.multiple_of('inputs', rows, 'a block', kind.weights)
    data = shape(columns, rows // kind.weights * kind.bytes, dtype='uint8')
    return blocks_lib.Blocks.make(data, kind=told['blocks'])
  if set(told) != {'form', 'tile', 'arrays'}:
    raise ValueError(
      f'got {expect.shown(dict(told))}, expected blocks, or form, tile and'
      ' arrays'
    )
  form, arrays = told['form'], dict(told['arrays'])
  expect.one_of('form', form, kernel_lib.FORMS)
  tile_out, tile_in = told['tile']
  expect.at_least('tile', min(tile_out, tile_in), 1)
  is_packed = form in kernel_lib.PACKED
  if is_packed:
    expect.multiple_of('inputs', rows, '', 2)
  tiles = -(-columns // tile_out), -(-rows // tile_in)
  own = {
    'values': (columns, rows // 2 if is_packed else rows),
    'scales': tiles,
    'mins': tiles,
    'order': (rows,),
    'gain': (),
  }
  made = {
    name: shape(*own[name], dtype=dtype) for name, dtype in arrays.items()
  }
  return kernel_lib.Kernel.make(**made, form=form, tile=(tile_out, tile_in))
