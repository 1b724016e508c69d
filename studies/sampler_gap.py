"""The gap between sampler and trainer, and the price of closing it.

    python -m studies.sampler_gap --workdir=runs/gap
    python -m studies.sampler_gap --workdir=runs/gap --policy=mine/frozen

A token that a policy samples has two log-probabilities before it is trained on:
that of the engine, which drew it, and that of the trainer. They differ by
rounding, and the difference is off-policy noise in every ratio (Yao et al.
2025, fengyao.notion.site/off-policy-rl). Trains 50 rollout batches from one
frozen directory in five ways, and prints for each

    gap        mean and largest difference of a log-probability, in nats
    ess        effective sample size of the weights trainer / sampler, in %
    accuracy   of greedy answers to held-out questions, before and after
    price      seconds of sampling and training, over those of `float32`

With invariant numerics in float32 the gap is 0. Published prices of the same
bits, on GPUs: 17 % (RL-Kernel), 25 % (IsoExec), 2.4 x (vLLM and TorchTitan).
"""

from collections.abc import Mapping
import dataclasses
import json
import pathlib

from absl import app
import numpy as np

from checks import path_flags
from experiments import grpo
from storage import atomic
from studies.common import quiet_run, study_flags
from training import experiment as experiment_lib
from training.objectives import token_loss
from training.objectives.policy import corrections
from training.reporting import goodput, metrics

_POLICY = path_flags.DEFINE_path(
  'policy', grpo.MIXED, 'Frozen directory that every run continues from.'
)
NUM_ROLLOUTS = 50
_RESULTS = 'sampler_gap.json'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Way:
  """Numerics of a run."""

  dtype: str
  numerics: str  # of the rollouts
  is_corrected: bool = False  # whether tokens have importance weights


WAYS: Mapping[str, Way] = {
  'float32': Way(dtype='float32', numerics='fast'),
  'float32 invariant': Way(dtype='float32', numerics='invariant'),
  'bfloat16': Way(dtype='bfloat16', numerics='fast'),
  'bfloat16 corrected': Way(
    dtype='bfloat16', numerics='fast', is_corrected=True
  ),
  'bfloat16 invariant': Way(dtype='bfloat16', numerics='invariant'),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
  """The figures of one run."""

  gap_mean: float  # nats, over all rollout batches
  gap_max: float
  ess: float  # from 0 to 1, mean over rollout batches
  before: float  # accuracy
  after: float
  seconds: float  # of sampling and of training


def experiment_of(
  way: Way, directory: str, steps: int = 0
) -> experiment_lib.Experiment:
  """Returns the run of a way.

  Args:
    way: numerics of the run.
    directory: frozen directory that it continues from.
    steps: steps of the run; 0: those of `NUM_ROLLOUTS` rollout batches.
  """
  found = grpo.get_config(f'grpo:{directory}')
  objective, rollouts = found.objective, found.rollouts
  assert isinstance(objective, token_loss.TokenLoss)
  assert rollouts is not None
  if way.is_corrected:
    objective = dataclasses.replace(
      objective, correction=corrections.Correction(level=corrections.TOKEN)
    )
  per_rollout = rollouts.steps_per_rollout(
    objective.advantages.group_size, found.data.batch_size
  )
  found = quiet_run.shortened(found, steps or NUM_ROLLOUTS * per_rollout)
  return dataclasses.replace(
    found,
    name='sampler_gap',
    compute_dtype=way.dtype,
    objective=objective,
    rollouts=dataclasses.replace(rollouts, numerics=way.numerics),
    eval_every_steps=found.num_steps,
    freeze=experiment_lib.FreezeConfig(enabled=False),
  )


def read(workdir: pathlib.Path) -> Measured:
  """Returns the figures of a finished run."""
  records = metrics.read(workdir)
  drawn = [each for each in records if each['kind'] == 'rollout']
  accuracy = [r['reward/accuracy'] for r in records if r['kind'] == 'eval']
  parts = goodput.life(goodput.read(workdir)).parts
  return Measured(
    gap_mean=float(np.mean([each['gap_mean'] for each in drawn])),
    gap_max=max(each['gap_max'] for each in drawn),
    ess=float(np.mean([each['gap_ess'] for each in drawn])),
    before=accuracy[0],
    after=accuracy[-1],
    seconds=parts['rollout'] + parts['steps'],
  )


def table(found: Mapping[str, Measured]) -> str:
  """Returns the table of all ways, as Markdown."""
  base = next(iter(found.values())).seconds
  lines = [
    '| numerics | gap, mean | gap, largest | ess, % | accuracy, % | price |',
    '|---|---|---|---|---|---|',
  ]
  lines += [
    f'| {name} | {each.gap_mean:.2g} | {each.gap_max:.2g} |'
    f' {100 * each.ess:.3f} | {100 * each.before:.1f} ->'
    f' {100 * each.after:.1f} | {each.seconds / base:.2f} |'
    for name, each in found.items()
  ]
  return '\n'.join(lines)


def main(argv: list[str]) -> None:
  """Trains all ways, or resumes them, and prints the table."""
  workdir = study_flags.begin(argv)
  found = {}
  for name, way in WAYS.items():
    place = workdir / name.replace(' ', '_')
    made = experiment_of(way, _POLICY.value, study_flags.STEPS.value)
    if quiet_run.run(made, place).exit_code:
      raise SystemExit('stopped by a signal; the same command resumes')
    found[name] = read(place)
    print(f'{name}: {place}', flush=True)
  record = {name: dataclasses.asdict(each) for name, each in found.items()}
  atomic.write_text(workdir / _RESULTS, json.dumps(record, indent=2) + '\n')
  print(table(found))


if __name__ == '__main__':
  app.run(main)
