"""The evaluation tasks and samples of a run, as its experiment names them."""

import dataclasses
import pathlib

from checks import expect
from evals import evaluate


@dataclasses.dataclass(kw_only=True)
class EvalsConfig:
  """Read by `training/evaluation/tasks.py` and `samples.py` beside it."""

  # KIND:FILE, of the kinds in evals/evaluate.py that only score text.
  tasks: tuple[str, ...] = ()
  # Steps between measurements, a multiple of config.eval_every_steps. The last
  # step is always measured. 0: with every evaluation of the validation loss.
  every_steps: int = 0
  # First examples, or pieces of text, of each task; 0 takes all.
  limit: int = 0
  # Tokens by which a window of perplexity advances; 0: half of data.row_length.
  # A smaller stride gives each token more context, and takes longer.
  stride: int = 0
  # Prompts of the validation split that each evaluation continues, for the
  # report of the run; at most data.batch_size. 0: none.
  samples: int = 2

  def validate(self, eval_every_steps: int) -> None:
    """Raises ValueError for tasks that cannot be, or are never, measured."""
    if not isinstance(self.tasks, tuple | list):
      raise ValueError(
        f'evals.tasks: got {self.tasks!r}, expected a tuple of tasks, as in'
        " ('perplexity:book.txt',)"
      )
    kinds = [k for k, task in evaluate.KINDS.items() if task.ONLY_SCORES]
    for task in self.tasks:
      kind, _, path = str(task).partition(':')
      if kind not in kinds or not path:
        raise ValueError(
          f'evals.tasks: got {task!r}, expected KIND:FILE with one of'
          f' {", ".join(kinds)}: other tasks need generated text; freeze'
          ' the run and evaluate the frozen directory'
        )
    names = [name_of(task) for task in self.tasks]
    if repeated := sorted({n for n in names if names.count(n) > 1}):
      raise ValueError(
        f'evals.tasks: got several called {", ".join(repeated)}, expected files'
        ' of different names'
      )
    for name in ('every_steps', 'limit', 'stride', 'samples'):
      expect.at_least(f'evals.{name}', getattr(self, name), 0)
    if self.every_steps and (
      not eval_every_steps or self.every_steps % eval_every_steps
    ):
      raise ValueError(
        f'evals.every_steps: got {self.every_steps}, expected a multiple of'
        f' config.eval_every_steps = {eval_every_steps}; change one of them'
      )


def name_of(task: str) -> str:
  """Returns the name of a task in metrics, as 'perplexity_book'."""
  kind, _, path = task.partition(':')
  return f'{kind}_{pathlib.Path(path).stem}'
