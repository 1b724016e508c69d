"""EngineConfig: the layout of an engine, checked when it is made.

Imports no JAX: serve.py makes a flag of each field, and `--help` should not
wait for JAX.
"""

from collections.abc import Sequence
import dataclasses
import math

from checks import expect, flag_field
from inference.engine import config_checks, memory_sizes
from inference.scheduling import limits as limits_lib

NUMERICS = ('fast', 'invariant')
TENSOR_PARTS = (0, 2, 4, 8)
KV_DTYPES = ('model', 'int8', 'fp8')
ATTENTION = ('auto', 'reference', 'kernel')
NATIVE = ('auto', 'on', 'off')
SPECULATION = ('off', 'ngram', 'model', 'head')
MAX_SEQUENCES = 32  # unless flags say otherwise

# Share of the memory left by the weights that pages may take. Activations take
# the rest.
_KV_SHARE = 0.8
# The same for a CPU: its memory also serves the rest of the machine.
_HOST_SHARE = 0.25
# What pages take of a CPU's memory unless a flag says more. One sequence of the
# whole context always has room, if the share allows it.
_HOST_BYTES = 2**30

# A span of 8 tokens: the rows of a tile with invariant numerics.
_DRAFT_TOKENS = 7
_MADE_TOKENS = 4  # of a draft model or head
_ADAPTER_RANK = 16  # room for later ones, where none is given


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
  """The layout of an engine; every field is a flag `--engine.NAME` of serve.py.

  Raises:
    ValueError: a value is out of range.
  """

  max_sequences: int = flag_field.field(
    None,
    'Number of sequences that run at once. Raise it for more throughput; each'
    ' sequence needs room in the KV cache. Default: the largest of'
    ' decode_shapes, else 32.',
  )
  max_length: int = flag_field.field(
    0,
    'Largest number of tokens of a prompt and its completion. 0: the context of'
    ' the model. Less needs less memory.',
  )
  page_size: int = flag_field.field(
    16,
    'Tokens per page of the KV cache, Q: a divisor or a multiple of 64. 0 gives'
    ' each sequence one page for the whole context (a dense cache).',
  )
  num_pages: int = flag_field.field(
    0,
    'Number of pages in the KV cache. 0 takes as many as kv_memory holds, but'
    ' not more than max_sequences sequences of the whole context need.',
  )
  kv_memory: str = flag_field.field(
    '',
    'Memory of the KV cache, such as 2GiB or 500MB. If not given: four fifths'
    ' of what the weights leave free; on a CPU 1GiB, or what one sequence of'
    ' the whole context needs.',
  )
  chunk_tokens: int = flag_field.field(
    16,
    'Prompt tokens per chunk, R. A prompt is computed in chunks of this size.',
  )
  max_chunks: int = flag_field.field(
    None,
    'Largest number of prompt chunks in a step in which no sequence decodes.'
    ' Default: 16, or max_mixed_chunks if that is more.',
  )
  max_mixed_chunks: int = flag_field.field(
    None,
    'Largest number of prompt chunks in a step in which sequences decode. It'
    ' bounds how long prompts delay running sequences. Lower it for a steadier'
    ' inter-token latency, raise it for a shorter time to first token. Default:'
    ' 4, or max_chunks if that is less.',
  )
  # 1000: measured on CPU, attention to so many tokens takes as long as the
  # other matrix products of a chunk.
  stall_context: int = flag_field.field(
    1000,
    'A prompt chunk that attends to this many earlier tokens counts twice'
    ' against max_mixed_chunks; with twice as many, three times. Lower it if'
    ' long prompts delay other requests.',
  )
  tensor: int = flag_field.field(
    1,
    'Number of devices that share the model: each has some heads, a part of the'
    ' MLP and of the vocabulary, and the KV cache of its heads. For models that'
    ' one device does not hold, or for a shorter time per token.',
  )
  experts: int = flag_field.field(
    1,
    'Groups into which the devices of engine.tensor are divided for the experts'
    ' of a mixture: a group has some experts whole, and its devices share their'
    ' width. More groups make larger products, and all devices wait for the'
    ' group whose experts are asked most.',
  )
  prefill_engines: int = flag_field.field(
    0,
    'Further engines that only compute prompts, so that a long prompt delays no'
    ' token of other answers. Each takes engine.tensor more devices, a copy of'
    ' the weights, and its own pages. A prompt of more than chunk_tokens goes'
    ' to one of them. Over several processes, each gives all engines as many of'
    ' its devices. 0: prompts are computed beside answers.',
  )
  tensor_parts: int = flag_field.field(
    0,
    'Parts into which the model is cut with numerics=invariant: 2, 4 or 8. The'
    ' bits of an answer are then the same for every number of devices that'
    ' divides it, 1 included. 0: 8 over several devices, none on one. It costs'
    ' time: smaller products, and terms that are sent apart.',
  )
  kv_dtype: str = flag_field.field(
    'model',
    'Dtype of the KV cache: model (the dtype of the computation), int8 or fp8'
    ' (e4m3). Both have a float32 scale per token and head, and hold more'
    ' tokens.',
  )
  numerics: str = flag_field.field(
    'fast',
    'fast (XLA chooses the shapes of its operations) or invariant (the bits of'
    ' a token do not depend on the other sequences of its batch; slower, see'
    ' models/linear/invariant.py).',
  )
  attention: str = flag_field.field(
    'auto',
    'auto (the kernel of the platform if it supports the model, else plain'
    ' JAX), kernel (the kernel, or an error) or reference (plain JAX). The'
    ' kernel of a CPU is native code; auto takes it beside native products.',
  )
  native: str = flag_field.field(
    'auto',
    'Products with kernels in fewer bits, and on a CPU of up to 8 tokens with'
    ' floats of 64 MiB or more: auto (on a CPU native code, built once with the'
    ' C++ compiler that is installed, or plain JAX without one; on GPU and TPU'
    ' Pallas kernels), on (the same, on a CPU for floats of any size, or an'
    ' error) or off (plain JAX). Such code has float32 sums in every dtype.'
    ' Engines of several devices compute in plain JAX.',
  )
  decode_steps: int = flag_field.field(
    32,
    'Largest number of decode steps that are sent to the device at once, while'
    ' no prompt is computed; 8 while requests wait. More steps save work of the'
    ' host. They do not change any token.',
  )
  stream_seconds: float = flag_field.field(
    0.04,
    'Longest time of the decode steps that are sent at once: tokens of a stream'
    ' arrive in groups of this time, and a new request waits for up to two'
    ' groups. 0: no limit, for work without streams.',
  )
  speculation: str = flag_field.field(
    'off',
    'Guess the next tokens of an answer, and verify several in one step: off,'
    ' ngram (the tokens that followed the same words before, in the prompt or'
    ' the answer), model (a smaller model guesses, see draft_model) or head (a'
    ' small network that was trained for this model, see draft_head). No token'
    ' changes, but for rounding with numerics=fast. It is off by itself where'
    ' it would lose time.',
  )
  draft_model: str = flag_field.field(
    '',
    'Frozen directory of the model that guesses, with speculation=model. It has'
    ' the tokenizer of the model; five times smaller or more is best. Its'
    ' weights and its KV cache take memory, too, on each device of'
    ' engine.tensor.',
    is_path=True,
  )
  draft_head: str = flag_field.field(
    '',
    'Directory of the draft head, with speculation=head: the frozen result of'
    ' experiments/draft_head.py. It was trained for these weights.',
    is_path=True,
  )
  draft_tokens: int | None = flag_field.field(
    None,
    'Largest number of tokens that are guessed at once for a sequence; needs'
    ' speculation. A step computes one token more per sequence. Beside prompts'
    ' guesses are shorter: they take places of decoding sequences. Default: 7,'
    ' or 4 with a draft model or head, whose tokens take time.',
  )
  constraints: bool = flag_field.field(
    True,
    'Answer requests whose text a grammar constrains. Their programs are'
    ' compiled when the first such request arrives.',
  )
  prefix_cache: bool = flag_field.field(
    True,
    'Keep the pages of earlier prompts, and reuse them for equal prefixes.',
  )
  share_prefixes: bool = flag_field.field(
    False,
    'Share cached prefixes between API keys (principals) too. A client can then'
    ' find out, by timing, what another client has asked.',
  )
  max_waiting: int = flag_field.field(
    1024,
    'Largest number of sequences that wait. Requests beyond it are refused as'
    ' overload. One API key may have seven eighths of the places that others'
    ' leave.',
  )
  aging_steps: int = flag_field.field(
    256,
    'Number of steps of waiting that lift a sequence by one priority level.',
  )
  decode_shapes: tuple[int, ...] = flag_field.field(
    (),
    'Numbers of decoding sequences to compile a step for; the largest must be'
    ' max_sequences. Empty means powers of two. Fewer compile faster.',
  )
  max_adapters: int | None = flag_field.field(
    None,
    'Number of LoRA adapters that can be loaded beside the base at once. Each'
    ' step computes with all of these places, used or not. Default: as many as'
    ' --adapters names.',
  )
  max_adapter_rank: int | None = flag_field.field(
    None,
    'Largest rank of an adapter; all take the memory of this rank. Default: the'
    ' largest of --adapters, else 16.',
  )

  def __post_init__(self):
    for name, value in (
      ('max_sequences', max(self.decode_shapes, default=MAX_SEQUENCES)),
      ('max_chunks', max(16, self.max_mixed_chunks or 0)),
      ('max_mixed_chunks', None),
    ):
      if getattr(self, name) is None:
        # The second of the chunks' defaults follows the first.
        value = min(4, self.max_chunks) if value is None else value
        object.__setattr__(self, name, value)
    expect.one_of('engine.numerics', self.numerics, NUMERICS)
    expect.one_of('engine.kv_dtype', self.kv_dtype, KV_DTYPES)
    expect.one_of('engine.attention', self.attention, ATTENTION)
    expect.one_of('engine.native', self.native, NATIVE)
    expect.one_of('engine.speculation', self.speculation, SPECULATION)
    if self.draft_tokens is not None:
      expect.at_least('engine.draft_tokens', self.draft_tokens, 1)
      if self.speculation == 'off':
        raise ValueError(
          f'engine.draft_tokens: got {self.draft_tokens} without speculation,'
          ' expected none; add --engine.speculation=ngram'
        )
    config_checks.drafts(self)
    expect.at_least('engine.tensor', self.tensor, 1)
    expect.at_least('engine.experts', self.experts, 1)
    expect.one_of('engine.tensor_parts', self.tensor_parts, TENSOR_PARTS)
    config_checks.parts(self)
    config_checks.prefill(self)
    expect.at_least('engine.num_pages', self.num_pages, 0)
    expect.at_least('engine.max_length', self.max_length, 0)
    if self.kv_memory:
      memory_sizes.num_bytes('engine.kv_memory', self.kv_memory)
      if self.num_pages:
        raise ValueError(
          f'engine.kv_memory: got {self.kv_memory} and num_pages ='
          f' {self.num_pages}, expected one of them; leave one out'
        )
    expect.at_least('engine.max_waiting', self.max_waiting, 0)
    expect.at_least('engine.decode_steps', self.decode_steps, 1)
    expect.at_least('engine.max_adapters', self.max_adapters or 0, 0)
    if self.max_adapter_rank is not None:
      expect.at_least('engine.max_adapter_rank', self.max_adapter_rank, 1)
    if not 0 <= self.stream_seconds < math.inf:
      raise ValueError(
        f'engine.stream_seconds: got {self.stream_seconds}, expected a finite'
        ' number of seconds, at least 0'
      )
    tile, size = _tile_slots(), self.page_size
    if size < 0 or (size and tile % size and size % tile):
      raise ValueError(
        f'engine.page_size: got {size}, expected a divisor or a multiple of'
        f' {tile}, or 0 for one page per sequence'
      )
    shapes = self.decode_shapes
    if shapes and not (min(shapes) >= 1 and max(shapes) == self.max_sequences):
      raise ValueError(
        f'engine.decode_shapes: got {shapes}, expected numbers >= 1, the'
        f' largest of them max_sequences = {self.max_sequences}'
      )
    self.limits(tile)  # Limits checks its own fields

  @property
  def num_devices(self) -> int:
    """The devices that the engine takes."""
    return self.tensor * (1 + self.prefill_engines)

  @property
  def num_parts(self) -> int:
    """The parts that a model is cut into; 1: it stays whole."""
    if self.numerics == 'invariant' and self.tensor > 1:
      return self.tensor_parts or TENSOR_PARTS[-1]
    return self.tensor_parts or self.tensor

  @property
  def expert_groups(self) -> int:
    """The groups of devices among which experts are divided.

    Fewer than `experts` where a device holds the parts of several groups.
    """
    return min(self.experts, self.tensor)

  def holding(self, ranks: Sequence[int]) -> 'EngineConfig':
    """Returns the config with room for adapters, where it leaves that open.

    Args:
      ranks: the largest of each adapter.

    Raises:
      ValueError: there are more of them than the config allows, or one has a
        larger rank.
    """
    most, rank = self.max_adapters, self.max_adapter_rank
    most = len(ranks) if most is None else most
    if rank is None:
      rank = max(ranks, default=_ADAPTER_RANK)
    if len(ranks) > most:
      raise ValueError(
        f'--adapters: got {len(ranks)} adapters, expected at most {most}'
        ' (engine.max_adapters); raise it'
      )
    if max(ranks, default=0) > rank:
      raise ValueError(
        f'--adapters: got one of rank {max(ranks)}, expected at most {rank}'
        ' (engine.max_adapter_rank); raise it'
      )
    return dataclasses.replace(self, max_adapters=most, max_adapter_rank=rank)

  def context(self, model_length: int) -> int:
    """Returns the most tokens of a sequence: max_length, or the model's.

    Raises:
      ValueError: max_length is more than the model has positions for.
    """
    if self.max_length > model_length:
      raise ValueError(
        f'engine.max_length: got {self.max_length}, expected at most the'
        f' {model_length} tokens of the context of the model'
      )
    return self.max_length or model_length

  def page_tokens(self, max_length: int) -> int:
    """Returns Q, tokens per page; a dense page holds the padded context."""
    return self.page_size or _whole_tiles(max_length)

  def limits(self, page_tokens: int) -> limits_lib.Limits:
    """Returns the limits that the scheduler plans within."""
    return limits_lib.Limits(
      max_sequences=self.max_sequences,
      chunk_tokens=self.chunk_tokens,
      max_chunks=self.max_chunks,
      max_mixed_chunks=self.max_mixed_chunks,
      stall_context=self.stall_context,
      page_size=page_tokens,
      aging_steps=self.aging_steps,
    )

  def table_width(self, max_length: int) -> int:
    """Returns L, the pages of a sequence that fills the context."""
    # The padding of the last chunk may reach beyond the context.
    slots = _whole_tiles(max_length + self.chunk_tokens)
    return -(-slots // self.page_tokens(max_length))

  def step_shapes(self) -> list[tuple[int, int]]:
    """Returns the shapes (D decodes, X chunks) that steps are compiled for.

    Steps without chunks run most often: they get every power of two. A step
    with chunks takes most of its time for them, so few numbers of decodes are
    compiled beside them.
    """
    most = self.max_sequences
    decodes = self.decode_shapes or _powers(most)
    shapes = [(num, 0) for num in decodes]
    shapes += [(0, chunks) for chunks in _powers(self.max_chunks)]
    if most == 1:
      return shapes  # the only sequence either decodes or has chunks
    mixed = {next(num for num in decodes if 4 * num >= most), most}
    shapes += [
      (num, chunks)
      for num in sorted(mixed)
      for chunks in _powers(self.max_mixed_chunks)
    ]
    return shapes

  def verified_shapes(self) -> list[tuple[int, int]]:
    """Returns the shapes (X spans, R tokens) of steps that verify drafts.

    Half the width, too: few tokens of a draft may be worth their time.
    """
    if self.speculation == 'off':
      return []
    usual = _DRAFT_TOKENS if self.speculation == 'ngram' else _MADE_TOKENS
    most = (self.draft_tokens or usual) + 1
    widths = sorted({max(most // 2, 2), most})
    decodes = self.decode_shapes or _powers(self.max_sequences)
    return [(num, width) for num in decodes for width in widths]

  def pool_pages(
    self,
    context: int,
    *,
    bytes_per_token: float,
    weight_bytes: float,
    memory_bytes: int,
    is_host: bool,
  ) -> int:
    """Returns P, the pages of the pool: `num_pages` or what fits, and page 0.

    Args:
      context: tokens of the longest sequence.
      bytes_per_token: of the KV cache, all layers.
      weight_bytes: of the model.
      memory_bytes: of the device.
      is_host: whether the device is the CPU.

    Raises:
      ValueError: the memory does not hold a page, or `kv_memory` not a sequence
        of the whole context.
    """
    tokens = self.page_tokens(context)
    page_bytes = bytes_per_token * tokens
    per_sequence = -(-context // tokens)
    if self.num_pages:
      return self.num_pages + 1
    if self.kv_memory:
      room = (
        memory_sizes.num_bytes('engine.kv_memory', self.kv_memory) - page_bytes
      )  # page 0
    else:
      share = _HOST_SHARE if is_host else _KV_SHARE
      room = (memory_bytes - weight_bytes) * share
      if is_host:
        room = min(room, max(_HOST_BYTES, per_sequence * page_bytes))
    num_pages = min(self.max_sequences * per_sequence, int(room // page_bytes))
    if self.kv_memory and num_pages < per_sequence:
      least = math.ceil((per_sequence + 1) * page_bytes / 2**20)
      raise ValueError(
        f'engine.kv_memory: got {self.kv_memory}, expected at least {least}MiB,'
        f' for one sequence of {context} tokens; raise it, or lower'
        ' engine.max_length'
      )
    if num_pages < 1:
      raise ValueError(
        f'engine.num_pages: got room for {num_pages} pages of {tokens} tokens'
        f' of {bytes_per_token:,.0f} bytes, expected at least one; use a larger'
        ' device, smaller pages or kv_dtype int8'
      )
    return num_pages + 1


def _tile_slots() -> int:
  from models.attention import paged  # here, since it imports JAX

  return paged.TILE_SLOTS


def _whole_tiles(num_tokens: int) -> int:
  tile = _tile_slots()
  return -(-num_tokens // tile) * tile


def _powers(most: int) -> tuple[int, ...]:
  """Returns the powers of two below `most`, then `most`."""
  return (*(1 << i for i in range((most - 1).bit_length())), most)
