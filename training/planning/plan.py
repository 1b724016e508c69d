"""The plan of a run before it starts: memory, time and cost, `train.py --plan`.

    python train.py --config=experiments/pretrain.py:8b --plan
    python train.py --config=experiments/pretrain.py:8b --plan=v5p:4x4x4

The first command computes formulas and takes seconds. The second one also
compiles the step of the run, for devices that are not here
(`hardware.targets`), and prints the compiler's figures beside the figures of
the formulas. No array is allocated and no data is opened.
"""

import dataclasses
import math
import re

from hardware import compile_ahead, peaks as peaks_lib, targets, xla_options
from models import flops
from parallel import parallel_config, placement as placement_lib
from training import experiment as experiment_lib, learner as learner_lib
from training.planning import choices, memory, scaling_laws
from training.rollouts import devices as rollout_devices

# Assumed model FLOPs utilisation (MFU): the share of the peak that a run
# reaches. Llama 3 405B reports 38 to 43 % on up to 16,384 H100
# (arXiv:2407.21783, table 4), PaLM 46 % (arXiv:2204.02311, table 3).
DEFAULT_MFU = 0.4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Remedy:
  """A change that makes a run fit; see `training.planning.remedy`."""

  flags: tuple[str, ...]  # of train.py
  bytes: float  # on one device, with the change
  is_confirmed: bool  # whether the compiler agrees that it fits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """The figures of a run. Bytes are per device, times are per step."""

  experiment: experiment_lib.Experiment
  target: str
  device_kind: str
  num_devices: int
  peaks: peaks_lib.Peaks
  num_params: int
  num_active_params: int
  flops_per_token: float
  memory: memory.Memory
  compiled: compile_ahead.Program | compile_ahead.OutOfMemory | None
  assumed_mfu: float
  price_per_device_hour: float  # in any currency; 0: unknown
  chosen: tuple[str, ...] = ()  # values of open fields, with the reasons
  remedy: Remedy | None = None  # found by `training.planning.remedy`

  @property
  def mesh(self) -> str:
    """The mesh axes of more than one device, as in 'data 2 x fsdp 4'."""
    parallel = self.experiment.parallel
    sizes = parallel.sizes(self.num_devices)
    split = [
      f'{name} {size}'
      for name, size in zip(parallel_config.AXES, sizes, strict=True)
      if size > 1
    ]
    return ' x '.join(split) if split else parallel.kind

  @property
  def tokens_per_step(self) -> int:
    """Tokens of a step on all devices; of the last step, if batches grow.

    Padding is counted: only the data tells how full rows are.
    """
    data = self.experiment.data
    return data.batch_size * data.row_length

  @property
  def tokens(self) -> int:
    """Tokens of the whole run."""
    data = self.experiment.data
    return data.rows_before(self.experiment.num_steps) * data.row_length

  @property
  def flops(self) -> float:
    """FLOPs of the whole run. Recomputed operations are counted once."""
    return self.tokens * self.flops_per_token

  @property
  def peak_flops_per_s(self) -> float:
    """Peak FLOP/s of one device in the compute dtype."""
    return self.peaks.flops_per_s[self.experiment.compute_dtype]

  @property
  def roofline(self) -> compile_ahead.Roofline | None:
    """The least time of a step; None unless the step was compiled."""
    if not isinstance(self.compiled, compile_ahead.Program):
      return None
    again = 4 / 3 if self.experiment.execution.remat in _FORWARD_TWICE else 1.0
    needed = self.tokens_per_step * self.flops_per_token / self.num_devices
    return compile_ahead.roofline(
      again * needed,
      self.compiled.traffic,
      self.peaks,
      self.experiment.compute_dtype,
    )

  @property
  def best_mfu(self) -> float:
    """MFU at the roofline; 1 unless the step was compiled."""
    if self.roofline is None:
      return 1.0
    rate = self.num_devices * self.peak_flops_per_s
    needed = self.tokens_per_step * self.flops_per_token
    return needed / rate / self.roofline.seconds

  @property
  def mfu(self) -> float:
    """Expected MFU: the assumed MFU, or the roofline's if it is lower."""
    return min(self.assumed_mfu, self.best_mfu)

  @property
  def step_seconds(self) -> float:
    """Expected time of a step, in seconds."""
    rate = self.num_devices * self.peak_flops_per_s * self.mfu
    return self.tokens_per_step * self.flops_per_token / rate

  @property
  def device_hours(self) -> float:
    """Expected device-hours of the whole run."""
    seconds = self.step_seconds * self.tokens / self.tokens_per_step
    return seconds * self.num_devices / 3600

  @property
  def cost(self) -> float:
    """Expected cost of the whole run, in the currency of the price."""
    return self.device_hours * self.price_per_device_hour

  @property
  def memory_needed(self) -> float:
    """Bytes per device, by the compiler if the step was compiled."""
    if isinstance(self.compiled, compile_ahead.OutOfMemory):
      return self.compiled.needed or self.memory.total
    if self.compiled is not None:
      return self.compiled.in_use
    return self.memory.total

  @property
  def formula_ratio(self) -> float:
    """The formula's memory over the compiler's."""
    return self.memory.total / self.memory_needed

  @property
  def fits(self) -> bool | None:
    """Whether the step fits its devices; None if their memory is unknown."""
    if isinstance(self.compiled, compile_ahead.OutOfMemory):
      return False
    if not self.peaks.memory_bytes:
      return None
    needed = self.memory_needed
    if self.compiled is not None:
      # Gaps between buffers take memory, too.
      needed = max(needed, self.compiled.allocated)
    return needed <= self.peaks.memory_bytes


