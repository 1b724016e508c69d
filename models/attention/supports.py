"""The table of attention implementations and their capabilities.

A `Path` is one row of the table. A `Request` describes a model with its run and
devices, or the shapes of one call. `problem(path, request)` returns the reason
for which a path refuses a request. Training and serving both ask it before they
compile, and kernels ask it when they are called.

To add a rule of scores: add a field to `models.attention.form.Form`, compute it
in `models/attention/dense.py`, and add its name to `DENSE.form` alone. Every
other path then refuses models that use the rule, until its row has the name.
"""

from collections.abc import Callable
import dataclasses
import math

import jax
import jax.numpy as jnp

from models import kv_cache, model_config
from models.attention import form as form_lib

LANES = 128  # numbers in a row of a TPU's vector registers
_GPUS = 'gpu', 'cuda'  # devices of this process; targets of compile_ahead


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
  """The attention that a model, a run and its devices need.

  Every default is a need that all paths meet. `of_model` and `of_call` return
  requests.
  """

  form: form_lib.Form = form_lib.Form()
  platform: str = ''  # of the devices; '': not checked
  capability: tuple[int, int] | None = None  # of NVIDIA GPUs; None: not checked
  context: int = 1  # devices that split the tokens of a row
  tensor: int = 1  # devices that split the heads
  has_dropout: bool = False  # of attention weights
  has_segments: bool = False  # packed rows: documents do not see each other
  latent_width: int = 0  # of latent attention, models/attention/latent_layer.py
  num_heads: int = 1  # H
  num_kv_heads: int = 1  # K
  head_width: int = 0  # C of queries and keys; 0: not checked
  value_width: int = 0  # C of values; 0: head_width
  dtype: str = ''  # of queries; '': not checked
  row_length: int = 0  # T of a training row; 0: not checked
  page_dtype: str = ''  # of stored keys and values; '': they are not in pages
  page_width: int = 0  # C of stored keys and values
  page_size: int = 0  # Q
  pool_size: int = 0  # numbers in the pool of one layer
  table_sequences: int = 0  # sequences in the page tables of a step
  table_pages: int = 0  # L


@dataclasses.dataclass(frozen=True, kw_only=True)
class Path:
  """The capabilities of one implementation of attention."""

  name: str
  otherwise: str  # the fix at the end of every error
  form: tuple[str, ...]  # fields of `Form` that it computes
  platforms: tuple[str, ...] = ()  # (): any
  least_capability: tuple[int, int] = (0, 0)  # of NVIDIA GPUs; (0, 0): any GPU
  has_split_rows: bool = False  # the tokens of a row on several devices
  # Division of heads over `tensor`. any: the compiler splits them; whole: query
  # heads and kv heads must divide; repeated: kv heads are repeated until they
  # divide.
  heads: str = 'any'
  has_dropout: bool = False
  has_segments: bool = False
  has_latent: bool = False  # also values of another width than keys
  has_int8: bool = False  # int8 pages, with a scale per token and head
  dtypes: tuple[str, ...] = ()  # of queries and of pages; (): any float
  has_mixed_dtypes: bool = True  # pages in another dtype than the queries
  head_width_multiple: int = 1
  max_head_width: int = 0  # 0: no limit
  row_multiple: int = 1
  row_parts: int = 0  # parts of a row per device of `context`; 0: no parts
  page_width: int = 0  # C of stored keys and values; 0: any
  heads_of_pages: Callable[[Request], str] | None = None  # limits of one kernel
  int8_pool_gap: tuple[int, int] = (
    0,
    0,
  )  # refused sizes of an int8 pool, both ends
  max_table_entries: int = 0  # of all page tables of a step; 0: no limit


_FORM = 'window', 'softcap', 'scale'
# Fields of `Form` that have another name in `ModelConfig`.
_CONFIG_NAMES = {'softcap': 'attention_softcap', 'scale': 'query_scale'}


