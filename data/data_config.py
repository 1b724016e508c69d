"""The data settings of an experiment.

An experiment fills in the fields, and a flag can override each of them. They
are validated once, with the experiment; the rest of data/ trusts them.
"""

from collections.abc import Callable
import dataclasses
import math

from checks import expect
from data import batch_ramp as ramp_lib, sources as sources_lib

TOKENIZER_KINDS = ('byte', 'bpe', 'directory')
# Documents of a run: text, or records (data/examples/shapes.py).
TEXT = 'text'
PROMPTS = 'prompts'  # questions alone, which the policy of a run answers
EXAMPLES = (TEXT, 'chat', 'pairs', 'labelled', PROMPTS)
# Treatments of an example that is longer than a row.
TRUNCATE, DROP, ERROR = TOO_LONG = ('truncate', 'drop', 'error')
# Packings that cut a document, or join several.
_CUTTING = ('concat_then_split', 'windows')
PACKINGS = ('concat_then_split', 'first_fit', 'best_fit', 'none', 'windows')


@dataclasses.dataclass(kw_only=True)
class TokenizerConfig:
  """The tokenizer of a run: its kind, and the settings of that kind."""

  # 'byte': one id per byte. 'bpe': trained on the training documents.
  # 'directory': loaded from `path`.
  kind: str = 'byte'
  # Number of ids that 'bpe' learns, special ids included. Read by 'bpe' only.
  vocab_size: int = 2048
  # Directory that Tokenizer.save wrote. Read by 'directory' only.
  path: str = ''
  # Maximum of UTF-8 bytes of text that 'bpe' learns from. With 2048 ids on
  # python_stdlib, 2, 4 and 11 MB give 2.85, 2.95 and 2.94 bytes per token on
  # the validation split. 4 MB take 2 to 4 s on two CPU cores.
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
  """One source of a source mix."""

  # A function of data/sources.py, or a function with the same signature.
  open_source: Callable[..., sources_lib.Source]
  # Files that the source reads; '{split}' in it becomes the split's name.
  path: str = ''
  split: str = 'train'
  # Field, column or feature that holds a document's text.
  text_key: str = 'text'
  # Share of this source in the rows, relative to the weights of the other
  # sources. A resumed run may change it; the change holds from that step on.
  weight: float = 1.0
  # Name in messages and metrics; if empty, the name of `open_source`.
  name: str = ''

  def open(self, data_dir: str, examples: str = TEXT) -> sources_lib.Source:
    """Opens the documents, or the whole records of other examples."""
    key = self.text_key if examples == TEXT else None
    return self.open_source(self.path, self.split, data_dir, key)


@dataclasses.dataclass(kw_only=True)
class DataConfig:
  """The documents of a run, and how they become batches."""

  # A function of data/sources.py, or a function with the same signature.
  open_source: Callable[..., sources_lib.Source] = sources_lib.python_stdlib
  # Files that the source reads; '{split}' in it becomes the split's name.
  path: str = ''
  # Splits to train and to evaluate on. A source that reads TFDS also takes
  # expressions such as 'train[:10%]' and 'validation+test'.
  train_split: str = 'train'
  eval_split: str = 'validation'
  # Field, column or feature that holds a document's text.
  text_key: str = 'text'
  # A source mix to train on. The single source above is then used for
  # evaluation only. A flag sets one field: --config.data.sources[0].weight=2.
  sources: tuple[SourceConfig, ...] = ()
  # text: documents with a text. Records: chat, conversations of which the
  # assistant's turns are trained; pairs, a preferred and a rejected answer;
  # labelled, an answer and whether it is good; prompts, for config.rollouts.
  # The objective decides which kind it needs.
  examples: str = TEXT
  # Jinja source of the chat template, or a file with it. Empty: the template of
  # init_from. Read for records only.
  chat_template: str = ''
  # Treatment of records longer than row_length: truncate | drop | error. The
  # run reports their number.
  too_long: str = TRUNCATE
  # Directory of prepared datasets, downloads and tokens.
  data_dir: str = '~/.cache/two_lives'
  # Tokens per row (T), and rows per step over all devices (B).
  row_length: int = 256
  batch_size: int = 32
  # Batch sizes that grow: pairs of (from_step, rows), with steps counted from
  # 0. The last pair has batch_size rows. Empty: batch_size from the start.
  batch_ramp: tuple[tuple[int, int], ...] = ()
  # How documents fill rows, one of PACKINGS; see data/packing.py.
  packing: str = 'concat_then_split'
  # Threads that read documents, and threads that make batches.
  num_threads: int = 2
  # Processes that make batches, each with num_threads threads. 0: batches are
  # made in the training process. Processes take seconds to start; use them on
  # hosts that feed many fast devices.
  num_workers: int = 0
  # Rows that are made ahead of the step, rounded up to whole batches.
  prefetch_rows: int = 128
  # Length of the n-grams of tokens that are looked for in training and
  # evaluation text (data/contamination/). 0: no check. -1: 13 tokens, or 50
  # with a byte tokenizer.
  contamination_ngram: int = -1
  # The run warns if more than this share of the n-grams of the evaluation text
  # is in the training text.
  contamination_warning: float = 0.1
  # Newest date in the documents (ISO 8601), for the manifest.
  knowledge_cutoff: str = ''
  tokenizer: TokenizerConfig = dataclasses.field(
    default_factory=TokenizerConfig
  )

  @property
  def ramp(self) -> ramp_lib.Ramp:
    """Returns the batch ramp; without one, a ramp of one constant size."""
    return self.batch_ramp or ((0, self.batch_size),)

  @property
  def batch_sizes(self) -> tuple[int, ...]:
    """Returns every batch size of the run, in rows."""
    return tuple(rows for _, rows in self.ramp)

  @property
  def has_bos(self) -> bool:
    """Returns whether documents begin with BOS in training."""
    # Windows are cut from joined text without BOS, so the model never sees one.
    return self.packing != 'windows'

  def rows_before(self, step: int) -> int:
    """Returns the number of rows in all batches before `step`."""
    return ramp_lib.rows_before(self.ramp, step)

  def train_sources(self) -> tuple[SourceConfig, ...]:
    """Returns the training sources, each with a name."""
    alone = self._source(self.train_split)
    return tuple(
      dataclasses.replace(
        source, name=source.name or source.open_source.__name__
      )
      for source in self.sources or (alone,)
    )

  def eval_source(self) -> SourceConfig:
    """Returns the evaluation source, named after its split."""
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
    self._check_examples()
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
        f'data.sources: got {self.sources!r}, expected SourceConfigs; list them'
        " in the experiment's file; a flag can set a field of one of them, as"
        ' --config.data.sources[0].weight=2'
      )
    _check_sources(self.train_sources())
    self.tokenizer.validate()

  def _check_examples(self) -> None:
    """Refuses settings that records do not read, or that would cut them."""
    expect.one_of('data.examples', self.examples, EXAMPLES)
    expect.one_of('data.too_long', self.too_long, TOO_LONG)
    if self.examples == TEXT:
      if self.chat_template:
        raise ValueError(
          'data.chat_template: got a template with data.examples = text,'
          " expected '' for documents that are text alone; set data.examples"
        )
      return
    if self.packing in _CUTTING:
      raise ValueError(
        f'data.packing: got {self.packing} with data.examples ='
        f' {self.examples}, expected first_fit, best_fit or none: examples are'
        ' not cut'
      )


def _check_sources(mixed: tuple[SourceConfig, ...]) -> None:
  """Raises ValueError for a weight of 0 or less and for a repeated name."""
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
      ' different names; set the field `name` of each'
    )