# Rematerialisation policies that compute all products of a layer twice.
_FORWARD_TWICE = ('full', 'offload')


def make(
  experiment: experiment_lib.Experiment,
  target_name: str = targets.HERE,
  *,
  assumed_mfu: float = DEFAULT_MFU,
  price_per_device_hour: float = 0.0,
  is_compiled: bool = True,
) -> Plan:
  """Returns the plan of a run.

  Args:
    target_name: `here`, or a name that `hardware.targets` knows, as v5p:4x4x4.
    assumed_mfu: share of the peak that the run reaches, in (0, 1].
    price_per_device_hour: in any currency; 0 if unknown.

  Raises:
    ValueError: the experiment, the target or an assumption cannot be used.
  """
  if not 0 < assumed_mfu <= 1:
    raise ValueError(
      f'--plan_mfu: got {assumed_mfu}, expected a share of the peak, 0 < mfu'
      ' <= 1'
    )
  if not 0 <= price_per_device_hour < math.inf:
    raise ValueError(
      f'--price_per_device_hour: got {price_per_device_hour}, expected a'
      ' number >= 0'
    )
  experiment.validate()
  is_here = target_name == targets.HERE
  target = None if is_here else targets.parse(target_name)
  try:
    devices = rollout_devices.training(
      experiment, targets.devices(target) if target else None
    )
    chosen = choices.make(experiment, devices)
    learner = learner_lib.make(chosen.experiment, devices)
  except ValueError as error:
    is_about_devices = re.search('number of devices|platform', str(error))
    if target or not is_about_devices:
      raise
    raise ValueError(
      f'{error}; or plan for other devices, as in --plan=v5p:4x4x4'
    ) from None
  compiled = compile_step(learner) if target and is_compiled else None
  device = learner.placement.devices[0]
  return Plan(
    experiment=learner.experiment,
    chosen=chosen.reasons,
    target=target_name,
    device_kind=device.device_kind,
    num_devices=len(learner.placement.devices),
    peaks=peaks_lib.peaks(device),
    num_params=learner.num_params,
    num_active_params=flops.num_active_params(experiment.model),
    flops_per_token=learner.flops_per_token,
    memory=memory.estimate(learner),
    compiled=compiled,
    assumed_mfu=assumed_mfu,
    price_per_device_hour=price_per_device_hour,
  )


