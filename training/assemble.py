"""Turns what an experiment says into the objects that run it, each once.

Below this file nothing knows of experiments: functions receive the objects, or
the plain numbers, that they need.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
import json
import pathlib
from typing import Any

from data import (
  batches as batches_lib,
  data_config,
  rows as rows_lib,
  sources,
)
from data.contamination import overlap
from evals.tasks import task as task_lib
from parallel import processes
from text import tokenizer as tokenizer_lib
from training import experiment as experiment_lib, learner as learner_lib
from training.checkpoints import workdir as workdir_lib
from training.evaluation import tasks as tasks_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
  """Everything a run is made of."""

  learner: learner_lib.Learner
  tokenizer: tokenizer_lib.Tokenizer
  batches: batches_lib.TrainBatches
  eval_batches: batches_lib.EvalBatches
  overlaps: tuple[overlap.Overlap, ...]  # of each source, if looked for
  tasks: tuple[task_lib.Task, ...]  # that the run is measured by

  def describe_data(self) -> dict[str, Any]:
    """Returns what is trained and evaluated on, as JSON values."""
    return {
      'sources': [
        rows.describe() | {'weight': source.weight}
        for source, rows in zip(
          self.learner.experiment.data.train_sources(),
          self.batches.sources,
          strict=True,
        )
      ],
      'evaluation': self.eval_batches.source.describe(),
      'tasks': {task.name: task.files for task in self.tasks},
      'contamination': [
        dataclasses.asdict(overlap) | {'share': overlap.share}
        for overlap in self.overlaps
      ],
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Documents:
  """The text of a run, opened."""

  train: tuple[sources.Source, ...]
  evaluated: sources.Source
  tasks: tuple[task_lib.Task, ...]


def open_documents(experiment: experiment_lib.Experiment) -> Documents:
  """Opens the data of a run; writes nothing that belongs to it.

  Raises:
    ValueError, FileNotFoundError: it cannot be opened, or has no text.
  """
  data = experiment.data
  named = *data.train_sources(), data.eval_source()
  opened = []
  for source in named:
    documents = source.open(data.data_dir)
    if not any(documents[i]['text'] for i in range(len(documents))):
      raise ValueError(
        f'{source.name}: got {len(documents)} documents without any text,'
        ' expected some; check the path and text_key'
      )
    opened.append(documents)
  return Documents(
    train=tuple(opened[:-1]),
    evaluated=opened[-1],
    tasks=tasks_lib.open_tasks(experiment.evals),
  )


def assemble(
  experiment: experiment_lib.Experiment,
  workdir: pathlib.Path,
  say: Callable[[str], None] = lambda _: None,
  documents: Documents | None = None,
) -> Parts:
  """Builds the parts of a run.

  Args:
    experiment: what to run.
    workdir: where its tokenizer is, or will be.
    say: is told of what takes long.
    documents: what to train and evaluate on; opened now if None.

  Raises:
    ValueError, FileNotFoundError: the data cannot be opened, the vocabulary
      does not fit the model, or the model does not fit the devices.
  """
  learner = learner_lib.make(experiment)
  data = experiment.data
  documents = documents or open_documents(experiment)
  mixed = list(zip(data.train_sources(), documents.train, strict=True))
  tokenizer = workdir_lib.tokenizer(
    workdir, experiment, *((opened, s.weight) for s, opened in mixed)
  )
  open_rows = functools.partial(
    rows_lib.open_rows,
    tokenizer=tokenizer,
    config=data,
    say=say,
  )
  with processes.together('data'):
    train = [open_rows(opened, name=s.name) for s, opened in mixed]
    held_out = open_rows(documents.evaluated, name=data.eval_source().name)
  digests = [rows.store.digest for rows in (*train, held_out)]
  digests += [d for task in documents.tasks for d in task.files.values()]
  processes.check_same('data', json.dumps(digests))
  return Parts(
    learner=learner,
    tokenizer=tokenizer,
    batches=batches_lib.train_batches(train, data, seed=experiment.seed),
    eval_batches=batches_lib.eval_batches(held_out, data),
    overlaps=tuple(_overlaps(train, held_out, tokenizer, data)),
    tasks=documents.tasks,
  )


def _overlaps(
  train: Sequence[rows_lib.Rows],
  held_out: rows_lib.Rows,
  tokenizer: tokenizer_lib.Tokenizer,
  data: data_config.DataConfig,
) -> Iterator[overlap.Overlap]:
  """Looks for the evaluation text in the training text; one process does."""
  ngram = data.contamination_ngram
  if ngram < 0:
    ngram = overlap.default_ngram(tokenizer)
  if ngram and processes.is_first():
    for rows in train:
      yield overlap.between_stores(rows.store, held_out.store, ngram)
