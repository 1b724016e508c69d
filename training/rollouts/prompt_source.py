"""Prompts with the interface of `data.rows.Rows`, to describe a run's data."""

import dataclasses
from typing import Any

from data.examples import prompts as prompts_lib


@dataclasses.dataclass(frozen=True)
class PromptStore:
  """The figures of prompts that a description of data shows."""

  prompts: prompts_lib.Prompts
  documents_per_unit: int = 1
  streams: tuple[str, ...] = ()

  @property
  def digest(self) -> str:
    """Returns the digest of the prompts."""
    return self.prompts.digest

  @property
  def num_documents(self) -> int:
    """Returns the number of prompts."""
    return len(self.prompts)

  @property
  def num_ids(self) -> int:
    """Returns the tokens of all prompts."""
    return sum(len(prompt.ids) for prompt in self.prompts.prompts)

  @property
  def counts(self) -> dict[str, int]:
    """Returns the number of prompts that were left out, by reason."""
    left_out = self.prompts.num_too_long
    return {'longer than a row, left out': left_out} if left_out else {}


@dataclasses.dataclass(frozen=True)
class PromptSource:
  """One source of prompts."""

  prompts: prompts_lib.Prompts
  fill_rate: float = 1.0  # unknown: the rows are not sampled yet

  @property
  def trained_share(self) -> float:
    """Returns the share of the prompts' tokens that is trained: none."""
    return 0.0

  @property
  def name(self) -> str:
    """Returns the source's name."""
    return self.prompts.name

  @property
  def num_rows(self) -> int:
    """Returns the number of prompts."""
    return len(self.prompts)

  @property
  def store(self) -> PromptStore:
    """Returns the figures of the prompts."""
    return PromptStore(self.prompts)

  def epochs(self, num_rows: int) -> float:
    """Returns how often each prompt occurs among `num_rows` drawn prompts."""
    return num_rows / self.num_rows

  def describe(self) -> dict[str, Any]:
    """Returns name, sizes and digest, as JSON values."""
    return self.prompts.describe()
