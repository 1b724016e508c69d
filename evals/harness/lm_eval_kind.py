"""The kind `lm_eval`: tasks of the LM Evaluation Harness.

This file imports lm_eval only when such a task is read.
"""

from collections.abc import Callable
import dataclasses
from typing import Self

from evals import options as options_lib, ports
from evals.results import scores
from evals.tasks import task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(task.Task):
  """The kind `lm_eval`: names of its tasks, or paths of YAML files."""

  READS = ('limit', 'num_fewshot', 'seed', 'chat')

  ask: Callable[[ports.Model], tuple[scores.Group, ...]]

  @classmethod
  def read(cls, path: str, options: options_lib.Options) -> Self:
    """Loads the tasks.

    Raises:
      ModuleNotFoundError: lm_eval is not installed.
      ValueError: there is no such task.
    """
    try:
      from evals.harness import lm_eval_tasks
    except ModuleNotFoundError as error:
      raise ModuleNotFoundError(
        f'{error}; for tasks of lm_eval: pip install -r requirements-eval.txt'
      ) from None
    ask = lm_eval_tasks.open_tasks(
      path.split(','),
      limit=options.limit or None,
      num_fewshot=options.num_fewshot,
      seed=options.seed,
      is_chat=options.chat,
    )
    return cls(options=options, files={}, ask=ask)

  def measure(self, model: ports.Model) -> tuple[scores.Group, ...]:
    """Returns a group for each task, filter and aggregate."""
    return self.ask(model)
