"""Prepares a stock TFDS data set, in an environment of its own.

    python -m data.prepare --dataset=lm1b --data_dir=~/tfds
    python -m data.prepare --dataset=tiny_shakespeare --data_dir=~/tfds \
      --manual_dir=downloads  # that holds input.txt

Most of TFDS's own builders need TensorFlow, which nothing else here does. This
makes a virtual environment, installs it there, has TFDS write ArrayRecord, and
says how to train on the result, which is read without TensorFlow. It can be
started again: what is there is kept.

A file in `--manual_dir` that is called as in the data set's checksums.tsv is
used instead of its download; its SHA-256 is checked. Some data sets want more
libraries: --packages=apache-beam,mwparserfromhell.
"""

from collections.abc import Sequence
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import venv

from storage import atomic, locks

# The oldest that read and wrote ArrayRecord as we read it.
PACKAGES = (
  'tensorflow>=2.19',
  'tensorflow-datasets>=4.9.10,<5',
  'importlib_resources>=6',  # which TFDS needs and does not declare
)
# Runs in the environment, which has none of our code. The last line it prints
# is the result.
_PROGRAM = """
import json, sys
name, data_dir, manual_dir = sys.argv[1:]
try:
  import tensorflow_datasets as tfds
  import tensorflow_datasets.text  # registers what else is not found
  builder = tfds.builder(name, data_dir=data_dir, file_format='array_record')
  builder.download_and_prepare(
    file_format='array_record',
    download_config=tfds.download.DownloadConfig(
      manual_dir=manual_dir or None, try_download_gcs=False
    ),
  )
  result = {
    'directory': str(builder.data_dir),
    'splits': {k: v.num_examples for k, v in builder.info.splits.items()},
    'text_keys': [
      key
      for key, feature in builder.info.features.items()
      if isinstance(feature, tfds.features.Text)
    ],
  }
except Exception as error:
  words = ' '.join(str(error).split())
  result = {'error': f'{type(error).__name__}: {words}'}
print(json.dumps(result))
"""
_MAX_ERROR = 200  # characters: TFDS lists all that it knows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
  """A data set that `sources.tfds_directory` opens."""

  directory: str
  splits: dict[str, int]  # their documents
  text_keys: list[str]


def prepare(
  dataset: str,
  data_dir: str,
  *,
  manual_dir: str = '',
  venv_dir: str = '',
  packages: Sequence[str] = (),
) -> Prepared:
  """Prepares a data set, unless it is.

  Args:
    dataset: a name of TFDS's catalogue, with an optional /config:version.
    data_dir: where data sets are.
    manual_dir: holds files that are not to be downloaded; may be empty.
    venv_dir: the environment; beside the data sets if empty.
    packages: what else to install in it.

  Raises:
    ValueError: the environment cannot be made, or TFDS cannot prepare it.
  """
  directory = pathlib.Path(data_dir).expanduser().resolve()
  if manual_dir and not pathlib.Path(manual_dir).expanduser().is_dir():
    raise ValueError(
      f'--manual_dir: got {manual_dir!r}, expected a directory with the'
      " data set's files"
    )
  environment = (
    pathlib.Path(venv_dir).expanduser() if venv_dir else directory / 'tfds_venv'
  )
  python = make_environment(environment, (*PACKAGES, *packages))
  return run_in(
    python,
    dataset,
    directory,
    pathlib.Path(manual_dir).expanduser().resolve() if manual_dir else None,
  )