def _ragged_heads(request: Request) -> str:
  """Returns the reason for which JAX's kernel refuses the heads, or ''."""
  heads, kv_heads, dtype = (
    request.num_heads, request.num_kv_heads, jnp.dtype(request.page_dtype)
  )  # fmt: skip
  # Heads fill 32-bit registers, which come in tiles of eight.
  num_words = 2 * kv_heads * dtype.itemsize // 4
  if num_words not in (1, 2, 4) and num_words % 8:
    return (
      f'got {kv_heads} key/value heads in {dtype.name}, expected 1, 2 or 4, or'
      ' a multiple of 8 (float32: of 4)'
    )
  # Pallas is imported inside functions: other platforms start without it.
  from jax.experimental.pallas.ops.tpu.ragged_paged_attention import (
    kernel as ragged_paged,
  )

  tile_heads, _ = ragged_paged.get_min_heads_per_blk(
    heads, 2 * kv_heads, dtype, dtype
  )
  if tile_heads != heads and tile_heads % 8:  # rows of a vector register
    return (
      f'got {heads} query heads over {kv_heads} key/value heads in'
      f' {dtype.name}, of which a tile has {tile_heads}, expected a multiple'
      ' of 8; use bfloat16'
    )
  return ''


# Training: attention over whole rows.
DENSE = Path(
  name='plain attention',
  otherwise='set execution.attention = auto',
  form=_FORM,
  has_dropout=True,
  has_segments=True,
  has_latent=True,
)
SPLASH = Path(
  name='splash attention',
  otherwise='set execution.attention = reference',
  form=_FORM,
  platforms=('tpu',),
  heads='whole',  # over a mesh: parallel/attention/sharded.py
  has_segments=True,
  row_multiple=LANES,  # tiles of scores are multiples of the lanes
)
CUDNN = Path(
  name='cudnn attention',
  otherwise='set execution.attention = reference',
  form=('window', 'scale'),
  platforms=_GPUS,
  least_capability=(8, 0),  # Ampere
  heads='whole',
  has_segments=True,
  dtypes=('bfloat16',),
  # The limits of every GPU since Ampere.
  head_width_multiple=8,
  max_head_width=128,
  row_multiple=2,
)
# Training: rows whose tokens are split over devices, parallel/attention/.
RING = Path(
  name='ring attention',
  otherwise='set parallel.context = 1',
  form=_FORM,
  has_split_rows=True,
  heads='repeated',
  has_segments=True,
  has_latent=True,
  row_parts=2,  # an early and a late one, so that devices have equal work
)
GATHER = dataclasses.replace(RING, name='gather attention')

# Serving: attention over a cache.
CACHED = Path(
  name='attention over a dense cache',
  otherwise='add it to models/attention/cached.py',
  form=_FORM,
  has_latent=True,
)
PAGED = Path(
  name='paged attention',
  otherwise='add it to models/attention/paged.py',
  form=_FORM,
  has_latent=True,
  has_int8=True,
)
PAGED_TPU = Path(
  name='ragged paged attention',
  otherwise='set engine.attention = auto',
  form=_FORM,
  platforms=('tpu',),
  dtypes=('float32', 'bfloat16'),
  has_mixed_dtypes=False,
  # The kernel (of jax 0.10) reads every other row of a page, which the compiler
  # can do at the width of a register. Narrower heads are stored with zeros.
  page_width=LANES,
  heads_of_pages=_ragged_heads,
  # Page tables, each padded to lanes, are in scalar memory. It has 1 MiB, and
  # lengths and other scalars need a part of it.
  max_table_entries=240 * 1024,
)
PAGED_GPU = Path(
  name='paged attention on GPU',
  otherwise='set engine.attention = auto',
  form=_FORM,
  platforms=_GPUS,
  has_int8=True,
  dtypes=('float32', 'bfloat16', 'float16'),
  max_head_width=256,
  # Pallas addresses arrays above 2**32 bytes with 64 bits, and smaller ones
  # with 32 bits and a sign. Signed addresses of one-byte numbers wrap at 2**31.
  int8_pool_gap=(2**31, 2**32),
)
PAGED_CPU = Path(
  name='native attention',
  otherwise='set engine.attention = auto',
  form=_FORM,
  platforms=('cpu',),
  has_int8=True,
  dtypes=('float32', 'bfloat16', 'fp8'),
)
INVARIANT = dataclasses.replace(
  PAGED, name='invariant attention', otherwise='set engine.numerics = fast'
)


