"""Turns what an experiment says into the objects that run it, each once.

Below this file nothing knows of experiments: functions receive the objects, or
the plain numbers, that they need.
"""

from collections.abc import Iterable
import dataclasses
import pathlib

from data import pipeline, sources
from text import tokenizer as tokenizer_lib
from training import (
  config as config_lib,
  learner as learner_lib,
  workdir as workdir_lib,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
  """Everything a run is made of."""

  learner: learner_lib.Learner
  source: sources.Source
  tokenizer: tokenizer_lib.Tokenizer
  batches: pipeline.TrainBatches
  eval_batches: Iterable[pipeline.Batch]


def assemble(experiment: config_lib.Experiment, workdir: pathlib.Path) -> Parts:
  """Builds the parts of a run.

  Raises:
    ValueError, FileNotFoundError: the data cannot be opened, the vocabulary
      does not fit the model, or the model does not fit the devices.
  """
  learner = learner_lib.make(experiment)
  source = experiment.data.open_split(experiment.data.train_split)
  eval_source = experiment.data.open_split(experiment.data.eval_split)
  tokenizer = workdir_lib.tokenizer(workdir, experiment, source)
  return Parts(
    learner=learner,
    source=source,
    tokenizer=tokenizer,
    batches=pipeline.train_batches(
      source, tokenizer, experiment.data, seed=experiment.seed
    ),
    eval_batches=pipeline.eval_batches(eval_source, tokenizer, experiment.data),
  )
