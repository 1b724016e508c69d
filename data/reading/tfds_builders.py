"""TFDS builders: data is prepared once, even with several or killed processes.

TFDS writes into a temporary directory and renames it, so a directory that
exists is complete. But TFDS does not wait: if two processes prepare the same
data, the rename of the second one fails. A lock file makes the second one wait.
"""

import contextlib
import io
import pathlib
import shutil

import tensorflow_datasets as tfds

from storage import locks


def prepare(builder: tfds.core.DatasetBuilder) -> pathlib.Path:
  """Returns the directory of a builder's data, prepared as ArrayRecord."""
  directory = pathlib.Path(builder.data_dir)
  if directory.is_dir():  # before the lock: the directory may be read-only
    return directory
  directory.parent.mkdir(parents=True, exist_ok=True)
  with locks.locked(directory.parent / '.preparing.lock'):
    if not directory.is_dir():
      # This process holds the lock, so these are left by a killed process.
      for leftover in directory.parent.glob('incomplete.*'):
        shutil.rmtree(leftover, ignore_errors=True)
      tfds.disable_progress_bar()
      # TFDS prints that it downloads, though the data is local.
      with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare(
          file_format='array_record',
          download_config=tfds.download.DownloadConfig(try_download_gcs=False),
        )
  return directory
