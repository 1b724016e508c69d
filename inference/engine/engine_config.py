"""How an engine is laid out: rows, pages, numerics. Checked when it is made."""

import dataclasses

from hardware import peaks
from inference.scheduling import scheduler
from models import kv_cache, model_config
from models.attention import paged

NUMERICS = ('fast', 'invariant')
KV_DTYPES = ('model', kv_cache.INT8)
ATTENTION = ('auto', 'reference', 'kernel')

# Of the memory that weights leave, for pages; the rest is for activations.
_KV_SHARE = 0.8
# Of the memory of a host, which has other things to do than serve.
_HOST_SHARE = 0.25


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
  """Every field is a flag of serve.py.

  Raises:
    ValueError: a value that cannot be.
  """

  max_sequences: int = 32  # that run at once
  page_size: int = 16  # Q, tokens; 0: one page for the whole context (dense)
  num_pages: int = 0  # of the pool; 0: what memory allows, at most what fills
  block_rows: int = 16  # R, prompt tokens computed together
  max_blocks: int = 16  # of a step without decode rows
  # Of a step with some: what bounds how long a prompt stalls others.
  max_mixed_blocks: int = 4
  # Tokens before a block that make it count twice there: on CPU, where it was
  # measured, attention to so many takes as long as the block's products.
  stall_context: int = 1000
  kv_dtype: str = 'model'  # what pages are stored as, one of KV_DTYPES
  # fast: XLA's choice of shapes; invariant: a token's bits do not depend on
  # its company, see models/invariant.py.
  numerics: str = 'fast'
  # auto: the platform's kernel where there is one | kernel: it, or an error |
  # reference: plain JAX.
  attention: str = 'auto'
  prefix_cache: bool = True
  share_prefixes: bool = False  # between principals; tells who asked for what
  max_waiting: int = 1024  # sequences; more are refused
  aging_steps: int = 256  # of waiting that are worth a level of priority
  decode_shapes: tuple[int, ...] = ()  # rows compiled for; (): powers of two

  def __post_init__(self):
    for name, allowed in (
      ('numerics', NUMERICS),
      ('kv_dtype', KV_DTYPES),
      ('attention', ATTENTION),
    ):
      if getattr(self, name) not in allowed:
        raise ValueError(
          f'engine.{name}: got {getattr(self, name)!r}, expected one of'
          f' {", ".join(allowed)}'
        )
    tile = paged.TILE_SLOTS
    size = self.page_size
    if size < 0 or (size and tile % size and size % tile):
      raise ValueError(
        f'engine.page_size: got {size}, expected a divisor or a multiple of'
        f' {tile}, or 0 for one page per sequence'
      )
    for name in ('num_pages', 'max_waiting'):
      if getattr(self, name) < 0:
        raise ValueError(
          f'engine.{name}: got {getattr(self, name)}, expected a number >= 0'
        )
    shapes = self.decode_shapes
    if shapes and not (min(shapes) >= 1 and max(shapes) == self.max_sequences):
      raise ValueError(
        f'engine.decode_shapes: got {shapes}, expected numbers >= 1, the'
        f' largest of them max_sequences = {self.max_sequences}'
      )
    self.limits(tile)  # checks what the scheduler is told

  def page_tokens(self, max_length: int) -> int:
    """Returns Q: of a dense layout the context, in whole tiles."""
    return self.page_size or _tiles(max_length)

  def limits(self, page_tokens: int) -> scheduler.Limits:
    """Returns what the scheduler plans for."""
    return scheduler.Limits(
      max_sequences=self.max_sequences,
      block_rows=self.block_rows,
      max_blocks=self.max_blocks,
      max_mixed_blocks=self.max_mixed_blocks,
      stall_context=self.stall_context,
      page_size=page_tokens,
      aging_steps=self.aging_steps,
    )

  def table_width(self, max_length: int) -> int:
    """Returns L, pages of a sequence of the whole context."""
    # A block may reach beyond a context that it ends with.
    slots = _tiles(max_length + self.block_rows)
    return -(-slots // self.page_tokens(max_length))

  def step_shapes(self) -> list[tuple[int, int]]:
    """Returns the (D, X) that steps are compiled for.

    Decode alone in powers of two, since that is what runs most; beside blocks,
    which dominate a step, few. Blocks alone in powers of two.
    """
    most = self.max_sequences
    decodes = self.decode_shapes or _powers(most)
    shapes = [(rows, 0) for rows in decodes]
    shapes += [(0, blocks) for blocks in _powers(self.max_blocks)]
    if most == 1:
      return shapes  # nobody is there to be beside
    mixed = {next(rows for rows in decodes if 4 * rows >= most), most}
    shapes += [
      (rows, blocks)
      for rows in sorted(mixed)
      for blocks in _powers(self.max_mixed_blocks)
    ]
    return shapes

  def pool_pages(
    self,
    model: model_config.ModelConfig,
    *,
    bytes_per_token: float,
    weight_bytes: float,
    device,
  ) -> int:
    """Returns P: page 0, and what was asked for or what memory allows.

    Raises:
      ValueError: not one sequence of the whole context would fit.
    """
    tokens = self.page_tokens(model.max_length)
    per_sequence = -(-model.max_length // tokens)
    if not (num_pages := self.num_pages):
      memory = peaks.memory_bytes(device)
      share = _HOST_SHARE if device.platform == 'cpu' else _KV_SHARE
      room = (memory - weight_bytes) * share
      fitting = int(room // (bytes_per_token * tokens))
      num_pages = min(self.max_sequences * per_sequence, fitting)
    if num_pages < 1:
      raise ValueError(
        f'engine.num_pages: got room for {num_pages} pages of {tokens} tokens'
        f' of {bytes_per_token:,.0f} bytes, expected at least one; use a larger'
        ' device, smaller pages or kv_dtype int8'
      )
    return num_pages + 1


def _tiles(num_tokens: int) -> int:
  tile = paged.TILE_SLOTS
  return -(-num_tokens // tile) * tile


def _powers(most: int) -> tuple[int, ...]:
  """Powers of two below `most`, and that."""
  return (*(1 << i for i in range((most - 1).bit_length())), most)
