"""Sealing: receipts are encrypted before they are written.

A key file holds 32 random bytes in base64, as `openssl rand -base64 32` prints
them. Fernet encrypts with AES-128 in CBC mode and signs with HMAC-SHA-256, so
that an altered receipt is not opened.

Reference: github.com/fernet/spec.
"""

import base64
import binascii
import os
import pathlib
import stat
from typing import Any

_NUM_BYTES = 32
_FIX = (
  'a file that you have made with `umask 077; openssl rand -base64 32 > FILE`'
)


class Seal:
  """Encrypts and decrypts with the key of a file."""

  def __init__(self, fernet: Any):
    """Takes a `cryptography.fernet.Fernet`."""
    self._fernet = fernet

  def close(self, data: bytes) -> bytes:
    """Returns data encrypted."""
    return self._fernet.encrypt(data)

  def open(self, sealed: bytes) -> bytes:
    """Returns data decrypted.

    Raises:
      ValueError: it was sealed with another key, or altered.
    """
    from cryptography import fernet

    try:
      return self._fernet.decrypt(sealed)
    except fernet.InvalidToken:
      raise ValueError(
        'key_file: got a key that does not open the receipt, expected the one'
        ' that sealed it; or the receipt was altered'
      ) from None


def read(path: str | os.PathLike, *, flag: str) -> Seal:
  """Returns the seal of a key file.

  Args:
    path: path of the file.
    flag: the flag that gave the path, for errors.

  Raises:
    ValueError: the file holds no key, or other users of the machine can read
      it.
    FileNotFoundError: there is no file.
    ModuleNotFoundError: the library is missing.
  """
  try:
    # Here: a server without sealed receipts does not need the library.
    from cryptography import fernet
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
      f'{error}; for {flag}: pip install -r requirements-serve.txt'
    ) from None
  if not os.fspath(path).strip():
    raise ValueError(f'{flag}: got an empty path, expected {_FIX}')
  path = pathlib.Path(path)
  if not path.exists():
    raise FileNotFoundError(
      f'{flag}: got {path}, which does not exist, expected {_FIX}'
    )
  try:
    mode, text = path.stat().st_mode, path.read_bytes().strip()
  except OSError as error:
    raise ValueError(
      f'{flag}: got {path}, which cannot be read ({error.strerror}), expected'
      f' {_FIX}'
    ) from None
  if mode & (stat.S_IRWXG | stat.S_IRWXO):
    raise ValueError(
      f'{flag}: got {path}, which other users of this machine may use, expected'
      f' a file of yours alone; chmod 600 {path}'
    )
  key = _decoded(text)
  if len(key) != _NUM_BYTES:
    raise ValueError(
      f'{flag}: got {path}, which holds no key of {_NUM_BYTES} bytes in base64,'
      f' expected {_FIX}'
    )
  return Seal(fernet.Fernet(base64.urlsafe_b64encode(key)))


def _decoded(text: bytes) -> bytes:
  try:
    # Either alphabet: openssl writes the first one, Fernet the second.
    text = text.replace(b'-', b'+').replace(b'_', b'/')
    return base64.b64decode(text, validate=True)
  except binascii.Error:
    return b''
