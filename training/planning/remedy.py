"""Remedies: the cheapest change that makes a run fit its devices.

A remedy costs time and never changes the result: results of layers are computed
twice (remat), the batch is cut into more micro-batches, or arrays that every
replica holds are split over the replicas (fsdp, tensor). The formula of
training/planning/memory.py proposes changes, cheapest first. For a target that
is not here, the compiler confirms them.
"""

from collections.abc import Iterator
import dataclasses
import itertools
from typing import Any

from hardware import compile_ahead, targets
from training import experiment as experiment_lib, learner as learner_lib
from training.planning import memory, plan as plan_lib

# Relative costs, which order the changes. Recomputing all products of a layer
# costs a third of a step. Each doubling of the micro-batches gathers weights
# twice as often. Splitting all weights gathers them in every layer. Splitting
# every product communicates activations, too.
_REMAT = {'none': 0, 'minimal': 1, 'full': 2}
_PER_DOUBLING, _ALL_FSDP, _PER_TENSOR_DOUBLING = 3, 4, 8
_MOST_DOUBLINGS = 6
# The formula is not exact: a proposal leaves this share of the memory free.
_MARGIN = 0.1
# Number of proposals that are compiled; each compilation takes minutes.
_MOST_COMPILED = 2


def make(
  experiment: experiment_lib.Experiment,
  target_name: str = targets.HERE,
  **options: Any,
) -> plan_lib.Plan:
  """Plans a run as `plan.make` does, with a remedy if it does not fit.

  Raises:
    ValueError: as `plan.make`.
  """
  plan = plan_lib.make(experiment, target_name, **options)
  if plan.fits is not False:
    return plan
  return dataclasses.replace(plan, remedy=_remedy(plan))


def _remedy(plan: plan_lib.Plan) -> plan_lib.Remedy | None:
  """Returns the cheapest change that fits, or None."""
  limit = plan.peaks.memory_bytes * (1 - _MARGIN)
  devices = _devices(plan)
  num_compiled = 0
  for flags, changed in candidates(plan.experiment, plan.num_devices):
    try:
      learner = learner_lib.make(changed, devices)
    except ValueError:
      continue  # rows or widths do not divide
    total = memory.estimate(learner).total
    if total > limit:
      continue
    if plan.compiled is None or num_compiled == _MOST_COMPILED:
      return plan_lib.Remedy(flags=flags, bytes=total, is_confirmed=False)
    num_compiled += 1
    compiled = plan_lib.compile_step(learner)
    if isinstance(compiled, compile_ahead.Program):
      return plan_lib.Remedy(
        flags=flags, bytes=compiled.in_use, is_confirmed=True
      )
  return None


def _devices(plan: plan_lib.Plan):
  if plan.target == targets.HERE:
    return None
  return targets.devices(targets.parse(plan.target))


def candidates(
  experiment: experiment_lib.Experiment, num_devices: int
) -> Iterator[tuple[tuple[str, ...], experiment_lib.Experiment]]:
  """Yields (flags, changed experiment), cheapest first.

  Some are invalid, because rows or widths do not divide.
  """
  options = itertools.product(
    _remats(experiment),
    _microbatches(experiment),
    _splits(experiment, num_devices),
  )
  ordered = sorted(options, key=lambda parts: sum(part[0] for part in parts))
  for parts in ordered:
    changes = {k: v for _, change in parts for k, v in change.items()}
    if changes:
      flags = tuple(f'--config.{k}={v}' for k, v in changes.items())
      yield flags, _changed(experiment, changes)


def _remats(experiment):
  now = experiment.execution.remat
  yield 0, {}
  for name, cost in _REMAT.items():
    if now in _REMAT and cost > _REMAT[now]:
      yield cost, {'execution.remat': name}


def _microbatches(experiment):
  yield 0, {}
  for i in range(1, _MOST_DOUBLINGS + 1):
    number = experiment.num_microbatches * 2**i
    if experiment.data.batch_size % number == 0:
      yield i * _PER_DOUBLING, {'num_microbatches': number}


def _splits(experiment, num_devices):
  parallel = experiment.parallel
  yield 0, {}
  if parallel.kind == 'pmap':
    return
  sizes = dict(
    zip(
      ('stage', 'data', 'fsdp', 'expert', 'context', 'tensor'),
      parallel.sizes(num_devices),
      strict=True,
    )
  )
  together = sizes['data'] * sizes['fsdp']
  if sizes['data'] > 1:
    yield _ALL_FSDP, {'parallel.data': 1, 'parallel.fsdp': together}
  for i in range(1, 4):
    if together % 2**i == 0:
      yield (
        _ALL_FSDP + i * _PER_TENSOR_DOUBLING,
        {
          'parallel.data': 1,
          'parallel.fsdp': together // 2**i,
          'parallel.tensor': sizes['tensor'] * 2**i,
        },
      )


def _changed(experiment, changes):
  """Returns a copy with fields replaced, by dotted name."""
  for name, value in changes.items():
    part, _, field = name.rpartition('.')
    if part:
      value = dataclasses.replace(getattr(experiment, part), **{field: value})
      field = part
    experiment = dataclasses.replace(experiment, **{field: value})
  return experiment
