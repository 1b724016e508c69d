"""The shapes that programs of an engine are compiled for first."""

import numpy as np

from inference.engine import steps


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
