"""The experiment that the survival suites kill: small, and of many phases.

About ten seconds, of which more than half are the start of the process. Steps,
evaluations and saves take turns so often that a kill hits any of them.
"""

from data import data_config, sources
from tests.helpers import tiny_models
from training import experiment
from training.evaluation import evals_config
from training.optimizer import chain

NUM_STEPS = 240
EVAL_EVERY = 20
SAVE_EVERY = 30


def get_config() -> experiment.Experiment:
  """Returns the experiment; `data.path` is given by a flag."""
  return experiment.Experiment(
    name='survival',
    # Of more ids than it needs: its embeddings are one chunk of a file that is
    # larger than all that a run writes besides (full_disk.MAX_FILE_BYTES).
    model=tiny_models.llama_like(vocab_size=1024, max_length=64),
    data=data_config.DataConfig(
      open_source=sources.text_files,
      row_length=64,
      batch_size=24,
      tokenizer=data_config.TokenizerConfig(kind='byte'),
    ),
    optimizer=chain.OptimizerConfig(warmup_steps=10),
    num_steps=NUM_STEPS,
    log_every_steps=5,
    eval_every_steps=EVAL_EVERY,
    checkpoint=experiment.CheckpointConfig(
      every_steps=SAVE_EVERY, keep_latest=2, keep_best=1
    ),
    evals=evals_config.EvalsConfig(samples=0),
  )
