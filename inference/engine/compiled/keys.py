"""The keys of programs that a shape alone does not name.

They are no tuples, as a shape is: tuples of equal numbers are equal, whatever
their classes, and a program would take the place of another.
"""

import dataclasses

from inference.engine import steps


@dataclasses.dataclass(frozen=True)
class Forward:
  """Names the program of a step of decodes that does not sample."""

  shape: steps.Shape


@dataclasses.dataclass(frozen=True)
class Masked:
  """Names the program that samples so many tokens within grammars."""

  size: int


@dataclasses.dataclass(frozen=True)
class Verified:
  """Names the program of a step that verifies drafts: X spans of R tokens."""

  num_spans: int
  width: int


@dataclasses.dataclass(frozen=True)
class Accepted:
  """Names the program that samples the tokens of such a step."""

  shape: Verified
  is_masked: bool = False  # whether some tokens are within grammars


@dataclasses.dataclass(frozen=True)
class Beside:
  """Names the program that samples after drafts beside prompt chunks.

  The logits are those of a step with chunks, which has a program already.
  """

  size: int  # R, the rows of logits
  num_decodes: int  # the most sequences that decode, with drafts or without
  num_chunks: int  # the most chunks
  width: int  # W, the most tokens that are sampled for a sequence
  is_masked: bool = False  # whether some tokens are within grammars