def problem(path: Path, request: Request) -> str:
  """Returns the reason for which `path` refuses `request`, or ''.

  The text says got, expected and fix. It does not name the setting that chose
  the path.
  """
  for refusal in (_devices, _features, _scores, _heads, _shapes, _pages):
    if text := refusal(path, request):
      return text
  return ''


def check(path: Path, request: Request) -> None:
  """Raises ValueError if `path` refuses `request`."""
  if text := problem(path, request):
    raise ValueError(f'{path.name}: {text}')


def of_model(config: model_config.ModelConfig) -> Request:
  """Returns the request of a model; the caller adds the run and its devices."""
  # A window counts if any layer has it.
  layers = [config.layer(n) for n in range(config.num_layers)]
  return Request(
    form=form_lib.of_layer(config, is_local=any(x.is_local for x in layers)),
    latent_width=config.latent_width,
    num_heads=config.num_heads,
    num_kv_heads=config.num_kv_heads,
    head_width=config.head_width,
    value_width=config.value_width,
  )


def of_call(
  q_1THC: jax.Array, cache: kv_cache.PagedLayer, form: form_lib.Form
) -> Request:
  """Returns the request of a call over pages; shapes and dtypes are enough."""
  heads, channels = q_1THC.shape[2:]
  pool = cache.pages.kv_PQYC
  _, page_size, _, width = pool.shape
  tables = cache.decode_table_DL, cache.chunk_table_XL
  is_bare = pool.dtype == jnp.int8 and cache.pages.scale_PQY is None
  of_bits = {kv_cache.FP8_BITS: 'fp8', kv_cache.BFLOAT16_BITS: 'bfloat16'}
  stored = of_bits.get(pool.dtype.name, pool.dtype.name)
  return Request(
    form=form,
    num_heads=heads,
    num_kv_heads=cache.pages.num_kv_heads,
    head_width=channels,
    dtype=q_1THC.dtype.name,
    page_dtype='int8 without scales' if is_bare else stored,
    page_width=width,
    page_size=page_size,
    pool_size=pool.size,
    table_sequences=sum(table.shape[0] for table in tables),
    table_pages=tables[0].shape[1],
  )


def _text(path: Path, got: str, expected: str, fix: str = 'change it') -> str:
  return f'got {got}, expected {expected}; {fix} or {path.otherwise}'


def _devices(path: Path, request: Request) -> str:
  platforms = path.platforms
  if platforms and request.platform not in ('', *platforms):
    return (
      f'got devices of platform {request.platform}, expected {platforms[0]};'
      f' {path.otherwise}'
    )
  least, capability = path.least_capability, request.capability
  if capability is not None and capability < least:
    return (
      f'got a GPU of compute capability {_dotted(capability)}, expected an'
      f' NVIDIA GPU of at least {_dotted(least)}; {path.otherwise}'
    )
  if request.context > 1 and not path.has_split_rows:
    return _text(
      path,
      f'parallel.context = {request.context}',
      '1: it needs all tokens of a row on one device',
    )
  return ''


def _dotted(capability: tuple[int, int]) -> str:
  return '.'.join(map(str, capability))


def _features(path: Path, request: Request) -> str:
  if request.has_dropout and not path.has_dropout:
    return _text(
      path,
      'dropout of attention weights',
      'none: no device stores the weights of a query',
      'set model.dropout_rate = 0',
    )
  if request.latent_width and not path.has_latent:
    return _text(
      path,
      f'model.latent_width = {request.latent_width}',
      '0: it needs separate keys and values of one width',
    )
  width, values = request.head_width, request.value_width
  if values not in (0, width) and not path.has_latent:
    return _text(
      path, f'values of {values} channels for keys of {width}', f'{width}'
    )
  if request.has_segments and not path.has_segments:
    return _text(path, 'segment ids', 'one document per row', 'split the rows')
  return ''


def _scores(path: Path, request: Request) -> str:
  for field in dataclasses.fields(request.form):
    value = getattr(request.form, field.name)
    if value != field.default and field.name not in path.form:
      name = _CONFIG_NAMES.get(field.name, field.name)
      return _text(
        path,
        f'model.{name} = {value}',
        f'{field.default}: it does not compute this rule of scores',
      )
  return ''