def make_environment(
  directory: pathlib.Path, packages: Sequence[str]
) -> pathlib.Path:
  """Returns the interpreter of a virtual environment that has `packages`.

  Raises:
    ValueError: they cannot be installed.
  """
  python = directory / 'bin' / 'python'
  # Written when all is there: an installation that was killed is repeated.
  done = directory / 'installed.json'
  wanted = sorted(packages)
  try:
    directory.mkdir(parents=True, exist_ok=True)
    with locks.locked(directory / '.installing.lock'):
      if done.is_file() and json.loads(done.read_text()) == wanted:
        return python
      print(f'making {directory}; TensorFlow takes 2 GB and some minutes')
      venv.create(directory, with_pip=True, symlinks=True)
      subprocess.run(
        [python, '-m', 'pip', 'install', '--quiet', *packages],
        check=True,
        stdout=sys.stderr,
        stderr=subprocess.PIPE,
        text=True,
      )
      atomic.write_text(done, json.dumps(wanted))
  except subprocess.CalledProcessError as error:
    raise ValueError(
      f'{directory}: {", ".join(packages)} cannot be installed'
      f' ({_last_line(error.stderr)}); pip needs an index: a network, or'
      ' PIP_INDEX_URL or PIP_FIND_LINKS set to another'
    ) from None
  except OSError as error:
    raise ValueError(
      f'{directory}: no environment can be made there ({error}); set --venv'
    ) from None
  return python


def run_in(
  python: pathlib.Path | str,
  dataset: str,
  data_dir: pathlib.Path,
  manual_dir: pathlib.Path | None,
) -> Prepared:
  """Has TFDS prepare a data set in another interpreter.

  Raises:
    ValueError: it cannot; says what TFDS says.
  """
  result = subprocess.run(
    [python, '-c', _PROGRAM, dataset, str(data_dir), str(manual_dir or '')],
    stdout=subprocess.PIPE,
    text=True,
    # TensorFlow tells of every accelerator it does not find.
    env=os.environ | {'TF_CPP_MIN_LOG_LEVEL': '3', 'CUDA_VISIBLE_DEVICES': ''},
    check=False,
  )
  line = _last_line(result.stdout)
  if not line.startswith('{'):
    raise ValueError(
      f'--dataset={dataset}: TFDS died with exit code {result.returncode};'
      ' what it said is above'
    )
  values = json.loads(line)
  if 'error' in values:
    raise ValueError(
      f'--dataset={dataset}: TFDS cannot prepare it'
      f' ({values["error"][:_MAX_ERROR]}); its catalogue is'
      ' https://www.tensorflow.org/datasets/catalog, and files that cannot be'
      ' downloaded go into --manual_dir'
    )
  return Prepared(**values)


def usage(prepared: Prepared) -> str:
  """Says what there is, and how to train on it."""
  splits = ', '.join(f'{k} {n:,}' for k, n in prepared.splits.items())
  lines = [f'prepared   {prepared.directory}', f'documents  {splits}']
  if not prepared.text_keys:
    return '\n'.join([*lines, 'It has no text to train on.'])
  return '\n'.join(
    [
      *lines,
      f'text       {", ".join(prepared.text_keys)}',
      'train on it with data.sources.tfds_directory, as in',
      '  python train.py --config=experiments/pretrain_files.py:tfds'
      f' --workdir=... --config.data.path={prepared.directory}'
      f' --config.data.text_key={prepared.text_keys[0]}',
    ]
  )


def _last_line(text: str) -> str:
  return (text.strip().splitlines() or [''])[-1]


def main(argv: list[str]) -> None:
  """Prepares what the flags name."""
  del argv
  values = flags.FLAGS
  try:
    prepared = prepare(
      values.dataset,
      values.data_dir,
      manual_dir=values.manual_dir,
      venv_dir=values.venv,
      packages=values.packages,
    )
  except ValueError as error:
    sys.exit(f'error: {error}')
  print(usage(prepared))


if __name__ == '__main__':
  from absl import app, flags

  flags.DEFINE_string(
    'dataset', None, "Name in TFDS's catalogue, as in lm1b.", required=True
  )
  flags.DEFINE_string('data_dir', '~/tensorflow_datasets', 'Where it goes.')
  flags.DEFINE_string('manual_dir', '', 'Files that are not to be downloaded.')
  flags.DEFINE_string('venv', '', 'The environment; in data_dir if not given.')
  flags.DEFINE_list('packages', [], 'What else the data set needs.')
  app.run(main)
