"""Reasons to refuse a GGUF file that its header alone shows.

The checks load no JAX, so that a file that cannot be imported is refused at
once: for its architecture, then for its tokenizer, then for its tensors.
"""

import os

from frozen.huggingface.gguf import (
  families,
  header as header_lib,
  tokenizer as tokenizer_lib,
)


def check(
  path: str | os.PathLike, *, has_tokenizer: bool = False
) -> header_lib.Header:
  """Returns the header of a file that may be imported.

  Args:
    has_tokenizer: whether the tokenizer comes from elsewhere.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is damaged, or the model is not supported.
  """
  header = header_lib.read(path)
  families.read(header)
  if not has_tokenizer:
    try:
      tokenizer_lib.check(header.fields)
    except ValueError as error:
      raise ValueError(f'{header.path}: {error}') from None
  header_lib.entries(header)
  return header
