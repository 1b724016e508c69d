"""Key files: what opens a receipt, and what is refused."""

import base64
import builtins
import secrets

import pytest

from inference.server.receipts import sealing

pytest.importorskip('cryptography')


def _file(tmp_path, data, mode=0o600):
  path = tmp_path / 'key'
  path.write_bytes(data)
  path.chmod(mode)
  return path


@pytest.mark.parametrize('encode', [base64.b64encode, base64.urlsafe_b64encode])
def test_what_was_closed_is_opened_with_its_key_alone(tmp_path, encode):
  for key in (bytes([255] * 32), secrets.token_bytes(32)):
    seal = sealing.read(_file(tmp_path, encode(key) + b'\n'), flag='--k')
    closed = seal.close(b'a private prompt')
    assert b'private' not in closed
    assert closed != seal.close(b'a private prompt')
    assert seal.open(closed) == b'a private prompt'
    other = sealing.read(
      _file(tmp_path, encode(secrets.token_bytes(32))), flag='--k'
    )
    with pytest.raises(ValueError, match='a key that does not open'):
      other.open(closed)
    altered = bytearray(base64.urlsafe_b64decode(closed))
    altered[30] ^= 1
    with pytest.raises(ValueError, match='or the receipt was altered'):
      seal.open(base64.urlsafe_b64encode(altered))


@pytest.mark.parametrize(
  ('data', 'mode', 'message'),
  [
    (b'', 0o600, '--k: got .* which holds no key of 32 bytes'),
    (b'not base64!', 0o600, 'holds no key of 32 bytes'),
    (base64.b64encode(bytes(16)), 0o600, 'holds no key of 32 bytes'),
    (base64.b64encode(bytes(32)), 0o640, 'which other users of this machine'),
    (base64.b64encode(bytes(32)), 0o604, 'chmod 600'),
  ],
)
def test_a_wrong_key_file_is_refused(tmp_path, data, mode, message):
  with pytest.raises(ValueError, match=message):
    sealing.read(_file(tmp_path, data, mode), flag='--k')


def test_a_missing_key_file_is_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match='--k: got .* does not exist'):
    sealing.read(tmp_path / 'none', flag='--k')
  with pytest.raises(ValueError, match='--k: got an empty path'):
    sealing.read(' ', flag='--k')
  with pytest.raises(ValueError, match='cannot be read'):
    sealing.read(tmp_path, flag='--k')


def test_a_missing_library_is_named(tmp_path, monkeypatch):
  original = builtins.__import__

  def refusing(name, *args, **fields):
    if name.startswith('cryptography'):
      raise ModuleNotFoundError(f'No module named {name!r}')
    return original(name, *args, **fields)

  monkeypatch.setattr(builtins, '__import__', refusing)
  with pytest.raises(
    ModuleNotFoundError, match='--k: pip install -r requirements-serve.txt'
  ):
    sealing.read(tmp_path, flag='--k')
