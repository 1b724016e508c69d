"""Tiny frozen directories, for the tests of the bridge and of life two.

Weights are random with a large standard deviation: the output is nonsense, but
it differs from token to token and from prompt to prompt.
"""

from collections.abc import Iterator
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np

from frozen import format as frozen_format, manifest as manifest_lib
from models import model_config as model_config_lib, transformer
from tests.helpers import tiny_models

EXPERIMENT = 'tiny'


def config(**overrides) -> model_config_lib.ModelConfig:
  """Returns a Llama-like model with more ids than the byte tokenizer has."""
  return tiny_models.llama_like(
    **{'vocab_size': 270, 'max_length': 64, **overrides}
  )


def params(of: model_config_lib.ModelConfig, *, dtype='float32', seed: int = 0):
  """Returns random variables of a model."""
  rng = np.random.default_rng(seed)
  model = transformer.Transformer(config=of)
  shapes = jax.eval_shape(
    model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32)
  )
  return jax.tree.map(
    lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), dtype), shapes
  )


def provenance(**overrides) -> manifest_lib.Provenance:
  """Returns a made-up origin of the weights."""
  fields = {
    'experiment': EXPERIMENT,
    'code_commit': 'c0ffee',
    'has_bos': True,
    'step': 7,
    'tokens_seen': 7 * 128,
    'training_flops': 1.5e9,
    'train_seconds': 2.5,
    'data_mix': [{'source': 's', 'path': '', 'split': 'train', 'weight': 1.0}],
    'knowledge_cutoff': '2026-01-31',
    'weights': 'raw',
    'lineage': {'init_from': 'ab' * 32},
  }
  return manifest_lib.Provenance(**{**fields, **overrides})


def write(directory: pathlib.Path, **overrides) -> manifest_lib.Manifest:
  """Writes a frozen directory at `directory`, and its tokenizer beside it."""
  tokenizer_dir = directory.with_name('tokenizer')
  tiny_models.byte_tokenizer().save(tokenizer_dir)
  model_config = overrides.pop('config', config())
  fields = {
    'params': overrides.pop('params', None) or params(model_config),
    'config': model_config,
    'dtype': 'float32',
    'provenance': provenance(),
    'tokenizer_dir': tokenizer_dir,
    'generation': {'temperature': 0.9, 'max_tokens': 12, 'stop': []},
  }
  return frozen_format.write(directory, **{**fields, **overrides})


def damaged(
  original: pathlib.Path, copies: pathlib.Path
) -> Iterator[tuple[pathlib.Path, str]]:
  """Yields copies of a directory with one damaged file each, and its name.

  Every file is altered in one byte, cut by a byte, and removed.
  """
  names = [
    path.relative_to(original).as_posix()
    for path in sorted(original.rglob('*'))
    if path.is_file()
  ]
  for i, name in enumerate(names):
    for damage in ('alter', 'truncate', 'remove'):
      directory = shutil.copytree(original, copies / f'{i}{damage}')
      path = directory / name
      data = path.read_bytes()
      if damage == 'alter':
        path.write_bytes(bytes([data[0] ^ 1]) + data[1:] if data else b'x')
      elif damage == 'truncate' and data:
        # The last two bytes of the manifest are a brace and a line's end.
        path.write_bytes(data[:-1] if name != 'manifest.json' else data[:-3])
      else:
        path.unlink()
      yield directory, path.name
