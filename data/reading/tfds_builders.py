"""Prepares a TFDS builder once, whoever asks and however often it is killed.

TFDS writes into a temporary directory and renames it, so a directory that
exists is complete. What it does not do is wait: of two processes that prepare
the same data, the second fails on the rename. A lock file puts them in line.
"""

import contextlib
import io
import pathlib
import shutil

import tensorflow_datasets as tfds

from storage import locks


def prepare(builder: tfds.core.DatasetBuilder) -> pathlib.Path:
  """Prepares `builder` as ArrayRecord unless it is; returns its directory."""
  directory = pathlib.Path(builder.data_dir)
  if directory.is_dir():  # needs no write access: the cache may be read-only
    return directory
  directory.parent.mkdir(parents=True, exist_ok=True)
  with locks.locked(directory.parent / '.preparing.lock'):
    if not directory.is_dir():
      # Nobody else is preparing, so these are what a killed process left.
      for leftover in directory.parent.glob('incomplete.*'):
        shutil.rmtree(leftover, ignore_errors=True)
      tfds.disable_progress_bar()
      # TFDS announces a download of unknown size, of data that is local.
      with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare(
          file_format='array_record',
          download_config=tfds.download.DownloadConfig(try_download_gcs=False),
        )
  return directory
