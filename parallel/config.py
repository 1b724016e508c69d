"""ParallelConfig: how one run is spread over devices."""

import dataclasses

KINDS = ('mesh', 'pmap')


@dataclasses.dataclass(kw_only=True)
class ParallelConfig:
  """A mesh of data x fsdp x tensor devices, or plain pmap."""

  kind: str = 'mesh'  # mesh: jit over named axes | pmap: data parallel only
  data: int = -1  # batch axis, params replicated; -1: all remaining devices
  fsdp: int = 1  # batch axis, params and optimizer state split
  tensor: int = 1  # heads, feed-forward and vocabulary split

  def validate(self) -> None:
    """Raises ValueError for a layout that no set of devices can have."""
    if self.kind not in KINDS:
      raise ValueError(
        f'parallel.kind: got {self.kind!r}, expected one of {", ".join(KINDS)}'
      )
    for name in ('data', 'fsdp', 'tensor'):
      size = getattr(self, name)
      if size < 1 and not (name == 'data' and size == -1):
        raise ValueError(
          f'parallel.{name}: got {size}, expected a positive number of'
          ' devices (or -1 for data: all that remain)'
        )
    if self.kind == 'pmap' and (self.fsdp > 1 or self.tensor > 1):
      raise ValueError(
        f'parallel.kind: got pmap with fsdp = {self.fsdp}, tensor ='
        f' {self.tensor}, expected 1 and 1: pmap replicates every parameter;'
        ' use kind=mesh to split them'
      )
