"""Choices: the open fields of an experiment, set by memory and modelled time.

    chosen = choices.make(experiment, devices, before)
    chosen.experiment    # with all fields set
    chosen.reasons       # for the first lines of a run

Rematerialisation and micro-batches are tried in the order of their modelled
time, until the memory formula of training/planning/memory.py fits the devices.
Per step, with C the time of the products at half of the peak rate, P the
parameters of a device and M micro-batches,

    C (1 + again(remat)) + M 12 P / bandwidth    the last if M > 1

because each micro-batch reads the sum of float32 gradients and its own new
gradients, and writes the sum. Measured on one H200 with the shape of
Llama-3.2-1B: minimal takes 10 % longer than none, and full 20 %.

On a CPU nothing is tried: remat is none, and a batch is not cut. The number of
micro-batches and of logits in a chunk of the loss change the order of sums, so
a resumed run keeps its recorded numbers on any device.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
from typing import Any, NamedTuple

import jax

from hardware import compile_ahead, peaks as peaks_lib
from models import flops
from models.layers import cross_entropy
from training import (
  execution,
  experiment as experiment_lib,
  learner as learner_lib,
)
from training.planning import memory
from training.rollouts import devices as rollout_devices

_AGAIN = {'none': 0.0, 'minimal': 0.1, 'full': 0.2}
_ASSUMED_MFU = 0.5
# Share of memory that stays free: the formula is inexact, and memory has gaps.
_MARGIN = 0.1


class Choices(NamedTuple):
  """An experiment with all fields set, and the reasons."""

  experiment: experiment_lib.Experiment
  reasons: tuple[str, ...] = ()  # for each open field; none on a CPU


def make(
  experiment: experiment_lib.Experiment,
  devices: Sequence[jax.Device] | None = None,
  before: Mapping[str, Any] | None = None,
) -> Choices:
  """Returns the choices for a run on the devices.

  Args:
    devices: devices that train, of the run or of an ahead-of-time target; None:
      all devices of the run, without the sampler's own.
    before: `config` in run.json, for a run that is resumed.

  Raises:
    ValueError: model, batch and devices do not fit each other.
  """
  devices = list(devices or rollout_devices.training(experiment))
  asked = experiment
  experiment, kept = _as_before(experiment, before)
  if devices[0].platform == 'cpu':
    return Choices(execution.settled(experiment, devices))
  limit = peaks_lib.memory_bytes(devices[0]) * (1 - _MARGIN)
  found, needed = execution.settled(experiment, devices), 0.0
  if limit and _is_open(experiment):
    found, needed = _first_that_fits(experiment, devices, limit)
  reasons = [*kept]
  if asked.execution.remat == experiment_lib.AUTO:
    reasons.append(f'remat {found.execution.remat}{_taken(needed, limit)}')
  if not experiment.num_microbatches:
    reasons.append(
      f'{found.num_microbatches} micro-batches{_taken(needed, limit)}'
    )
  if asked.execution.layers == experiment_lib.AUTO and found.model.scan_layers:
    reasons.append(_about_layers(found, devices))
  if not experiment.execution.loss_chunk_logits:
    size = found.execution.loss_chunk_logits
    reasons.append(
      f'loss in chunks of at most {size:,} logits, which take'
      f' {compile_ahead.size(4 * size)} in float32'
    )
  return Choices(found, tuple(reasons))


def _as_before(experiment, before):
  """Returns the experiment with the values of a resumed run, and texts."""
  if before is None:
    return experiment, []
  kept = []
  recorded = before.get('num_microbatches') or 1
  if not experiment.num_microbatches:
    experiment = dataclasses.replace(experiment, num_microbatches=recorded)
    kept.append(f'{recorded} micro-batches, as before')
  own = experiment.execution
  if not own.loss_chunk_logits:
    # Runs without this record used this number.
    recorded = before.get('execution', {}).get('loss_chunk_logits')
    recorded = recorded or cross_entropy.MAX_CHUNK_LOGITS
    own = dataclasses.replace(own, loss_chunk_logits=recorded)
    experiment = dataclasses.replace(experiment, execution=own)
    kept.append(f'loss in chunks of at most {recorded:,} logits, as before')
  return experiment, kept


def _is_open(experiment) -> bool:
  return (
    experiment.execution.remat == experiment_lib.AUTO
    or not experiment.num_microbatches
  )


def _first_that_fits(experiment, devices, limit):
  """Returns the fastest candidate that fits, else the smallest, and bytes."""
  smallest = None
  for candidate in sorted(
    _candidates(experiment),
    key=lambda candidate: _seconds(candidate, devices),
  ):
    try:
      learner = learner_lib.make(candidate, devices)
    except ValueError:
      if candidate.num_microbatches == (experiment.num_microbatches or 1):
        raise
      continue  # rows do not divide
    total = memory.estimate(learner).total
    if total <= limit:
      return learner.experiment, total
    if smallest is None or total < smallest[1]:
      smallest = learner.experiment, total
  assert smallest is not None
  return smallest


def _candidates(experiment) -> Iterator[experiment_lib.Experiment]:
  remat = experiment.execution.remat
  remats = _AGAIN if remat == experiment_lib.AUTO else (remat,)
  numbers = [experiment.num_microbatches]
  if not numbers[0]:
    sizes = experiment.data.batch_sizes
    powers = [2**i for i in range(min(sizes).bit_length())]
    numbers = [n for n in powers if not any(size % n for size in sizes)]
  for number in numbers:
    for name in remats:
      yield dataclasses.replace(
        experiment,
        num_microbatches=number,
        execution=dataclasses.replace(experiment.execution, remat=name),
      )


def _seconds(experiment, devices) -> float:
  """Returns the modelled time of a step."""
  peaks = peaks_lib.peaks(devices[0])
  rate = _ASSUMED_MFU * peaks.flops_per_s[experiment.compute_dtype]
  tokens = experiment.data.batch_size * experiment.data.row_length
  params = flops.num_params(experiment.model)
  products = 6 * params * tokens / len(devices) / rate
  again = _AGAIN.get(experiment.execution.remat, 1 / 3)
  number = experiment.num_microbatches
  sums = number * 12 * params / peaks.bytes_per_s if number > 1 else 0.0
  return products * (1 + again) + sums


def _taken(needed: float, limit: float) -> str:
  if not needed:
    return ' (the memory of the devices is unknown)'
  sizes = f'{compile_ahead.size(needed)} of {compile_ahead.size(limit)}'
  return f' (takes {sizes}{"" if needed <= limit else ": DOES NOT FIT"})'


def _about_layers(experiment, devices) -> str:
  if experiment.execution.layers == 'scanned':
    return 'layers scanned (the program compiles one of them)'
  learner = learner_lib.make(experiment, devices)
  saved = memory.estimate(learner).saved
  seconds = 2 * saved / peaks_lib.peaks(devices[0]).bytes_per_s
  return (
    f'layers apart (a loop would copy {compile_ahead.size(saved)} of results'
    f' twice, {1e3 * seconds:.1f} ms)'
  )
