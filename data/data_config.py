"""What an experiment says about its data: plain values, checked at start.

Read by `data/batches.py` and `data/vocabulary.py`; experiments fill it in and
any field can be overridden by a flag.
"""

from collections.abc import Callable
import dataclasses
import math

from checks import expect
from data import batch_ramp as ramp_lib, sources as sources_lib

TOKENIZER_KINDS = ('byte', 'bpe', 'directory')
PACKINGS = ('concat_then_split', 'first_fit', 'best_fit', 'none', 'windows')


@dataclasses.dataclass(kw_only=True)
class TokenizerConfig:
  """Where the vocabulary comes from."""

  # 'byte': one id per byte; 'bpe': trained on the training documents;
  # 'directory': loaded from `path`.
  kind: str = 'byte'
  # Ids to learn, special ones included; used by 'bpe' only.
  vocab_size: int = 2048
  # Directory written by Tokenizer.save; used by 'directory' only.
  path: str = ''
  # UTF-8 bytes of text that 'bpe' learns from at most. With 2048 ids on
  # python_stdlib, 2, 4 and 11 MB give 2.85, 2.95 and 2.94 bytes per token on
  # the validation split; 4 MB take 2 to 4 s on two CPU cores.
  train_bytes: int = 4_000_000

  def validate(self) -> None:
    """Raises ValueError, naming the field, if a value cannot work."""
    expect.one_of('tokenizer.kind', self.kind, TOKENIZER_KINDS)
    if self.kind == 'directory' and not self.path:
      raise ValueError(
        "tokenizer.path: got '', expected a directory for kind 'directory'"
      )
    if self.kind != 'directory' and self.path:
      raise ValueError(
        f"tokenizer.path: got {self.path!r}, expected '' for kind"
        f" {self.kind!r}, which reads no path; use kind 'directory'"
      )
    expect.at_least('tokenizer.train_bytes', self.train_bytes, 1)


@dataclasses.dataclass(kw_only=True)
class SourceConfig:
  """One source of a mixture."""

  # One of the functions of data/sources.py, or one with their signature.
  open_source: Callable[..., sources_lib.Source]
  # What the source reads; '{split}' in it becomes the split's name.
  path: str = ''
  split: str = 'train'
  # Field, column or feature that holds a document's text.
  text_key: str = 'text'
  # Rows of this source for so many of the others. May be changed on resume,
  # from that step on.
  weight: float = 1.0
  # In messages and metrics; that of `open_source` if empty.
  name: str = ''

  def open(self, data_dir: str) -> sources_lib.Source:
    """Opens the documents."""
    return self.open_source(self.path, self.split, data_dir, self.text_key)