def compile_step(
  learner: learner_lib.Learner,
) -> compile_ahead.Program | compile_ahead.OutOfMemory:
  """Compiles the train step ahead of time, for devices that are not here.

  Raises:
    ValueError: the run uses pmap, which compiles for present devices only.
  """
  placement = learner.placement
  if not isinstance(placement, placement_lib.MeshPlacement):
    raise ValueError(
      f'parallel.kind: got {learner.experiment.parallel.kind} with --plan for'
      ' devices that are not here, expected mesh; set parallel.kind=mesh, which'
      ' computes the same, or plan with --plan alone'
    )
  return compile_ahead.compile(
    placement.lower_train(
      learner.build_train_step,
      learner.batch_shapes(),
      xla_options.of(placement.devices),
    )
  )


def report(plan: Plan) -> str:
  """Returns the plan as text, one figure per line."""
  lines = [
    *_run_lines(plan),
    *_memory_lines(plan),
    *_compiled_lines(plan),
    *_cost_lines(plan),
    *_scaling_lines(plan),
  ]
  return '\n'.join(f'{name:<16} {text}'.rstrip() for name, text in lines)


def _run_lines(plan: Plan):
  experiment = plan.experiment
  data = experiment.data
  yield 'experiment', experiment.name
  yield (
    'devices',
    f'{plan.num_devices} x {plan.device_kind} ({plan.target}),'
    f' {plan.mesh}, {experiment.compute_dtype}',
  )
  active = (
    f', of which a token uses {plan.num_active_params:,}'
    if plan.num_active_params != plan.num_params
    else ''
  )
  yield 'parameters', f'{plan.num_params:,}{active}'
  yield (
    'FLOPs per token',
    f'{plan.flops_per_token:.3e} of training, in rows of {data.row_length}',
  )
  yield (
    'batch',
    f'{data.batch_size:,} rows = {plan.tokens_per_step:,} tokens, in'
    f' {experiment.num_microbatches} micro-batches',
  )
  for reason in plan.chosen:
    yield 'chosen', reason
  yield (
    'run',
    f'{experiment.num_steps:,} steps, {plan.tokens:.3e} tokens,'
    f' {plan.flops:.3e} FLOPs',
  )


def _memory_lines(plan: Plan):
  parts = plan.memory
  remat = plan.experiment.execution.remat
  yield 'memory', 'of one device, by the formula'
  yield '  parameters', compile_ahead.size(parts.params)
  yield '  optimizer', compile_ahead.size(parts.optimizer)
  if parts.average:
    yield '  average of the weights', compile_ahead.size(parts.average)
  if parts.frozen:
    yield '  frozen models', compile_ahead.size(parts.frozen)
  yield '  gradients', compile_ahead.size(parts.gradients)
  if parts.cast:
    yield (
      '  cast',
      f'{compile_ahead.size(parts.cast)} in {plan.experiment.compute_dtype}',
    )
  yield (
    '  activations',
    f'{compile_ahead.size(parts.saved)} kept from layers (remat {remat})',
  )
  yield (
    '  one layer',
    f'{compile_ahead.size(parts.layers)} while its gradient is computed',
  )
  yield '  loss', f'{compile_ahead.size(parts.loss)} head and a chunk of logits'
  yield (
    '  embedding',
    f'{compile_ahead.size(parts.embedding)} gradient of the table',
  )
  if parts.update:
    yield (
      '  update',
      f'{compile_ahead.size(parts.update)} while matrices are orthogonalised',
    )
  limit = plan.peaks.memory_bytes
  share = (
    f' of {compile_ahead.size(limit)}, {parts.total / limit:.0%}'
    if limit
    else ''
  )
  yield (
    '  peak',
    f'{compile_ahead.size(parts.total)}{share}; not all exist at the same time',
  )


