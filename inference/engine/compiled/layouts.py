"""The layouts of the inputs of an engine's programs."""

import dataclasses

from inference.engine import inputs as inputs_lib, steps
from inference.engine.compiled import keys as keys_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layouts:
  """Says how the host's arrays of a step lie in one array."""

  chunk_tokens: int
  table_width: int  # L, pages of a sequence that fills the context
  sample_sizes: list[int]  # that `sample` is compiled for
  has_adapters: bool
  is_layered: bool  # see `layered`

  def is_whole(self, shape: steps.Shape) -> bool:
    """Returns whether the program of a shape samples, too."""
    return not shape.num_chunks and not self.is_layered

  def num_sampled(self, shape: steps.Shape, *, is_split: bool = False) -> int:
    """Returns R, the tokens that a step samples, with padding."""
    if self.is_whole(shape) and not is_split:
      return shape.num_decodes
    return next(size for size in self.sample_sizes if size >= sum(shape))

  def of(
    self, shape: steps.Shape, *, is_split: bool = False
  ) -> inputs_lib.Layout:
    """Returns the layout of a step; `is_split`: of its `forward`."""
    return inputs_lib.Layout(
      *shape,
      self.chunk_tokens,
      self.table_width,
      self.num_sampled(shape, is_split=is_split),
      self.has_adapters,
    )

  def beside(
    self, shape: steps.Shape, num_chunks: int, width: int
  ) -> keys_lib.Beside:
    """Returns the key of what samples after drafts in a step with chunks.

    Args:
      shape: of the step.
      num_chunks: the most chunks beside decodes, of any shape.
      width: the most tokens that are sampled for a sequence.
    """
    # Half of the places for decodes, the others for their drafts: with fewer
    # places left, drafts are short.
    return keys_lib.Beside(
      self.num_sampled(shape), shape.num_decodes // 2, num_chunks, width
    )

  def verified(self, shape: keys_lib.Verified) -> inputs_lib.Layout:
    """Returns the layout of a step that verifies drafts."""
    # Spans lie as chunks of a step without decodes.
    return inputs_lib.Layout(
      0,
      shape.num_spans,
      shape.width,
      self.table_width,
      shape.num_spans,
      self.has_adapters,
    )
