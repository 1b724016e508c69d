"""nanoGPT's two published runs on tiny Shakespeare, character by character.

    python train.py --config=experiments/shakespeare_char.py:cpu \
      --workdir=runs/shakespeare --config.data.path=tiny_shakespeare.txt

Source: https://github.com/karpathy/nanoGPT, README and
config/train_shakespeare_char.py. Validation loss in nats per character:

    :cpu  4 layers, 4 heads, width 128, context 64, batch 12, 2000 steps   1.88
    :gpu  6 layers, 6 heads, width 384, context 256, batch 64, 5000 steps,
          dropout 0.2                                                    1.4697

The text is ASCII, so its bytes are its characters. nanoGPT validates on the
last tenth of the text. The builder splits that tenth in two, hence
`validation+test`. nanoGPT has no bias terms. Cost: minutes on a CPU or a GPU.
"""

import dataclasses

from data import data_config, sources
from experiments import presets
from training import experiment
from training.optimizer import chain, update_rules

# ByteTokenizer: 256 bytes and three special ids that windows never contain.
VOCAB_SIZE = 259


def get_config(variant: str = 'cpu') -> experiment.Experiment:
  """Returns the experiment, `cpu` or `gpu`."""
  if variant == 'cpu':
    layers, heads, width, length, batch, steps, dropout = (
      4, 4, 128, 64, 12, 2000, 0.0,
    )  # fmt: skip
  elif variant == 'gpu':
    layers, heads, width, length, batch, steps, dropout = (
      6, 6, 384, 256, 64, 5000, 0.2,
    )  # fmt: skip
  else:
    raise ValueError(f'variant: got {variant!r}, expected cpu or gpu')
  return experiment.Experiment(
    name=f'shakespeare_char_{variant}',
    model=dataclasses.replace(
      presets.gpt2(
        vocab_size=VOCAB_SIZE,
        num_layers=layers,
        num_heads=heads,
        width=width,
        length=length,
      ),
      use_bias=False,
      dropout_rate=dropout,
    ),
    data=data_config.DataConfig(
      open_source=sources.tiny_shakespeare,
      eval_split='validation+test',
      row_length=length,
      batch_size=batch,
      packing='windows',
      tokenizer=data_config.TokenizerConfig(kind='byte'),
      knowledge_cutoff='1623',  # the First Folio
    ),
    optimizer=chain.OptimizerConfig(
      rule=update_rules.AdamW(beta1=0.9, beta2=0.99),
      peak_lr=1e-3,
      end_lr=1e-4,
      schedule='cosine',
      warmup_steps=100,
      weight_decay=0.1,
      clip_norm=1.0,
    ),
    num_steps=steps,
    eval_every_steps=250,
    checkpoint=experiment.CheckpointConfig(every_steps=250),
  )
