"""TFDS builder `tiny_shakespeare`: 1.1 MB of Shakespeare's plays.

The corpus of char-rnn and of nanoGPT's `shakespeare_char`. Each split is one
document, as in TFDS's own builder: the first 90 % of the characters, the next
5 %, and the rest. TFDS's builder needs TensorFlow and always downloads. This
builder needs no TensorFlow, and no download if the file is there.

Reference: Karpathy 2015, https://github.com/karpathy/char-rnn
"""

import hashlib
import pathlib
import urllib.request

import tensorflow_datasets as tfds

from checks import paths
from storage import atomic

URL = (
  'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/'
  'tinyshakespeare/input.txt'
)
SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'

_FILE_NAMES = ('tiny_shakespeare.txt', 'input.txt')
_TIMEOUT_S = 20


class TinyShakespeare(tfds.core.GeneratorBasedBuilder):
  """Tiny Shakespeare, from a file that `find_or_download` has verified."""

  VERSION = tfds.core.Version('1.0.0')

  def __init__(self, *, text_path: pathlib.Path, **kwargs):
    self._text_path = text_path
    super().__init__(**kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=__doc__,
      features=tfds.features.FeaturesDict(
        {'text': tfds.features.Text(), 'id': tfds.features.Text()}
      ),
      homepage='https://github.com/karpathy/char-rnn',
    )

  def _split_generators(self, dl_manager):
    # find_or_download reports a failed download after seconds, TFDS after 205.
    del dl_manager
    text = self._text_path.read_bytes().decode('utf-8')
    train_end = int(len(text) * 0.9)
    validation_end = train_end + int((len(text) - train_end) * 0.5)
    return {
      'train': self._generate_examples('train', text[:train_end]),
      'validation': self._generate_examples(
        'validation', text[train_end:validation_end]
      ),
      'test': self._generate_examples('test', text[validation_end:]),
    }

  def _generate_examples(self, key: str, text: str):
    yield key, {'text': text, 'id': key}


def find_or_download(path: str, data_dir: pathlib.Path) -> pathlib.Path:
  """Returns the path of a verified copy of the text.

  Args:
    path: the file, or a directory that has it; '' looks into `data_dir`, and
      downloads the file if it is not there.
    data_dir: directory that keeps a download.

  Raises:
    FileNotFoundError: there is no such file, or the download failed.
    ValueError: the file has another text.
  """
  place = pathlib.Path(paths.expanded('path', path)) if path else data_dir
  candidates = [place / name for name in _FILE_NAMES]
  if path:
    candidates.insert(0, place)
  for candidate in candidates:
    if candidate.is_file():
      _verify(candidate.read_bytes(), str(candidate))
      return candidate
  if path:
    raise FileNotFoundError(
      f'no tiny Shakespeare at {path!r}; expected the file from {URL}, or '
      'leave the path empty to download it'
    )
  return _download(candidates[0])


def _download(target: pathlib.Path) -> pathlib.Path:
  """Downloads the text to `target`, and verifies it."""
  try:
    with urllib.request.urlopen(URL, timeout=_TIMEOUT_S) as response:
      data = response.read()
  except OSError as error:
    raise FileNotFoundError(
      f'tiny Shakespeare is not at {str(target)!r} and downloading it failed '
      f'({error}); save {URL} there, or give its path'
    ) from None
  _verify(data, URL)
  target.parent.mkdir(parents=True, exist_ok=True)
  atomic.write_bytes(target, data)
  return target


def _verify(data: bytes, origin: str) -> None:
  digest = hashlib.sha256(data).hexdigest()
  if digest != SHA256:
    raise ValueError(
      f'{origin} has SHA-256 {digest}, expected {SHA256}: it is not tiny '
      'Shakespeare; read another text with text_files'
    )