def _heads(path: Path, request: Request) -> str:
  tensor = request.tensor
  heads, kv_heads = request.num_heads, request.num_kv_heads
  if path.heads == 'whole':
    for name, number in (('num_heads', heads), ('num_kv_heads', kv_heads)):
      if number % tensor:
        return _text(
          path,
          f'model.{name} = {number}',
          f'a multiple of parallel.tensor = {tensor}',
          'change one of them',
        )
  if path.heads == 'repeated' and heads % math.lcm(kv_heads, tensor):
    return _text(
      path,
      f'model.num_heads = {heads} with num_kv_heads = {kv_heads} and'
      f' parallel.tensor = {tensor}',
      f'a multiple of both, hence of {math.lcm(kv_heads, tensor)}',
      'change one of them',
    )
  return ''


def _shapes(path: Path, request: Request) -> str:
  time, dtype = request.row_length, request.dtype
  if time % path.row_multiple:
    return _text(
      path,
      f'rows of {time} tokens',
      f'a multiple of {path.row_multiple}',
      'change data.row_length',
    )
  parts = path.row_parts * request.context
  if parts and request.context > 1 and time % parts:
    return _text(
      path,
      f'data.row_length = {time}',
      f'a multiple of {path.row_parts} x parallel.context = {parts}',
      'change one of them',
    )
  is_paged = bool(request.page_dtype)  # then checked with the dtype of pages
  if dtype and not is_paged and path.dtypes and dtype not in path.dtypes:
    return _text(
      path, f'config.compute_dtype = {dtype}', ' or '.join(path.dtypes)
    )
  width, multiple = request.head_width, path.head_width_multiple
  most = path.max_head_width
  if width % multiple or (most and width > most):
    several = f'a multiple of {multiple} up to ' if multiple > 1 else 'at most '
    return _text(path, f'model.head_width = {width}', f'{several}{most}')
  return ''


def _pages(path: Path, request: Request) -> str:
  if not request.page_dtype:
    return ''
  width, channels = request.page_width, request.head_width
  if path.page_width and (width != path.page_width or channels > width):
    return _text(
      path,
      f'heads of {channels} channels in pages of {width}',
      f'pages of {path.page_width}',
      'store narrower heads with zeros beyond them',
    )
  if text := _page_dtypes(path, request):
    return text
  if path.heads_of_pages and (text := path.heads_of_pages(request)):
    return f'{text}; {path.otherwise}'
  least, most = path.int8_pool_gap
  if (
    request.page_dtype == 'int8' and most and least <= request.pool_size <= most
  ):
    return _text(
      path,
      f'{request.pool_size} numbers in a pool of int8',
      f'fewer than {least}, or more than {most}',
      'change the number of pages',
    )
  sequences, pages = request.table_sequences, request.table_pages
  entries = sequences * (-(-pages // LANES) * LANES)
  if path.max_table_entries and entries > path.max_table_entries:
    return _text(
      path,
      f'a table of {sequences} sequences with {pages} pages of'
      f' {request.page_size} tokens each, {entries} entries',
      f'at most {path.max_table_entries}',
      'serve fewer sequences at a time, use larger pages,',
    )
  return ''


def _page_dtypes(path: Path, request: Request) -> str:
  dtype, stored = request.dtype, request.page_dtype
  is_int8 = path.has_int8 and stored == 'int8'
  is_known = not path.dtypes or (
    dtype in path.dtypes and (is_int8 or stored in path.dtypes)
  )
  is_bad_int8 = stored.startswith('int') and not is_int8
  if (
    is_known and not is_bad_int8 and (path.has_mixed_dtypes or dtype == stored)
  ):
    return ''
  both = '' if path.has_mixed_dtypes else 'both in '
  end = ', or pages in int8 with their scales' if path.has_int8 else ''
  return _text(
    path,
    f'queries in {dtype} and pages in {stored}',
    f'{both}{" or ".join(path.dtypes) or "a float dtype"}{end}',
    'store pages in the dtype of the computation',
  )
