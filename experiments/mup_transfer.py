"""muP: narrow and wide models have the same best learning rate.

    python -m studies.mup_transfer --workdir=runs/mup \
      --figure=runs/mup.svg

Yang et al., arXiv:2203.03466, figure 1: in the standard parametrisation the
best learning rate falls as models get wider; with muP it stays the same. Here:
two layers on the quickstart's data, widths 64 to 512, Adam, learning rates in
powers of two. At the base width, 64, both parametrisations are the same model.
Expected: the optimum of muP stays within one step of the grid over all widths,
and the standard optimum falls. LOG.md has the measured result. One model alone:

    python train.py --config=experiments/mup_transfer.py:mup-256 \
      --config.optimizer.peak_lr=0.01 --workdir=runs/mup-256

Cost: about half an hour on two CPU cores.
"""

import dataclasses

from experiments import presets, quickstart
from training import experiment
from training.optimizer import chain

BASE_WIDTH = 64
WIDTHS = (64, 128, 256, 512)
HEAD_WIDTH = 32
LENGTH = 64


def get_config(variant: str = 'mup-64') -> experiment.Experiment:
  """Returns the experiment `mup-WIDTH` or `standard-WIDTH`.

  WIDTH is a multiple of 64.
  """
  kind, _, width = variant.partition('-')
  if kind not in ('mup', 'standard') or not width.isdigit() or int(width) % 64:
    raise ValueError(
      f'variant: got {variant!r}, expected mup-WIDTH or standard-WIDTH with a'
      ' multiple of 64, as in mup-256'
    )
  return of_width(kind, int(width))


def of_width(kind: str, width: int) -> experiment.Experiment:
  """Returns the experiment of a kind, mup or standard, and a width."""
  data = quickstart.get_config().data
  return experiment.Experiment(
    name=f'mup_transfer_{kind}-{width}',
    model=dataclasses.replace(
      presets.llama(
        vocab_size=quickstart.VOCAB_SIZE,
        num_layers=2,
        num_heads=width // HEAD_WIDTH,
        num_kv_heads=width // HEAD_WIDTH,
        width=width,
        mlp_width=width * 8 // 3 // 16 * 16,
        length=LENGTH,
      ),
      mup_base_width=BASE_WIDTH if kind == 'mup' else 0,
      scan_layers=False,
    ),
    data=dataclasses.replace(data, row_length=LENGTH, batch_size=16),
    optimizer=chain.OptimizerConfig(
      peak_lr=2**-7,
      end_lr=0.0,
      schedule='linear',
      warmup_steps=10,
      weight_decay=0.0,
    ),
    freeze=experiment.FreezeConfig(enabled=False),
    num_steps=100,
  )
