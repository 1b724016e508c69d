"""LoRA: low-rank adapters are trained beside frozen weights.

    python -m frozen.huggingface import --source=org/model --out=runs/base
    python train.py --config=experiments/lora.py:8,runs/base \
      --workdir=runs/lora8 --config.data.path='corpus/{split}.jsonl'

The variant is RANK,DIRECTORY: 1, 8, 64 or 256, and the frozen directory of the
base. Rank 0 trains all weights, to compare. Without a directory, the base is
the small model of `make quickstart`, which takes ranks up to its width of 192
and minutes on two CPU cores.

The run freezes the base with the adapters merged into it;
--config.freeze.merge_adapter=false keeps them apart, as peft reads them.
--config.adapter.base=int4 stores the frozen kernels in 4 bits (QLoRA).

All linear layers are adapted, with alpha 32 and ten times the learning rate of
full fine-tuning at every rank: LoRA Without Regret (Schulman et al. 2025). The
rank matters only where the data is more than the adapter can hold.
Reference: LoRA, arXiv:2106.09685.
"""

import dataclasses

from checks import expect
from experiments import finetune, quickstart
from models import adapter_config
from training import experiment
from training.checkpoints import init_from

RANKS = (0, 1, 8, 64, 256)
RATE_RATIO = 10  # of the best learning rates of adapters and of all weights
QUICKSTART = 'runs/quickstart/frozen'


def get_config(variant: str = '8') -> experiment.Experiment:
  """Returns the experiment of RANK, or of RANK,DIRECTORY."""
  rank, _, directory = variant.partition(',')
  expect.one_of('variant', rank, map(str, RANKS), 'write RANK,DIRECTORY')
  full = finetune.get_config(directory) if directory else _small()
  if rank == '0':
    return full
  optimizer = dataclasses.replace(
    full.optimizer,
    peak_lr=RATE_RATIO * full.optimizer.peak_lr,
    end_lr=RATE_RATIO * full.optimizer.end_lr,
    weight_decay=0.0,
  )
  return dataclasses.replace(
    full,
    name='lora',
    optimizer=optimizer,
    adapter=adapter_config.AdapterConfig(rank=int(rank)),
  )


def _small() -> experiment.Experiment:
  """Returns full fine-tuning of the model of `make quickstart`."""
  full = finetune.get_config()
  tokenizer = init_from.tokenizer_of(QUICKSTART)
  return dataclasses.replace(
    full,
    model=quickstart.get_config().model,
    init_from=QUICKSTART,
    data=dataclasses.replace(
      full.data, row_length=quickstart.LENGTH, tokenizer=tokenizer
    ),
  )
