"""A run with rollouts that takes seconds: bytes of tiny prompts."""

from collections.abc import Sequence
import dataclasses
import io
import json
import pathlib

import rich.console

from data import data_config, sources
from inference import rollouts
from tests.helpers import tiny_models
from training import experiment as experiment_lib, run as run_lib
from training.objectives import advantages, token_loss
from training.optimizer import chain
from training.rollouts import rollout_config
from training.rollouts.dialogues import episodes


def few_high_bytes(found: Sequence[episodes.Episode]) -> list[float]:
  """Returns the share of sampled ids below 128: dense, and easily learnt."""
  return [sum(i < 128 for i in each.ids) / len(each.ids) for each in found]


def write_prompts(directory: pathlib.Path) -> str:
  """Writes two splits of records; returns their path with {split}."""
  directory.mkdir(parents=True, exist_ok=True)
  for split, count in (('train', 12), ('validation', 3)):
    lines = [json.dumps({'prompt': f'{split[0]}{i}'}) for i in range(count)]
    (directory / f'{split}.jsonl').write_text('\n'.join(lines) + '\n')
  return f'{directory}/{{split}}.jsonl'


def experiment(
  directory: pathlib.Path, rollout: dict | None = None, **overrides
) -> experiment_lib.Experiment:
  """Returns 8 steps: two steps, twice, on each batch of 16 answers."""
  objective = {
    'policy_scale': 1.0,
    'is_sampled': True,
    'advantages': advantages.Advantages(baseline='group', group_size=2),
    **overrides.pop('objective', {}),
  }
  fields = {
    'name': 'tiny_rollouts',
    'model': tiny_models.llama_like(vocab_size=264, num_layers=1),
    'data': data_config.DataConfig(
      open_source=sources.jsonl,
      path=write_prompts(directory / 'prompts'),
      data_dir=str(directory / 'data'),
      examples='prompts',
      packing='none',
      row_length=32,
      batch_size=8,  # a row for each fake device
    ),
    'objective': token_loss.TokenLoss(**objective),
    'rollouts': rollout_config.RolloutConfig(
      **{
        'rewards': (rollout_config.RewardConfig(reward=few_high_bytes),),
        'num_prompts': 8,
        'max_tokens': 6,
        'inner_epochs': 2,
        **(rollout or {}),
      }
    ),
    'optimizer': chain.OptimizerConfig(peak_lr=1e-2, warmup_steps=1),
    'num_steps': 8,
    'log_every_steps': 4,
    'eval_every_steps': 4,
    'checkpoint': experiment_lib.CheckpointConfig(every_steps=2),
    'freeze': experiment_lib.FreezeConfig(enabled=False),
  }
  return experiment_lib.Experiment(**{**fields, **overrides})


def run(
  experiment: experiment_lib.Experiment, workdir: pathlib.Path, **options
) -> tuple[run_lib.Result, str]:
  """Returns the result of a run and all text that it printed."""
  console = rich.console.Console(file=io.StringIO(), width=200)
  options.setdefault('make_sampler', rollouts.make)
  result = run_lib.run(experiment, workdir, console, **options)
  return result, console.file.getvalue()


def records(workdir: pathlib.Path, *kinds: str) -> list[dict]:
  """Returns the records of metrics.jsonl of some kinds."""
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  found = [json.loads(line) for line in lines]
  return [each for each in found if each['kind'] in kinds]


def with_rollouts(
  base: experiment_lib.Experiment, **changes
) -> experiment_lib.Experiment:
  """Returns the experiment with changes of its rollouts."""
  assert base.rollouts is not None
  return dataclasses.replace(
    base, rollouts=dataclasses.replace(base.rollouts, **changes)
  )
