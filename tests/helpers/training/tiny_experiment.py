"""Tiny experiments of learners that get their batches from the test.

`tiny_run.experiment` is the one for whole runs, which read a corpus.
"""

from data import data_config
from parallel import parallel_config
from tests.helpers import tiny_models
from training import experiment
from training.optimizer import chain


def make(
  *, parallel=None, data=None, remat='none', **fields
) -> experiment.Experiment:
  """Returns ten steps of 16 rows of 16 tokens, with changes.

  Args:
    parallel: fields of the ParallelConfig.
    data: fields of the DataConfig.
    remat: of the ExecutionConfig.
    **fields: of the Experiment.
  """
  return experiment.Experiment(
    **{
      'name': 'tiny',
      'model': tiny_models.llama_like(vocab_size=64, scan_layers=True),
      'data': data_config.DataConfig(
        **{'path': '-', 'row_length': 16, 'batch_size': 16, **(data or {})}
      ),
      'optimizer': chain.OptimizerConfig(warmup_steps=2),
      'parallel': parallel_config.ParallelConfig(**(parallel or {})),
      'execution': experiment.ExecutionConfig(remat=remat),
      'num_steps': 10,
      **fields,
    }
  )
