"""Which trials run together in one program, and why the others do not.

Runs share a program if they differ in the numbers of `VARYING` only. All other
fields change the shapes or the computation.

One program saves compilation, start and idle cores, which is most of the time
of a tiny model, and little of the time of a large one. Three kinds of runs
could share a program and do not, since they gain little. Betas: 1 - beta is a
constant in float64, an argument would be float32 (`VARYING`). Averages of
weights: every evaluation runs twice, and a state has the weights once more.
Adapters, and other runs from frozen weights: a base that is worth adapting
fills the cores by itself. These runs are trained one by one, with the numbers
of train.py.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import pathlib
from typing import Any

import jax

from hardware import host_memory, peaks
from storage import digests
from studies.comparison import run_values
from studies.sweeps import claims as claims_lib, points, single
from training import (
  execution,
  experiment as experiment_lib,
  learner as learner_lib,
)
from training.optimizer import update_rules
from training.planning import memory

# Fields of the optimizer that are arguments of the program. The schedule is a
# table of learning rates by step, so that its kind may differ as well. `seed`
# varies, too. Decays of moments (beta1, ...) do not: optax computes 1 - beta in
# float64 where beta is a constant, and float32 would change the 5th digit.
VARYING = (
  'peak_lr',
  'end_lr',
  'schedule',
  'warmup_steps',
  'decay_steps',
  'decay_shape',
  'weight_decay',
  'clip_norm',  # not to or from 0, which is no clip
)
# Share of the free memory that the runs of one program may take.
_SHARE = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Member:
  """A trial that can run with others, with the experiment of each seed."""

  claim: claims_lib.Claim
  experiments: Mapping[int, experiment_lib.Experiment]  # by seed

  @property
  def structure(self) -> str:
    """The digest of everything that the trials of a program share."""
    return structure(next(iter(self.experiments.values())))


def structure(experiment: experiment_lib.Experiment) -> str:
  """Returns the digest of the fields that do not vary in a program."""
  config = experiment.to_dict()
  del config['seed']
  optimizer = config['optimizer']
  has_clip = optimizer['clip_norm'] > 0
  for name in VARYING:
    del optimizer[name]
  return digests.of_json(config | {'has_clip': has_clip})


def reason_apart(experiment: experiment_lib.Experiment) -> str:
  """Returns why a run needs a program of its own; '' if it does not."""
  parallel, rule = experiment.parallel, experiment.optimizer.rule
  is_split = any(
    getattr(parallel, name) not in (1, -1)
    for name in ('fsdp', 'stage', 'expert', 'context', 'tensor')
  )
  if is_split or parallel.kind == 'pmap':
    return 'config.parallel splits the model or uses pmap'
  if experiment.init_from or experiment.adapter.rank:
    return 'config.init_from: the run begins with other weights'
  if experiment.objective.models_needed:
    return 'config.objective needs a frozen model'
  if experiment.rollouts is not None:
    return 'config.rollouts: each policy samples its own data'
  if experiment.evals.tasks:
    return 'config.evals.tasks are measured while it trains'
  if experiment.ema_decay or rule.keeps_average:
    return 'the run keeps an average of the weights'
  if isinstance(rule, update_rules.Ademamix):
    return 'optimizer.rule ademamix has schedules of its own'
  device = jax.devices()[0]
  if device.platform != 'cpu':
    learner = learner_lib.make(experiment, [device])
    path = execution.attention_path(experiment, learner.placement)
    if path != 'reference':
      return f'attention by {path}, whose kernel takes one model'
  return ''


def most_runs(experiment: experiment_lib.Experiment) -> int:
  """Returns how many runs fit the memory of all devices at a time."""
  devices = jax.devices()
  learner = learner_lib.make(experiment, devices[:1])
  estimate = memory.estimate(learner)
  if devices[0].platform == 'cpu':
    # One run of a device at a time is computed, see `programs.py`; the states
    # of all lie in memory, twice while they are saved. The fake devices of a
    # host share its memory.
    state = estimate.params + estimate.optimizer
    free = _SHARE * (host_memory.available_bytes() or 0)
    return max(0, int((free - len(devices) * estimate.total) / (2 * state)))
  free = peaks.memory_bytes(devices[0])
  return int(_SHARE * free / estimate.total) * len(devices)


def began_together(claim: claims_lib.Claim) -> bool | None:
  """Returns how a trial began; None: it has not trained yet.

  A trial continues as it began, because its checkpoints have that form.
  """
  if list(claim.directory.glob(f'seed*/{STATE}*')):
    return True
  return False if list(claim.directory.glob('seed*/checkpoints')) else None


STATE = 'state-'


def members(
  batch: Sequence[claims_lib.Claim],
  base: experiment_lib.Experiment,
  store: Any,
  *,
  wanted: bool,
) -> tuple[list[list[Member]], list[tuple[claims_lib.Claim, str]]]:
  """Returns groups of trials to run together, and the others with reasons.

  A trial whose values no run can use is recorded as errored, and left out.

  Args:
    wanted: whether trials should run together at all.
  """
  groups: dict[str, list[Member]] = {}
  apart: list[tuple[claims_lib.Claim, str]] = []
  for claim in batch:
    try:
      member = _member(claim, base, store.sweep)
      first = next(iter(member.experiments.values()))
      began = began_together(claim)
      reason = '' if began else reason_apart(first)
    except (ValueError, OSError) as error:
      store.finish(claim.trial, state='errored', note=single.one_line(error))
      claim.release()
      continue
    if began is False:
      reason = 'it began so'
    elif store.sweep.metric in run_values.SPEEDS:
      reason = f'metric {store.sweep.metric} is measured on a run by itself'
    elif not wanted and not began:
      reason = '--notogether'
    if reason:
      apart.append((claim, reason))
    else:
      groups.setdefault(member.structure, []).append(member)
  fitting: list[list[Member]] = []
  for found in groups.values():
    num_seeds = len(found[0].experiments)
    most = most_runs(next(iter(found[0].experiments.values()))) // num_seeds
    if not most and not any(began_together(m.claim) for m in found):
      reason = f'{num_seeds} runs at a time do not fit the memory'
      apart += [(member.claim, reason) for member in found]
      continue
    most = max(most, 1)
    fitting += [found[i : i + most] for i in range(0, len(found), most)]
  return fitting, apart


def _member(claim, base, sweep) -> Member:
  return Member(
    claim=claim,
    experiments={
      seed: points.experiment_of(base, claim.params, seed)
      for seed in points.seeds(base, sweep, claim.params)
    },
  )


def workdir_of(root: pathlib.Path, digest: str) -> pathlib.Path:
  """Returns the directory that the trials of a program share: a tokenizer."""
  return root / 'programs' / digest[:16]