@dataclasses.dataclass(kw_only=True)
class DataConfig:
  """Which documents, and how they become rows of tokens."""

  # One of the functions of data/sources.py, or one with their signature.
  open_source: Callable[..., sources_lib.Source] = sources_lib.python_stdlib
  # What the source reads; '{split}' in it becomes the split's name.
  path: str = ''
  # Splits to train and to evaluate on; TFDS expressions such as
  # 'train[:10%]' and 'validation+test' where the source is TFDS-backed.
  train_split: str = 'train'
  eval_split: str = 'validation'
  # Field, column or feature that holds a document's text.
  text_key: str = 'text'
  # A mixture to train on instead of the one source above, which is then only
  # evaluated on. By flag: --config.data.sources[0].weight=2.
  sources: tuple[SourceConfig, ...] = ()
  # Where prepared datasets, downloads and tokens are kept.
  data_dir: str = '~/.cache/two_lives'
  # Tokens per row (T) and rows per step over all devices (B).
  row_length: int = 256
  batch_size: int = 32
  # Fewer rows at first: pairs of (from_step, rows), steps counted from 0, the
  # last of them of batch_size rows; empty: never.
  batch_ramp: tuple[tuple[int, int], ...] = ()
  # How documents fill rows: data/packing.py says what each does.
  packing: str = 'concat_then_split'
  # Threads that read documents, and that make batches.
  num_threads: int = 2
  # Processes that make batches, each with so many threads; 0: this one. They
  # take seconds to start: for hosts that feed many fast devices.
  num_workers: int = 0
  # Rows made ahead of the step, rounded up to whole batches.
  prefetch_rows: int = 128
  # Tokens that count as copied where training and evaluation text share them
  # (data/contamination/); 0: do not look, -1: 13, or 50 of single bytes.
  contamination_ngram: int = -1
  # Share of the evaluation text found in training above which to warn.
  contamination_warning: float = 0.1
  # Last date the documents speak of (ISO 8601); goes into the manifest.
  knowledge_cutoff: str = ''
  tokenizer: TokenizerConfig = dataclasses.field(
    default_factory=TokenizerConfig
  )

  @property
  def ramp(self) -> ramp_lib.Ramp:
    """Returns the batch ramp, or that of a size which never changes."""
    return self.batch_ramp or ((0, self.batch_size),)

  @property
  def batch_sizes(self) -> tuple[int, ...]:
    """Returns every number of rows that a batch may have."""
    return tuple(rows for _, rows in self.ramp)

  @property
  def has_bos(self) -> bool:
    """Returns whether documents begin with BOS in training."""
    # Windows are cut from joined text: their models never see it.
    return self.packing != 'windows'

  def rows_before(self, step: int) -> int:
    """Returns the rows of all batches before that of `step`."""
    return ramp_lib.rows_before(self.ramp, step)

  def train_sources(self) -> tuple[SourceConfig, ...]:
    """Returns what is trained on, each with a name."""
    alone = self._source(self.train_split)
    return tuple(
      dataclasses.replace(
        source, name=source.name or source.open_source.__name__
      )
      for source in self.sources or (alone,)
    )

  def eval_source(self) -> SourceConfig:
    """Returns what is evaluated on."""
    source = self._source(self.eval_split)
    return dataclasses.replace(source, name=self.eval_split)

  def _source(self, split: str) -> SourceConfig:
    return SourceConfig(
      open_source=self.open_source,
      path=self.path,
      split=split,
      text_key=self.text_key,
    )

  def validate(self) -> None:
    """Raises ValueError, naming the field, if a value cannot work."""
    expect.one_of('data.packing', self.packing, PACKINGS)
    for name, least in (
      ('row_length', 1),
      ('batch_size', 1),
      ('num_threads', 1),
      ('num_workers', 0),
      ('prefetch_rows', 0),
      ('contamination_ngram', -1),
    ):
      expect.at_least(f'data.{name}', getattr(self, name), least)
    if not 0 <= self.contamination_warning <= 1:
      raise ValueError(
        f'data.contamination_warning: got {self.contamination_warning},'
        ' expected a share from 0 to 1'
      )
    ramp_lib.check(self.batch_ramp, self.batch_size)
    if not isinstance(self.sources, tuple | list) or not all(
      isinstance(source, SourceConfig) for source in self.sources
    ):
      raise ValueError(
        f'data.sources: got {self.sources!r}, expected SourceConfigs, which the'
        ' file of an experiment lists; a flag sets a field of one, as in'
        ' --config.data.sources[0].weight=2'
      )
    _check_sources(self.train_sources())
    self.tokenizer.validate()


def _check_sources(mixed: tuple[SourceConfig, ...]) -> None:
  """Refuses weights that are no shares, and sources of one name."""
  for source in mixed:
    if not (math.isfinite(source.weight) and source.weight > 0):
      raise ValueError(
        f'data.sources: got weight {source.weight} for {source.name}, expected'
        ' a number above 0; leave out a source that should not be trained on'
      )
  names = [source.name for source in mixed]
  repeated = sorted({name for name in names if names.count(name) > 1})
  if repeated:
    raise ValueError(
      f'data.sources: got several called {", ".join(repeated)}, expected'
      ' different names; set their name'
    )
