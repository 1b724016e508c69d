"""TFDS builder `problems`: arithmetic and small reasoning, made from a seed.

    builder = problems.Problems(
      settings=generator.Settings(kind='pairs', count=5000), data_dir=...)

An example has the features of a record (data/problems/records.py). Other
settings are prepared in another directory. `count` is the size of the training
split; validation and test have a tenth of it each. No problem of one split is
in another one.
"""

import dataclasses
import hashlib
import os
import pathlib

import numpy as np
import tensorflow_datasets as tfds

from data.problems import generator, records

_MESSAGES = tfds.features.Sequence(
  {'role': tfds.features.Text(), 'content': tfds.features.Text()}
)
_FEATURES = {
  'label': np.bool_,
  'level': np.int32,
  'margin': np.float32,
  **dict.fromkeys(
    ('messages', 'prompt', 'chosen', 'rejected', 'completion'), _MESSAGES
  ),
}


class Problems(tfds.core.GeneratorBasedBuilder):
  """Problems of some families and levels, with worked solutions."""

  # Raise the version when the same settings make other problems.
  VERSION = tfds.core.Version('1.0.0')

  def __init__(
    self, *, settings: generator.Settings, data_dir: str | os.PathLike
  ):
    """Prepares nothing yet; the data will be in a directory of the settings."""
    self._settings = settings
    digest = hashlib.sha256(str(settings).encode('utf-8')).hexdigest()
    # Not a config of TFDS, which warns of every config that it does not know.
    name = f'problems_{settings.kind}_{digest[:16]}'
    super().__init__(data_dir=pathlib.Path(data_dir) / name)

  def _info(self) -> tfds.core.DatasetInfo:
    # The fields of a record depend on its kind alone.
    (record,) = records.make(self._of(1), 'train')
    return tfds.core.DatasetInfo(
      builder=self,
      description=f'{__doc__}\nSettings: {self._settings}',
      features=tfds.features.FeaturesDict(
        {name: _FEATURES.get(name, tfds.features.Text()) for name in record}
      ),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # nothing is downloaded
    held_out = self._of(-(-self._settings.count // 10))
    return {
      split: self._generate_examples(
        self._settings if split == 'train' else held_out, split
      )
      for split in generator.SPLITS
    }

  def _generate_examples(self, settings: generator.Settings, split: str):
    yield from enumerate(records.make(settings, split))

  def _of(self, count: int) -> generator.Settings:
    return dataclasses.replace(self._settings, count=count)
