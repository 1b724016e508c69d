"""ParallelConfig: the mesh axes and sizes that spread a run over devices."""

import dataclasses
import math

from checks import expect

KINDS = ('mesh', 'pmap')
CONTEXT_ATTENTION = ('ring', 'gather')

# Mesh axes, which are fields of ParallelConfig. Devices along the last axis are
# the nearest ones: the order is by growing traffic along an axis.
AXES = ('stage', 'data', 'fsdp', 'expert', 'context', 'tensor')


@dataclasses.dataclass(kw_only=True)
class ParallelConfig:
  """A mesh of named axes, or plain pmap.

  `stage` to `tensor` are numbers of devices; their product is the number of all
  devices. See parallel/rules.py for the arrays that each axis splits.
  """

  kind: str = 'mesh'  # mesh: jit over named axes | pmap: data parallel only
  stage: int = 1  # pipeline parallelism: splits the stack of layers
  data: int = -1  # splits the batch, copies params; -1: all remaining devices
  fsdp: int = 1  # splits the batch, the params and the optimizer state
  expert: int = 1  # splits the batch and the experts
  context: int = 1  # splits the tokens of each row
  tensor: int = 1  # splits heads, feed-forward and vocabulary
  context_attention: str = 'ring'  # ring: keys travel | gather: keys collected
  stage_repeats: int = 1  # times that a row passes a stage; > 1: circular
  stage_microbatches: int = 0  # micro-batches in the pipeline; 0: one per stage

  @property
  def num_stage_microbatches(self) -> int:
    """Micro-batches into which the pipeline cuts its rows."""
    return self.stage_microbatches or self.stage

  def validate(self) -> None:
    """Raises ValueError for a layout that is impossible on any devices."""
    expect.one_of('parallel.kind', self.kind, KINDS)
    expect.one_of(
      'parallel.context_attention', self.context_attention, CONTEXT_ATTENTION
    )
    for name in (*AXES, 'stage_repeats'):
      size = getattr(self, name)
      if name == 'data' and size == -1:
        continue
      fix = 'set -1 for all remaining devices' if name == 'data' else ''
      expect.at_least(f'parallel.{name}', size, 1, fix)
    self._validate_stages()
    split = {
      name: getattr(self, name)
      for name in AXES
      if name != 'data' and getattr(self, name) > 1
    }
    if self.kind == 'pmap' and split:
      raise ValueError(
        'parallel.kind: got pmap with'
        f' {", ".join(f"{k} = {v}" for k, v in split.items())}, expected 1:'
        ' pmap replicates every parameter; use kind=mesh to split them'
      )

  def _validate_stages(self) -> None:
    if self.stage == 1 and (self.stage_repeats, self.stage_microbatches) != (
      1,
      0,
    ):
      raise ValueError(
        f'parallel: got stage_repeats = {self.stage_repeats} and'
        f' stage_microbatches = {self.stage_microbatches} without stages,'
        ' expected 1 and 0; set parallel.stage'
      )
    expect.at_least('parallel.stage_microbatches', self.stage_microbatches, 0)
    expect.multiple_of(
      'parallel.stage_microbatches',
      self.num_stage_microbatches,
      'parallel.stage',
      self.stage,
      'set 0 for as many micro-batches as stages',
    )
    if self.stage > 1 and self.context > 1:
      raise ValueError(
        f'parallel: got stage = {self.stage} and context = {self.context},'
        ' expected one of them to be 1: stages run side by side under vmap, in'
        ' which ring and gather attention cannot exchange keys; change one of'
        ' them'
      )

  def sizes(self, num_devices: int) -> tuple[int, ...]:
    """Returns the size of each axis of AXES over `num_devices` devices.

    Raises:
      ValueError: the axes do not multiply to the number of devices.
    """
    sizes = [getattr(self, name) for name in AXES]
    if self.data == -1:
      others = math.prod(sizes) * -1
      sizes[AXES.index('data')] = max(num_devices // others, 1)
    if math.prod(sizes) != num_devices:
      shown = [
        (name, size)
        for name, size in zip(AXES, sizes, strict=True)
        if size > 1 or name == 'data'
      ]
      raise ValueError(
        f'parallel: got {" x ".join(name for name, _ in shown)} ='
        f' {" x ".join(str(size) for _, size in shown)} = {math.prod(sizes)},'
        f' expected the number of devices, {num_devices}; change the sizes so'
        ' that their product is that number'
      )
    return tuple(sizes)