def _compiled_lines(plan: Plan):
  compiled = plan.compiled
  if compiled is None:
    return
  yield 'compiler', 'of the step as it would run, on one device'
  if isinstance(compiled, compile_ahead.OutOfMemory):
    needed = compile_ahead.size(compiled.needed) if compiled.needed else 'more'
    available = compiled.available or plan.peaks.memory_bytes
    yield (
      '  memory',
      f'needs {needed} of {compile_ahead.size(available)}: DOES NOT FIT',
    )
    return
  in_use, outputs, aliased, temporaries, allocated = map(
    compile_ahead.size,
    (
      compiled.in_use,
      compiled.outputs,
      compiled.aliased,
      compiled.temporaries,
      compiled.allocated,
    ),
  )
  yield (
    '  memory',
    f'{in_use} at its peak: formula {plan.formula_ratio:.1%} of it; arguments'
    f' {compile_ahead.size(compiled.arguments)}, outputs {outputs}'
    f' ({aliased} in place), temporaries {temporaries} with gaps:'
    f' {allocated} allocated',
  )
  for kind, (count, sent) in sorted(compiled.traffic.by_kind().items()):
    yield f'  {kind}', f'{count:,} times, {compile_ahead.size(sent)} sent'
  if compiled.traffic.unknown:
    yield (
      '  unknown',
      f'{", ".join(compiled.traffic.unknown)}: loops counted once, or'
      ' collectives not counted; hardware/hlo.py cannot read them',
    )
  roof = plan.roofline
  assert roof is not None
  yield (
    '  roofline',
    f'compute {roof.compute:.3g} s, HBM {roof.memory:.3g} s, interconnect'
    f' {roof.links:.3g} s: {roof.binds} binds, MFU at most {plan.best_mfu:.1%}',
  )


def _cost_lines(plan: Plan):
  if plan.fits is not None:
    yield 'fits', 'yes' if plan.fits else 'NO'
  if plan.fits is False:
    yield '  fix', _fix(plan.remedy)
  why = (
    'at the roofline' if plan.mfu < plan.assumed_mfu else 'assumed, --plan_mfu'
  )
  yield (
    'step',
    f'{plan.step_seconds:.3g} s at {plan.mfu:.1%} MFU ({why}) of'
    f' {plan.peak_flops_per_s / 1e12:.3g} TFLOP/s per device'
    f' ({plan.peaks.source})',
  )
  price = plan.price_per_device_hour
  money = (
    f', {_money(plan.cost)} at {price:g} per device-hour'
    if price
    else '; --price_per_device_hour adds the cost'
  )
  hours = plan.device_hours
  yield (
    'cost',
    f'{hours:,.4g} device-hours, {hours / plan.num_devices / 24:,.3g} days'
    f'{money}',
  )


def _money(amount: float) -> str:
  return f'{amount:,.0f}' if amount >= 100 else f'{amount:.3g}'


def _fix(remedy: Remedy | None) -> str:
  if remedy is None:
    return 'none found; take more devices, larger ones, or a smaller model'
  by = 'the compiler' if remedy.is_confirmed else 'the formula'
  taken = compile_ahead.size(remedy.bytes)
  return f'{" ".join(remedy.flags)} takes {taken}, says {by}'


def _scaling_lines(plan: Plan):
  num_params, tokens = plan.num_active_params, plan.tokens
  yield 'tokens', f'{tokens / num_params:.3g} per (active) parameter'
  for fit in scaling_laws.FITS:
    best_params, best_tokens = fit.optimum(plan.flops)
    excess = fit.loss(num_params, tokens) - fit.loss(best_params, best_tokens)
    yield (
      '',
      f'best for these FLOPs by {fit.source}: {best_params:.3g} parameters,'
      f' {best_tokens:.3g} tokens, {best_tokens / best_params:.3g} per'
      f' parameter; this size is {num_params / best_params:.2g} of that, its'
      f' loss {excess:+.3f} nats',
    )
