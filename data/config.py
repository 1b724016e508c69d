"""What an experiment says about its data: plain values, checked at start.

Read by `data/pipeline.py` and `data/vocabulary.py`; experiments fill it in and
any field can be overridden by a flag.
"""

from collections.abc import Callable
import dataclasses

from data import sources

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
    _check_choice('tokenizer.kind', self.kind, TOKENIZER_KINDS)
    if self.kind == 'directory' and not self.path:
      raise ValueError(
        "tokenizer.path is empty, expected a directory for kind 'directory'"
      )
    if self.kind != 'directory' and self.path:
      raise ValueError(
        f'tokenizer.path is {self.path!r} but tokenizer.kind is '
        f"{self.kind!r}, which reads no path; use kind 'directory'"
      )
    _check_at_least('tokenizer.train_bytes', self.train_bytes, 1)


@dataclasses.dataclass(kw_only=True)
class DataConfig:
  """Which documents, and how they become rows of tokens."""

  # One of the functions of data/sources.py, or one with their signature.
  open_source: Callable[..., sources.Source] = sources.python_stdlib
  # What the source reads; '{split}' in it becomes the split's name.
  path: str = ''
  # Where prepared datasets and downloads are kept.
  data_dir: str = '~/.cache/two_lives'
  # Splits to train and to evaluate on; TFDS expressions such as
  # 'train[:10%]' and 'validation+test' where the source is TFDS-backed.
  train_split: str = 'train'
  eval_split: str = 'validation'
  # Field, column or feature that holds a document's text.
  text_key: str = 'text'
  # Tokens per row (T) and rows per step over all devices (B).
  row_length: int = 256
  batch_size: int = 32
  # How documents fill rows: data/pipeline.py says what each does.
  packing: str = 'concat_then_split'
  # Rows that are shuffled among each other after packing, so that the chunks
  # of a long document do not arrive in one batch; 0 or 1 keeps their order.
  shuffle_rows: int = 1024
  # Threads that read and tokenise documents.
  num_threads: int = 2
  # Rows made ahead of the step, rounded up to whole batches.
  prefetch_rows: int = 128
  # Last date the documents speak of (ISO 8601); goes into the manifest.
  knowledge_cutoff: str = ''
  tokenizer: TokenizerConfig = dataclasses.field(
    default_factory=TokenizerConfig
  )

  def open_split(self, split: str) -> sources.Source:
    """Opens the documents of `split`."""
    return self.open_source(self.path, split, self.data_dir, self.text_key)

  def validate(self) -> None:
    """Raises ValueError, naming the field, if a value cannot work."""
    _check_choice('data.packing', self.packing, PACKINGS)
    _check_at_least('data.row_length', self.row_length, 1)
    _check_at_least('data.batch_size', self.batch_size, 1)
    _check_at_least('data.shuffle_rows', self.shuffle_rows, 0)
    _check_at_least('data.num_threads', self.num_threads, 1)
    _check_at_least('data.prefetch_rows', self.prefetch_rows, 0)
    self.tokenizer.validate()


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
  if value not in choices:
    raise ValueError(
      f'{name} is {value!r}, expected one of {", ".join(choices)}'
    )


def _check_at_least(name: str, value: int, least: int) -> None:
  if value < least:
    raise ValueError(f'{name} is {value}, expected at least {least}')
