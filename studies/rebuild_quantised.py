"""Makes the weights of a quantised directory again, from its manifest.

The manifest has the scheme, the method, and the numbers and the digest of the
text that they were measured on (frozen/quantize/). The user gives the rest: the
directory in floats, which must have the digest of the lineage, and the text.
`python -m studies.rebuild` compares the weights.
"""

import pathlib
from typing import Any

from frozen import format as frozen_format, manifest as manifest_lib
from frozen.quantize import calibration, quantizing


def is_quantised(model: pathlib.Path) -> bool:
  """Returns whether `python -m frozen.quantize` made a directory.

  Raises:
    FileNotFoundError, ValueError: there is no manifest that can be read.
  """
  return 'calibration' in _record(manifest_lib.read(model))


def make(
  model: pathlib.Path, workdir: pathlib.Path, *, source: str, text: str
) -> pathlib.Path:
  """Quantises again, into `workdir`; returns the new frozen directory.

  Args:
    model: the quantised directory.
    workdir: directory for the new one.
    source: frozen directory in floats.
    text: file of the calibration; '': the text that is part of Python.

  Raises:
    ValueError: source or text differ from the manifest.
    OSError: there is no such directory or text.
  """
  manifest = manifest_lib.read(model)
  manifest_lib.check_files(model, manifest)
  expected = manifest.lineage['quantised_from']
  record = _record(manifest)
  if not source:
    raise ValueError(
      f'--source: got none with a quantised --model, expected the frozen'
      f' directory of floats with the weights {expected[:16]}'
    )
  got = frozen_format.open_directory(source).manifest.weights_digest
  if got != expected:
    raise ValueError(
      f'--source: got {source} with the weights {got[:16]}, expected'
      f' {expected[:16]}; give the directory that was quantised'
    )
  used = record['calibration']
  digest = calibration.text_digest(text)
  if digest != used['sha256']:
    raise ValueError(
      f'--text: got {text or calibration.SAMPLE} with SHA-256 {digest[:16]},'
      f' expected {used["sha256"][:16]}, the digest of {used["text"]}; give the'
      ' text of the calibration'
    )
  again = workdir / 'frozen'
  quantizing.quantise_directory(
    source,
    again,
    scheme=record['scheme'],
    method=record['method'],
    text=calibration.Config(
      path=text,
      seed=used['seed'],
      rows=used['rows'],
      length=used['length'],
      # Directories from before it was recorded used the default.
      held_out=used.get('held_out', calibration.Config().held_out),
    ),
    rotate='rotation' in record,
    overwrite=again.exists(),
  )
  return again


def _record(manifest: manifest_lib.Manifest) -> dict[str, Any]:
  """Returns how the kernels of a manifest were made; {}: they are floats."""
  return manifest.quantization.get('record', {})
