"""The base class of the kinds of evaluation; evals/evaluate.py lists them.

A new kind is a file with a subclass of `Task`, and a line in `KINDS`.
"""

import abc
import dataclasses
from typing import ClassVar, Self

from evals import options as options_lib, ports
from evals.results import scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(abc.ABC):
  """An evaluation whose files were read, ready for any number of models."""

  # Names of the fields of `Options` that the kind reads; others are refused.
  READS: ClassVar[tuple[str, ...]] = ()
  # Whether the model's log-probabilities suffice. Such a task needs no sampler,
  # so a run can measure it while it trains.
  ONLY_SCORES: ClassVar[bool] = False

  name: str = ''  # KIND:PATH, as the user wrote it; set by `open_task`
  options: options_lib.Options
  files: dict[str, str]  # SHA-256 of each file that was read, by path

  @classmethod
  @abc.abstractmethod
  def read(cls, path: str, options: options_lib.Options) -> Self:
    """Reads everything that the evaluation needs, before any model is asked.

    `path` stands after `KIND:` in the task's name. Options outside READS have
    their defaults.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file or an option is wrong.
    """

  @abc.abstractmethod
  def measure(self, model: ports.Model) -> tuple[scores.Group, ...]:
    """Returns the scores of the model.

    Raises:
      ValueError: the model lacks a function that the task needs.
    """

  def run(self, model: ports.Model) -> scores.Result:
    """Returns the scores of the model, with the options and files used.

    Raises:
      ValueError: the model lacks a function that the task needs.
    """
    return scores.Result(
      task=self.name,
      groups=self.measure(model),
      options=dataclasses.asdict(self.options),
      model=dict(model.description),
      files=self.files,
    )
