"""Import of open weights, and export to them, from the command line.

    python -m frozen.huggingface import --source=DIR_OR_REPO --out=FROZEN
    python -m frozen.huggingface export --source=FROZEN --out=DIR_OR_GGUF

The source of an import is a directory with config.json and safetensors, a GGUF
file, or the name of a repository on the hub (requirements-hub.txt). Quantised
matrices stay quantised where this machine computes with them fast (--weights).
"""

import sys

from absl import app, flags, logging

from checks import path_flags

_MOST_SHOWN = 4000  # characters of an error
_USAGE = 'expected one of import, export, as in import --source=DIR --out=DIR'


def main(argv: list[str]) -> None:
  """Imports or exports the model that the flags name; errors are one line."""
  if len(argv) != 2 or argv[1] not in ('import', 'export'):
    raise app.UsageError(f'got arguments {argv[1:]}, {_USAGE}')
  logging.set_verbosity(logging.ERROR)  # orbax logs every step that it takes
  try:
    (_import if argv[1] == 'import' else _export)()
  except (ValueError, OSError) as error:
    print(f'error: {_one_line(str(error))}', file=sys.stderr)
    sys.exit(2)


def _one_line(text: str) -> str:
  """Returns a text without control characters: files may contain any name."""
  cut = text if len(text) <= _MOST_SHOWN else f'{text[:_MOST_SHOWN]}...'
  return ''.join(
    c if c.isprintable() else c.encode('unicode_escape').decode() for c in cut
  )


def _import() -> None:
  from frozen.huggingface import hub

  values = flags.FLAGS
  if values.kind != 'auto':
    raise ValueError(
      f'--kind: got {values.kind} for an import, expected none; only an export'
      ' has a --kind'
    )
  for name, neutral in (('family', ''), ('format', 'float')):
    if values[name].value != neutral:
      raise ValueError(
        f'--{name}: got {values[name].value} for an import, expected none; only'
        f' an export has a --{name}'
      )
  fetched = hub.fetch(values.source, values.revision)
  is_gguf = fetched.directory.suffix == '.gguf'
  if is_gguf:
    from frozen.huggingface.gguf import refusals

    # Before JAX is loaded: a wrong file is refused without that wait.
    refusals.check(fetched.directory, has_tokenizer=bool(values.tokenizer))
  else:
    from frozen.huggingface.quantised import table

    table.check(fetched.directory)
  from frozen import format as frozen_format
  from frozen.huggingface import importing

  if is_gguf:
    from frozen.huggingface.gguf import reading

    result = reading.import_file(
      fetched.directory,
      values.out,
      tokenizer_source=values.tokenizer,
      dtype=values.dtype,
      weights=values.weights,
      origin=fetched.origin,
      overwrite=values.overwrite,
    )
  elif values.tokenizer:
    raise ValueError(
      f'--tokenizer: got {values.tokenizer} for a directory, expected none;'
      ' only a GGUF file has a --tokenizer'
    )
  else:
    result = importing.import_directory(
      fetched.directory,
      values.out,
      dtype=values.dtype,
      weights=values.weights,
      origin=fetched.origin,
      overwrite=values.overwrite,
    )
  manifest = result.manifest
  print(f'frozen: {values.out}')
  print(
    f'{manifest.origin["family"]}, {manifest.num_params:,}'
    f' {manifest.dtype} params'
  )
  print(f'weights {manifest.weights_digest}')
  if stored := frozen_format.storage_text(manifest):
    print(f'stored {stored}')
  _tell(result.notes)


def _export() -> None:
  from frozen.huggingface import exporting
  from frozen.huggingface.gguf import writing

  values = flags.FLAGS
  for name, neutral in (
    ('dtype', 'auto'),
    ('revision', ''),
    ('tokenizer', ''),
    ('weights', 'auto'),
    ('overwrite', False),
  ):
    if values[name].value != neutral:
      raise ValueError(
        f'--{name}: got {values[name].value} for an export, expected none; only'
        f' an import has a --{name}'
      )
  if values.out.endswith('.gguf'):
    if values.format != 'float':
      raise ValueError(
        f'--format: got {values.format} for a GGUF file, expected none; it has'
        ' a --kind'
      )
    result = writing.export_file(
      values.source, values.out, family=values.family, kind=values.kind
    )
  elif values.kind != 'auto':
    raise ValueError(
      f'--kind: got {values.kind} for a directory, expected none; only a GGUF'
      ' file has a --kind'
    )
  else:
    result = exporting.export_directory(
      values.source, values.out, family=values.family, form=values.format
    )
  print(f'exported: {values.out} as {result.family}')
  _tell(result.notes)


def _tell(notes: list[str]) -> None:
  for note in notes:
    print(f'note: {note}')


def _define_flags() -> None:
  path_flags.DEFINE_path(
    'source',
    None,
    'Model to read. Import: a Hugging Face directory, a GGUF file, or a'
    ' repository org/name. Export: a frozen directory.',
  )
  path_flags.DEFINE_path(
    'out', None, 'Directory to write. Export: a name.gguf writes a GGUF file.'
  )
  flags.DEFINE_enum(
    'kind',
    'auto',
    ('auto', 'F32', 'F16', 'BF16', 'Q8_0', 'Q5_1', 'Q5_0', 'Q4_1', 'Q4_0'),
    'Export of a GGUF file: kind of its matrices. auto keeps their dtype, and'
    ' keeps imported blocks byte for byte.',
  )
  flags.DEFINE_enum(
    'format',
    'float',
    ('float', 'compressed-tensors'),
    'Export of a directory: float dequantises kernels in fewer bits;'
    ' compressed-tensors writes them as they are stored.',
  )
  flags.DEFINE_enum(
    'dtype',
    'auto',
    ('auto', 'float32', 'bfloat16'),
    'Import: dtype of the frozen weights. auto rounds nothing.',
  )
  flags.DEFINE_enum(
    'weights',
    'auto',
    ('auto', 'float', 'kept'),
    'Import of a GGUF file, or of a quantised Hugging Face directory'
    ' (compressed-tensors, GPTQ, AWQ, fp8): kept leaves matrices as they are'
    ' stored; float dequantises them to --dtype. auto keeps the kinds that'
    ' native code of this machine multiplies by, and says so: a CPU with a C++'
    ' compiler. Kept matrices take less memory, but more time without native'
    ' code.',
  )
  flags.DEFINE_string(
    'revision',
    '',
    'Import: commit, branch or tag of a repository on the hub; default its main'
    ' branch.',
  )
  path_flags.DEFINE_path(
    'tokenizer',
    '',
    'Import of a GGUF file: Hugging Face directory with the tokenizer of the'
    ' same model. Default: the tokenizer of the file.',
  )
  flags.DEFINE_string(
    'family',
    '',
    'Export: model_type to write; default the family that the model was'
    ' imported as, or else the first that computes the same function.',
  )
  flags.DEFINE_bool(
    'overwrite', False, 'Import: replace a frozen directory with other weights.'
  )
  flags.mark_flags_as_required(['source', 'out'])


if __name__ == '__main__':
  _define_flags()
  app.run(main)
