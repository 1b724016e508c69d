"""Between str and bytes: the one place where text that is not text is refused.

Every tokenizer here is byte-level, so a document enters the system as its
UTF-8 bytes. Python strings can hold lone surrogates, which have no UTF-8 form;
they are refused here with their position instead of deep inside a library.
"""


def encode(text: str) -> bytes:
  """Returns the UTF-8 bytes of `text`.

  Raises:
    ValueError: `text` holds a lone surrogate.
  """
  try:
    return text.encode('utf-8')
  except UnicodeEncodeError as error:
    raise ValueError(
      f'text has the lone surrogate {text[error.start]!a} at index '
      f'{error.start}; expected text that has a UTF-8 form; decode the file '
      "with errors='replace', not 'surrogateescape'"
    ) from None


def decode(data: bytes) -> str:
  """Returns the text of `data`, with U+FFFD for what is not UTF-8."""
  return data.decode('utf-8', errors='replace')
