"""Opens a quantised checkpoint: a matrix takes the place of its tensors.

    m.qweight, m.scales, m.qzeros   ->   m.weight

Any fault that the headers and the quantization_config show is refused here,
before any matrix is read.
"""

from collections.abc import Mapping
from typing import Any, Protocol

from checks import expect
from frozen.huggingface.quantised import parts as parts_lib

# A tied head has no tensors of its own, but lists name it nevertheless.
HEADS = ('lm_head', 'embed_out')
# Linear layers in older versions of transformers; lists name them or not.
ROUTERS = ('mlp.gate', 'block_sparse_moe.gate')
_TABLES = ('embed_tokens', 'embed_in', 'wte', 'wpe')


class Method(Protocol):
  """A quantization_config that was read; one for each `quant_method`."""

  @property
  def title(self) -> str:
    """The method and its format, for people."""
    ...

  @property
  def notes(self) -> list[str]:
    """Notes on parts that are computed unlike in the original program."""
    ...

  @property
  def parts(self) -> frozenset[str]:
    """Names of tensors that only quantised matrices have."""
    ...

  @property
  def unused(self) -> frozenset[str]:
    """Names of tensors of activations, which are not quantised here."""
    ...

  def check_names(self, classes: Mapping[str, str]) -> list[str]:
    """Checks the names in lists; returns notes.

    Args:
      classes: Linear, Embedding or '' by the name of each module.

    Raises:
      ValueError: a list names no module.
    """
    ...

  def open(self, parts: parts_lib.Parts, kind: str) -> Any:
    """Returns the `parts_lib.Tensor` of a matrix; None if it is of floats.

    Args:
      parts: the tensors of the module.
      kind: Linear, Embedding or ''.

    Raises:
      ValueError: its tensors do not fit the method.
    """
    ...


def opened(
  method: Method, tensors: Mapping[str, Any], where: str
) -> tuple[dict[str, Any], list[str]]:
  """Returns tensors with matrices in place of their parts, and notes.

  Args:
    method: method of the quantization_config.
    tensors: tensors of `safetensors_files`, by name.
    where: the directory, for errors.

  Raises:
    ValueError: a tensor is not as the method describes it.
  """
  modules: dict[str, dict[str, Any]] = {}
  for name, tensor in tensors.items():
    module, _, part = name.rpartition('.')
    modules.setdefault(module, {})[part] = tensor
  classes = {
    name: _class(name, found, method.parts) for name, found in modules.items()
  }
  notes = method.check_names(classes)
  result, num_unused, num_quantised = {}, 0, 0
  for name, found in modules.items():
    unused = found.keys() & method.unused
    num_unused += len(unused)
    rest = {part: x for part, x in found.items() if part not in unused}
    if rest:
      quantised = method.open(parts_lib.Parts(where, name, rest), classes[name])
      if quantised is not None:
        num_quantised += 1
        names = method.parts | {'weight'}
        rest = {part: x for part, x in rest.items() if part not in names}
        rest['weight'] = quantised
    result |= {
      f'{name}.{part}' if name else part: x for part, x in rest.items()
    }
  if not num_quantised:
    raise ValueError(
      f'{where}: got no quantised matrix, expected some as config.json has a'
      ' quantization_config; remove the field if the weights are floats'
    )
  if num_unused:
    notes.append(f'{num_unused} tensors of scales of activations were not read')
  return result, notes


def _class(name: str, found: Mapping[str, Any], parts: frozenset[str]) -> str:
  """Returns the class of a module in torch, as lists may name it."""
  last = name.rpartition('.')[2]
  if last in _TABLES:
    return 'Embedding'
  is_matrix = 'weight' in found and len(found['weight'].shape) == 2
  return 'Linear' if is_matrix or found.keys() & parts else ''


def is_router(module: str) -> bool:
  """Returns whether a module is the router of a layer of experts."""
  return module.endswith(ROUTERS)


def names_nothing(path: str, name: str) -> ValueError:
  """Returns the error of a list that names a module which is not there."""
  return ValueError(
    f'{path}: got {expect.shown(name)}, expected the name of a module in the'
    ' checkpoint; remove it from the list, or correct it'
  )
