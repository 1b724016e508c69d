"""An IsoFLOP grid of byte models for one GPU, as `bytes.py` is for a CPU.

    python -m studies.scaling.isoflop \
      --config=experiments/scaling/bytes_large.py \
      --workdir=runs/isoflop_large --path=enwik9

Budgets are 2,000 to 4,000 times those of `bytes.py`, which needs a longer text:
at 1e16 FLOPs the best size has seen about 400 million bytes. Not measured yet.
"""

import dataclasses

from experiments.scaling import bytes as small
from training import experiment

LENGTH = 512
BATCH_SIZE = 64
SIZES = (64, 96, 128, 160, 192, 256, 384)
BUDGETS = (3e14, 1e15, 3e15, 1e16)  # FLOPs, 6 N D
RATIOS = small.RATIOS
DECAY_SHARE = small.DECAY_SHARE
_HEAD_WIDTH = 32


def get_config(variant: str = '256') -> experiment.Experiment:
  """Returns the run of a width, a multiple of 32, with constant rate."""
  if not variant.isdigit() or not int(variant) or int(variant) % _HEAD_WIDTH:
    raise ValueError(
      f'variant: got {variant!r}, expected a width, a multiple of'
      f' {_HEAD_WIDTH}, as 256'
    )
  found, width = small.get_config(variant), int(variant)
  return dataclasses.replace(
    found,
    name=f'isoflop_bytes_large_{width}',
    model=dataclasses.replace(
      found.model,
      num_layers=6,
      num_heads=width // _HEAD_WIDTH,
      num_kv_heads=width // _HEAD_WIDTH,
      head_width=_HEAD_WIDTH,
      max_length=LENGTH,
    ),
    data=dataclasses.replace(
      found.data, row_length=LENGTH, batch_size=BATCH_SIZE
    ),
  )
