"""Small models of graded ability, to measure compute at test time.

    python train.py --config=experiments/test_time_scaling.py:small \
      --workdir=runs/think_small
    python -m studies.test_time_scaling --workdir=runs/think

`small` and `large` learn to add numbers of two to six digits, a column and a
carry at a time (`data/problems/arithmetic.py:columns`). The large model has
about four times the parameters. A column is right with a probability below 1,
so that an answer of six columns is wrong more often than one of two.
`python -m studies.test_time_scaling` asks what samples, votes and verifiers
make of it.

`python -m studies.test_time_scaling` trains a model until half of its sampled
answers are right (`TARGET`). With a number of steps in place of that, one seed
gets nearly everything right and the next one half, since the step at which an
ability comes differs between seeds.
"""

import dataclasses

from data import data_config, sources
from experiments import presets
from training import experiment
from training.optimizer import chain

LENGTH = 256  # of a row, which holds about three conversations
MAX_TOKENS = 88  # of an answer; the longest right one has 82 bytes
# A level of `columns` has one digit more than its number.
LEVELS = {2: 1, 3: 2, 4: 3, 5: 4, 6: 5}
_WIDTHS = {'small': 64, 'large': 128}
TARGET = 0.5  # share of sampled answers that are right
LOOK_EVERY = 150  # steps
SIZES = tuple(_WIDTHS)


def get_config(variant: str = 'small') -> experiment.Experiment:
  """Returns the experiment `small` or `large`."""
  if variant not in _WIDTHS:
    raise ValueError(
      f'variant: got {variant!r}, expected one of {", ".join(_WIDTHS)}'
    )
  width = _WIDTHS[variant]
  return experiment.Experiment(
    name=f'think_{variant}',
    model=dataclasses.replace(
      presets.llama(
        vocab_size=264,
        num_layers=2,
        num_heads=width // 32,
        num_kv_heads=width // 32,
        width=width,
        mlp_width=width * 11 // 4,
        length=LENGTH,
      ),
      tie_embeddings=True,
      scan_layers=False,  # two layers compile quickly, and run faster
    ),
    data=data_config.DataConfig(
      open_source=sources.problems,
      path='kind=chat&families=columns&levels=1,2,3,4,5&count=20000',
      examples='chat',
      chat_template=presets.QUESTION_TEMPLATE,
      row_length=LENGTH,
      batch_size=16,
      packing='best_fit',
      contamination_ngram=0,  # the splits share no problem by design
      tokenizer=data_config.TokenizerConfig(kind='byte'),
    ),
    optimizer=chain.OptimizerConfig(
      # Constant: no step is the last one.
      peak_lr=2e-3,
      schedule='constant',
      warmup_steps=20,
      weight_decay=0.0,
    ),
    num_steps=4500,  # at most
    log_every_steps=20,
    eval_every_steps=0,
  )
