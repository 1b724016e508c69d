"""What an experiment says about the tasks that it is measured by."""

import dataclasses
import pathlib

KINDS = ('perplexity', 'choice')


@dataclasses.dataclass(kw_only=True)
class EvalsConfig:
  """Which tasks, and how often; read by `training/evaluation/tasks.py`."""

  # perplexity:FILE and choice:FILE.jsonl, see evals/run.py.
  tasks: tuple[str, ...] = ()
  # With every so many-th step's evaluation, and with the last; a multiple of
  # config.eval_every_steps. 0: with every evaluation.
  every_steps: int = 0
  limit: int = 0  # first examples, or pieces of text, of each; 0 takes all
  stride: int = 0  # of perplexity, in tokens; 0: half of data.row_length

  def validate(self, eval_every_steps: int) -> None:
    """Raises ValueError for what cannot be, or would never be, measured."""
    if not isinstance(self.tasks, tuple | list):
      raise ValueError(
        f'evals.tasks: got {self.tasks!r}, expected a tuple of tasks, as in'
        " ('perplexity:book.txt',)"
      )
    for task in self.tasks:
      kind, _, path = str(task).partition(':')
      if kind not in KINDS or not path:
        raise ValueError(
          f'evals.tasks: got {task!r}, expected KIND:FILE with one of'
          f' {", ".join(KINDS)}: other tasks read what a model writes; freeze'
          ' the run and evaluate what is frozen'
        )
    names = [name_of(task) for task in self.tasks]
    if repeated := sorted({n for n in names if names.count(n) > 1}):
      raise ValueError(
        f'evals.tasks: got several called {", ".join(repeated)}, expected files'
        ' of different names'
      )
    for name in ('every_steps', 'limit', 'stride'):
      if getattr(self, name) < 0:
        raise ValueError(
          f'evals.{name}: got {getattr(self, name)}, expected at least 0'
        )
    if self.every_steps and (
      not eval_every_steps or self.every_steps % eval_every_steps
    ):
      raise ValueError(
        f'evals.every_steps: got {self.every_steps}, expected a multiple of'
        f' config.eval_every_steps = {eval_every_steps}; change one of them'
      )


def name_of(task: str) -> str:
  """Returns what the task is called in metrics: 'perplexity_book'."""
  kind, _, path = task.partition(':')
  return f'{kind}_{pathlib.Path(path).stem}'
