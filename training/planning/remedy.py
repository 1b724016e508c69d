"""Makes a run fit its devices: the smallest change of how it is computed.

What is changed costs time, never the result: more is computed twice (remat),
the batch is taken in more parts (micro-batches), and what every replica holds
is split over them (fsdp, tensor). The formula proposes, cheapest first; for a
target the compiler confirms.
"""

from collections.abc import Iterator
import dataclasses
import itertools
from typing import Any

from hardware import compile_ahead, targets
from training import experiment as experiment_lib, learner as learner_lib
from training.planning import memory, plan as plan_lib

# How dear a change is, to order them by: recomputing products costs a third,
# each doubling of the micro-batches gathers the weights once more per half of
# the work, a split of every weight over more devices does so in every layer,
# and a split of every product communicates activations besides.
_REMAT = {'none': 0, 'minimal': 1, 'full': 2}
_PER_DOUBLING, _ALL_FSDP, _PER_TENSOR_DOUBLING = 3, 4, 8
_MOST_DOUBLINGS = 6
# A formula is not the compiler: what it proposes leaves this share free.
_MARGIN = 0.1
# Compiling takes minutes.
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
      continue  # it does not divide
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

  Not all of them are valid: rows and widths may not divide.
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
