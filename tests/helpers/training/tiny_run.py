"""A whole run on text files that takes seconds."""

import io
import pathlib

import numpy as np
import rich.console

from data import data_config, sources
from tests.helpers import tiny_models
from training import experiment as experiment_lib, run as run_lib
from training.checkpoints import init_from
from training.evaluation import evals_config
from training.optimizer import chain

_WORDS = ['def', 'return', 'self', 'for', 'in', 'import', 'naïve', '数']


def write_corpus(directory: pathlib.Path) -> str:
  """Writes two splits of plain text, a file per document; returns the path."""
  rng = np.random.default_rng(0)
  for split, count in (('train', 40), ('validation', 3)):
    (directory / split).mkdir()
    for i in range(count):
      text = ' '.join(rng.choice(_WORDS, rng.integers(5, 60)))
      (directory / split / f'{i:02d}.txt').write_text(text)
  return str(directory / '{split}' / '*.txt')


def experiment(corpus: str, **overrides) -> experiment_lib.Experiment:
  """Returns 12 steps with a checkpoint every 4 and an evaluation every 6."""
  data = {
    'open_source': sources.text_files,
    'path': corpus,
    'data_dir': str(pathlib.Path(corpus).parents[1] / 'data'),
    'row_length': 16,
    'batch_size': 8,
    'tokenizer': data_config.TokenizerConfig(kind='byte'),
    'knowledge_cutoff': '2024-05',
    **overrides.pop('data', {}),
  }
  fields = {
    'name': 'tiny',
    'model': tiny_models.llama_like(vocab_size=264, num_layers=1),
    'data': data_config.DataConfig(**data),
    'optimizer': chain.OptimizerConfig(warmup_steps=2),
    'num_steps': 12,
    'log_every_steps': 3,
    'eval_every_steps': 6,
    'checkpoint': experiment_lib.CheckpointConfig(every_steps=4),
    # A program less to compile; test_samples.py has some.
    'evals': evals_config.EvalsConfig(samples=0),
  }
  return experiment_lib.Experiment(**{**fields, **overrides})


def tuning(corpus: str, directory, **overrides) -> experiment_lib.Experiment:
  """Returns an experiment that goes on from a frozen directory."""
  tokenizer = data_config.TokenizerConfig(
    kind='directory', path=f'{directory}/tokenizer'
  )
  data = {'tokenizer': tokenizer, **overrides.pop('data', {})}
  return experiment(
    corpus,
    model=init_from.model_of(str(directory)),
    init_from=str(directory),
    data=data,
    **overrides,
  )


def run(
  experiment: experiment_lib.Experiment, workdir: pathlib.Path
) -> tuple[run_lib.Result, str]:
  """Returns the result of a run and all text that it printed."""
  console = rich.console.Console(file=io.StringIO(), width=200)
  result = run_lib.run(experiment, workdir, console)
  return result, console.file.getvalue()
