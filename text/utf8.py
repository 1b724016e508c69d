"""Text as UTF-8 bytes, with an error that names the place of bad characters.

A Python string can have lone surrogates, which have no UTF-8 form. They are
refused here with their position, before a library fails without one.
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
  """Returns the text of `data`, with U+FFFD for bytes that are not UTF-8."""
  return data.decode('utf-8', errors='replace')
