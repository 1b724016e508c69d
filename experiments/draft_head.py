"""A draft head: a model guesses its own next tokens, and answers faster.

    python -m studies.answers --model=runs/SmolLM2 --temperature=0.7 \
      --questions=questions.jsonl --out=answers/train.jsonl
    python train.py --config=experiments/draft_head.py:runs/SmolLM2 \
      --workdir=runs/head --config.data.path='answers/{split}.jsonl'
    python serve.py --model=runs/SmolLM2 --chat --engine.speculation=head \
      --engine.draft_head=runs/head/frozen

The variant names the frozen directory of the model, whose weights stay as they
are. The frozen result is a head for exactly these weights
(`frozen/draft_heads.py`). Conversations are best answered by the model itself,
so that the head learns the text that it will guess. A large vocabulary makes
guesses slow, so the head may guess the first ids alone; with `tv` in place of
`kl` it learns the share of accepted drafts itself:

    --config.objective.num_ids=16384 --config.objective.loss=tv

`agreement_1` and `overlap_1` of the evaluation are the acceptance to expect of
the first token of a draft, greedy and sampled. LOG.md has what was measured.

References: ReDrafter (arXiv:2403.09919), EAGLE (arXiv:2401.15077).
"""

from data import data_config, sources
from experiments import presets
from training import experiment
from training.checkpoints import init_from
from training.objectives import draft_head
from training.optimizer import chain

BASE = 'runs/SmolLM2-135M-Instruct'


def get_config(directory: str = '') -> experiment.Experiment:
  """Returns the experiment that trains a head of a frozen directory."""
  model = presets.smollm2_135m()
  if directory:
    model = init_from.model_of(directory)
  return experiment.Experiment(
    name='draft_head',
    model=model,
    init_from=directory or BASE,
    data=data_config.DataConfig(
      open_source=sources.jsonl,
      path='answers/{split}.jsonl',
      examples='chat',
      row_length=512,
      batch_size=8,
      packing='first_fit',
      tokenizer=init_from.tokenizer_of(directory or BASE),
    ),
    objective=draft_head.DraftHead(),
    # No norm is between the head and the logits: 2e-3 diverged on SmolLM2.
    optimizer=chain.OptimizerConfig(
      peak_lr=7e-4, end_lr=7e-5, warmup_steps=20, weight_decay=0.0
    ),
    num_steps=400,
    log_every_steps=10,
    eval_every_steps=100,
  )
