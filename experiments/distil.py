"""Distillation: a student a quarter of its teacher's size, in minutes on a CPU.

    python train.py --config=experiments/distil.py:teacher \
      --workdir=runs/teacher
    python train.py --config=experiments/distil.py:alone --workdir=runs/alone
    python train.py --config=experiments/distil.py:forward --workdir=runs/s

The variants of a student are alone, forward, reverse and jensen_shannon; a
teacher's frozen directory may follow a second colon, as
forward:runs/mine/frozen. The teacher reads the text of 8,000 problems
(data/problems/); each student begins with random weights and reads 300 of them
again and again. Alone it learns these texts; from a teacher, it learns what
else could have stood there. All are evaluated on the same held-out problems.

References: Hinton et al. 2015 (arXiv:1503.02531); Agarwal et al. 2023
(arXiv:2306.13649). The goal is that the distilled student closes at least half
of the gap in held-out loss between the student alone and the teacher. It closes
32 % of it so far (one seed, nats/token): teacher 0.5054, alone 0.5444, forward
0.5320.
"""

import dataclasses

from data import data_config, sources
from experiments import presets
from models import model_config
from training import experiment
from training.objectives import distillation
from training.optimizer import chain

LENGTH = 128
TEACHER = 'runs/teacher/frozen'
_PROBLEMS = 'families=sums,comparisons&levels=1,2'
_NUM_READ = {'teacher': 8000, 'student': 300}  # problems
STUDENTS = ('alone', *distillation.DIVERGENCES)


def get_config(variant: str = 'forward') -> experiment.Experiment:
  """Returns the experiment `teacher`, STUDENT or STUDENT:DIRECTORY."""
  kind, _, directory = variant.partition(':')
  if kind not in ('teacher', *STUDENTS) or (
    directory and kind in ('teacher', 'alone')
  ):
    raise ValueError(
      f'variant: got {variant!r}, expected teacher, or one of'
      f' {", ".join(STUDENTS)}; all but the first two may have a frozen'
      ' directory, as forward:runs/teacher/frozen'
    )
  if kind == 'teacher':
    return _text(kind, _model(width=128, mlp_width=344), 'teacher')
  student = _text(kind, _model(width=64, mlp_width=144), 'student')
  if kind == 'alone':
    return student
  return dataclasses.replace(
    student,
    objective=distillation.Distillation(
      teacher=directory or TEACHER, divergence=kind
    ),
  )


def _model(*, width: int, mlp_width: int) -> model_config.ModelConfig:
  made = presets.llama(
    vocab_size=264,
    num_layers=2,
    num_heads=width // 32,
    num_kv_heads=width // 32,
    width=width,
    mlp_width=mlp_width,
    length=LENGTH,
  )
  return dataclasses.replace(made, tie_embeddings=True, scan_layers=False)


def _text(
  kind: str, model: model_config.ModelConfig, reader: str
) -> experiment.Experiment:
  """Returns the experiment that learns the text of problems."""
  return experiment.Experiment(
    name=f'distil_{kind}',
    model=model,
    data=data_config.DataConfig(
      # The source of the evaluation alone.
      open_source=sources.problems,
      path=f'kind=text&count=1000&{_PROBLEMS}',
      sources=(
        data_config.SourceConfig(
          open_source=sources.problems,
          path=f'kind=text&count={_NUM_READ[reader]}&{_PROBLEMS}',
        ),
      ),
      row_length=LENGTH,
      batch_size=16,
      packing='first_fit',
      tokenizer=data_config.TokenizerConfig(kind='byte'),
    ),
    optimizer=chain.OptimizerConfig(peak_lr=4e-3, end_lr=0.0, warmup_steps=30),
    num_steps=300,
    log_every_steps=20,
    eval_every_steps=100,
  )
