"""The shapes that programs of an engine are compiled for first."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from inference.engine import steps
from inference.engine.compiled import keys as keys_lib


def holding_all(shapes: list[steps.Shape]) -> list[steps.Shape]:
  """Returns the fewest shapes that hold every step, and that of decodes alone.

  A step without chunks runs most often. Padding by chunks would slow it down.
  """

  def largest(among):
    return [
      shape
      for shape in among
      if not any(
        other != shape and np.all(np.array(other) >= shape) for other in among
      )
    ]

  decodes = [shape for shape in shapes if not shape.num_chunks]
  return list(dict.fromkeys([*largest(decodes), *largest(shapes)]))


def beside_chunks(shapes: list[steps.Shape]) -> list[steps.Shape]:
  """Returns the shapes in which drafts are verified beside chunks.

  Each token of a draft takes the place of a decode, so they are shapes that
  steps have anyway. In a crowd decodes leave no place: one shape is larger.

  Args:
    shapes: of all steps. Without decodes beside chunks, the result is empty.
  """
  mixed = [each for each in shapes if each.num_decodes and each.num_chunks]
  if not mixed:
    return []
  largest = max(mixed)
  roomy = [each for each in mixed if each.num_decodes > 1]
  return [*roomy, largest._replace(num_decodes=2 * largest.num_decodes)]


def beside(
  keys: Mapping[steps.Shape, keys_lib.Beside],
  compiled: Mapping[Any, Any],
  num_decodes: int,
  num_chunks: int,
) -> list[steps.Shape]:
  """Returns the shapes that verify drafts of so many decodes beside chunks.

  Of each number of rows, for decodes and their drafts, the shape with the
  fewest chunks; in ascending order.

  Args:
    keys: what samples in each shape; the shapes in ascending order.
    compiled: programs by shape and by key; others are left out.
    num_decodes: sequences that decode.
    num_chunks: chunks beside them.
  """
  found: dict[int, steps.Shape] = {}
  for shape, key in keys.items():
    is_held = key.num_decodes >= num_decodes and shape.num_chunks >= num_chunks
    if is_held and shape in compiled and key in compiled:
      found.setdefault(shape.num_decodes, shape)
  return list(found.values())


def sample_sizes(most: int, cheap: int = 0) -> list[int]:
  """Returns the sizes that `sample` is compiled for: powers of 4, and `most`.

  Few sizes: its filters take longer to compile than a layer of the model does,
  and padding costs little beside the matrix products of a step.

  Args:
    most: tokens that a step samples.
    cheap: beyond so many tokens, the product that makes logits takes much
      longer. It is a size, too; 0: there is no such number.
  """
  sizes = []
  while (size := 4 ** len(sizes)) < most:
    sizes.append(size)
  if 0 < cheap < most:
    sizes.append(cheap)
  return [*sorted(set(sizes)), most]
