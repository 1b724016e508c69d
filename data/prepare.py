"""Preparation of a stock TFDS data set, in a virtual environment of its own.

    python -m data.prepare --dataset=lm1b --data_dir=~/tfds
    python -m data.prepare --dataset=tiny_shakespeare --data_dir=~/tfds \
      --manual_dir=downloads  # a directory that has input.txt

Most of TFDS's own builders need TensorFlow, and nothing else in this repository
does. This command makes a virtual environment, installs TensorFlow there, and
lets TFDS write ArrayRecord, which is read without TensorFlow. At the end, it
prints how to train on the data. A second start keeps finished work.

A file in `--manual_dir` with a name from the data set's checksums.tsv replaces
the download of that file; its SHA-256 is checked. Some data sets need more
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

# The oldest versions whose ArrayRecord files are read here.
PACKAGES = (
  'tensorflow>=2.19',
  'tensorflow-datasets>=4.9.10,<5',
  'importlib_resources>=6',  # TFDS needs it and does not declare it
)
# Runs in the virtual environment, which has none of our code. Its last line of
# output is the result.
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
_MAX_ERROR = 200  # characters: TFDS lists every data set it knows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
  """A data set that `sources.tfds_directory` opens."""

  directory: str
  splits: dict[str, int]  # documents of each split
  text_keys: list[str]


def prepare(
  dataset: str,
  data_dir: str,
  *,
  manual_dir: str = '',
  venv_dir: str = '',
  packages: Sequence[str] = (),
) -> Prepared:
  """Returns a data set, prepared now if it was not.

  Args:
    dataset: a name of TFDS's catalogue, with an optional /config:version.
    data_dir: directory of all data sets.
    manual_dir: directory of files that replace downloads; '' for none.
    venv_dir: the virtual environment; '' for one in `data_dir`.
    packages: further packages to install there.

  Raises:
    ValueError: the environment cannot be made, or TFDS cannot prepare the data
      set.
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
    ValueError: the packages cannot be installed.
  """
  python = directory / 'bin' / 'python'
  # Written at the end: an installation that was killed is repeated.
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
      f' ({_last_line(error.stderr)}); pip needs a package index: a network, or'
      ' another index in PIP_INDEX_URL or PIP_FIND_LINKS'
    ) from None
  except OSError as error:
    raise ValueError(
      f'{directory}: no environment can be made there ({error}); choose another'
      ' directory with --venv'
    ) from None
  return python


def run_in(
  python: pathlib.Path | str,
  dataset: str,
  data_dir: pathlib.Path,
  manual_dir: pathlib.Path | None,
) -> Prepared:
  """Prepares a data set with the TFDS of another interpreter.

  Raises:
    ValueError: TFDS failed; has the error of TFDS.
  """
  result = subprocess.run(
    [python, '-c', _PROGRAM, dataset, str(data_dir), str(manual_dir or '')],
    stdout=subprocess.PIPE,
    text=True,
    # TensorFlow logs a line for every accelerator that it does not find.
    env=os.environ | {'TF_CPP_MIN_LOG_LEVEL': '3', 'CUDA_VISIBLE_DEVICES': ''},
    check=False,
  )
  line = _last_line(result.stdout)
  if not line.startswith('{'):
    raise ValueError(
      f'--dataset={dataset}: TFDS died with exit code {result.returncode};'
      ' its output is above'
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
  """Returns a summary of the data set, and a command that trains on it."""
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
  """Prepares the data set that the flags name."""
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

  from checks import path_flags

  flags.DEFINE_string(
    'dataset', None, "Name in TFDS's catalogue, such as lm1b.", required=True
  )
  path_flags.DEFINE_path(
    'data_dir', '~/tensorflow_datasets', 'Directory of all prepared data sets.'
  )
  path_flags.DEFINE_path(
    'manual_dir',
    '',
    'Directory of files that replace downloads; set it for data sets that TFDS'
    ' cannot download.',
  )
  path_flags.DEFINE_path(
    'venv',
    '',
    'Virtual environment for TensorFlow, made if missing; default tfds_venv in'
    ' --data_dir.',
  )
  flags.DEFINE_list(
    'packages', [], 'Further packages that the data set needs, by commas.'
  )
  app.run(main)
