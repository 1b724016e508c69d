"""The frozen directory: the only thing that crosses from life one to life two.

    manifest.json         config, digests, lineage, cost (`frozen.manifest`)
    params/               the weights, written by orbax
    tokenizer/            read by `text.tokenizer.load`
    chat_template.jinja   empty: the default transcript of `text.chat`
    generation.json       recommended sampling settings

The promise, tested by damage on purpose: a directory that `read` accepts is
byte for byte what `write` was given. The manifest lists every file with its
SHA-256. The weights also have a digest of their own, which does not depend on
how they are stored. A directory appears whole or not at all (`storage.atomic`).
"""

from collections.abc import Callable, Mapping
import concurrent.futures
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from frozen import manifest as manifest_lib
from models import model_config, transformer
from storage import atomic, digests, file_names
from text import tokenizer as tokenizer_lib

Params = Any  # variables of `models.transformer.Transformer`


@dataclasses.dataclass(frozen=True)
class Frozen:
  """The contents of a frozen directory, verified."""

  directory: pathlib.Path
  manifest: manifest_lib.Manifest
  config: model_config.ModelConfig
  params: Params
  tokenizer_dir: pathlib.Path
  generation: dict[str, Any]
  chat_template: str


def checkpointer() -> ocp.StandardCheckpointer:
  """Returns a checkpointer of orbax that waits for no other process.

  In a run of several processes, one process writes a frozen directory, and each
  process reads it for itself.
  """
  return ocp.StandardCheckpointer(multiprocessing_options=_alone())


def _alone() -> ocp.options.MultiprocessingOptions:
  me = jax.process_index()
  return ocp.options.MultiprocessingOptions(
    primary_host=me,
    active_processes={me},
    barrier_sync_key_prefix=f'frozen_{me}',
  )


def weights_digest(params: Params) -> str:
  """Returns SHA-256 (hex) over names, dtypes, shapes and values.

  Leaves are sorted by path. Values are C-ordered bytes in the byte order of the
  machine, which is little-endian wherever JAX runs. So equal weights have equal
  digests, however they are stored.
  """
  digest = hashlib.sha256()
  for name, leaf in sorted(leaves_by_path(params).items()):
    array = np.ascontiguousarray(leaf)
    digest.update(f'{name}\0{array.dtype.name}\0{leaf.shape}\0'.encode())
    digest.update(array.reshape(-1).view(np.uint8).data)
  return digest.hexdigest()


def write(
  directory: str | os.PathLike,
  *,
  params: Params,
  config: model_config.ModelConfig,
  dtype: str,
  provenance: manifest_lib.Provenance,
  tokenizer_dir: str | os.PathLike,
  generation: Mapping[str, Any],
  chat_template: str = '',
  overwrite: bool = False,
) -> manifest_lib.Manifest:
  """Writes a frozen directory; a failure leaves `directory` unchanged.

  Args:
    directory: to write. Its parent is created.
    params: serving params, all of `dtype`; arrays of jax or numpy.
    config: of the model. Its `spare_ids` are replaced by the ids that the
      tokenizer does not have.
    dtype: of the weights.
    provenance: origin of the weights.
    tokenizer_dir: copied into the directory.
    generation: recommended sampling settings, JSON values.
    chat_template: Jinja source.
    overwrite: replace a frozen directory with other weights.

  Raises:
    ValueError: `params` do not fit `config`, or `directory` exists and has
      other contents.
  """
  target = pathlib.Path(directory).resolve()
  atomic.restore(target)
  config = _masking(config, tokenizer_dir)
  _check_params(params, abstract_params(config, dtype), 'params')
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    # In a thread: writing to the disk leaves a core free.
    digest = pool.submit(weights_digest, params)
    _check_replaceable(target, digest.result, overwrite)
    with atomic.new_directory(target) as partial:
      _save(partial / file_names.PARAMS, params)
      _copy_tree(pathlib.Path(tokenizer_dir), partial / file_names.TOKENIZER)
      (partial / file_names.CHAT_TEMPLATE).write_bytes(
        chat_template.encode('utf-8')
      )
      (partial / file_names.GENERATION).write_text(
        json.dumps(dict(generation), indent=2) + '\n', encoding='utf-8'
      )
      manifest = manifest_lib.sign(
        **dataclasses.asdict(provenance),
        model=config.to_dict(),
        dtype=dtype,
        quantization={'kind': 'none'},
        num_params=sum(leaf.size for leaf in jax.tree.leaves(params)),
        weights_digest=digest.result(),
        files=manifest_lib.file_digests(partial),
      )
      manifest_lib.write(partial, manifest)
  return manifest


def read(
  directory: str | os.PathLike, *, sharding: jax.sharding.Sharding | None = None
) -> Frozen:
  """Reads a frozen directory and verifies every digest.

  Args:
    directory: written by `write`.
    sharding: of the weights; None: all on the first device.

  Raises:
    FileNotFoundError: there is no frozen directory, or a file is missing.
    ValueError: a file differs from what was written.
  """
  directory = pathlib.Path(directory).absolute()
  manifest = manifest_lib.read(directory)
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    # In a thread: digests need no Python lock, and shapes are traced meanwhile.
    checked = pool.submit(manifest_lib.check_files, directory, manifest)
    config = _config_of(directory, manifest)
    if sharding is None:
      sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = abstract_params(config, manifest.dtype, sharding)
    checked.result()
  if 'spare_ids' not in manifest.model:  # written by an earlier version
    config = _masking(config, directory / file_names.TOKENIZER)
  params = _restore(directory / file_names.PARAMS, target)
  if (digest := weights_digest(params)) != manifest.weights_digest:
    raise ValueError(
      f'{directory / file_names.PARAMS}: got weights with digest {digest},'
      f' expected {manifest.weights_digest}; copy or freeze the directory again'
    )
  return Frozen(
    directory=directory,
    manifest=manifest,
    config=config,
    params=params,
    tokenizer_dir=directory / file_names.TOKENIZER,
    generation=read_generation(directory),
    chat_template=read_chat_template(directory),
  )


def leaves_by_path(params: Params) -> dict[str, Any]:
  """Returns the leaves by path, such as 'params/layer_0/mlp/up/kernel'."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(params)
  return {
    '/'.join(str(getattr(key, 'key', key)) for key in path): leaf
    for path, leaf in leaves
  }


def abstract_params(
  config: model_config.ModelConfig, dtype: str, sharding: Any = None
) -> Params:
  """Returns the shapes of a model's variables, all of one dtype."""
  # Layers that are alike are traced as one stack, which takes less time.
  is_stacked = config.is_uniform
  model = transformer.Transformer(
    config=dataclasses.replace(config, scan_layers=is_stacked)
  )
  tokens_11 = jax.ShapeDtypeStruct((1, 1), np.int32)
  variables = jax.eval_shape(model.init, jax.random.key(0), tokens_11)
  if is_stacked and not config.scan_layers:
    layers = variables['params'].pop('layers')
    for n in range(config.num_layers):
      variables['params'][f'layer_{n}'] = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), layers
      )
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding),
    variables,
  )


def read_config(directory: str | os.PathLike) -> model_config.ModelConfig:
  """Returns the model config of a frozen directory.

  Verifies the manifest, and no other file.
  """
  directory = pathlib.Path(directory).absolute()
  return _config_of(directory, manifest_lib.read(directory))


def _config_of(directory: pathlib.Path, manifest) -> model_config.ModelConfig:
  try:
    return model_config.ModelConfig.from_dict(manifest.model)
  except ValueError as error:
    raise ValueError(f'{directory / file_names.MANIFEST}: {error}') from None


def _masking(
  config: model_config.ModelConfig, tokenizer_dir: str | os.PathLike
) -> model_config.ModelConfig:
  """Returns the config with the ids that the tokenizer leaves masked."""
  tokenizer = tokenizer_lib.load(tokenizer_dir)
  spare_ids = tokenizer_lib.spare_ids(tokenizer, config.vocab_size)
  return dataclasses.replace(config, spare_ids=spare_ids)


def read_generation(directory: str | os.PathLike) -> dict[str, Any]:
  """Returns the recommended settings of a frozen directory, not verified."""
  path = pathlib.Path(directory) / file_names.GENERATION
  return json.loads(path.read_text('utf-8'))


def read_chat_template(directory: str | os.PathLike) -> str:
  """Returns the chat template of a frozen directory, not verified."""
  # As bytes: text mode would change line ends.
  path = pathlib.Path(directory) / file_names.CHAT_TEMPLATE
  return path.read_bytes().decode('utf-8')


def _copy_tree(source: pathlib.Path, target: pathlib.Path) -> None:
  """Copies contents alone: modes are those of new files, not of `source`."""
  target.mkdir()
  for name in digests.names(source):
    (target / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / name, target / name)


def _save(path: pathlib.Path, params: Params) -> None:
  """Writes the weights with one copy of them in memory.

  The defaults of orbax take three times the weights: it copies numpy arrays
  before it writes them, and it keeps all compressed data at once.
  """
  params = jax.tree.map(np.asarray, params)
  options = _alone()
  if jax.process_count() == 1:
    # With several processes, orbax refuses jax arrays of one process.
    cpu = jax.local_devices(backend='cpu')[0]
    params = jax.device_put(params, cpu)  # no copy if the memory is aligned
  handler = ocp.PyTreeCheckpointHandler(
    save_concurrent_gb=1,
    use_compression=False,
    multiprocessing_options=options,
  )
  with ocp.Checkpointer(handler, multiprocessing_options=options) as writer:
    writer.save(path, args=ocp.args.PyTreeSave(params))
  # Only its presence matters to orbax, and it holds a path of this machine.
  for marker in path.rglob('commit_success.txt'):
    marker.write_text('')


def _check_params(params: Params, abstract_params: Params, where) -> None:
  """Raises ValueError if names, shapes or dtypes are not those expected."""
  got, expected = leaves_by_path(params), leaves_by_path(abstract_params)
  for name in sorted(got.keys() | expected.keys()):
    found, wanted = (
      f'{np.dtype(side[name].dtype).name}{list(side[name].shape)}'
      if name in side
      else 'nothing'
      for side in (got, expected)
    )
    if found != wanted:
      raise ValueError(
        f'{where}: got {found} at {name}, expected {wanted}: the weights are'
        ' not of the model that the config describes; freeze again'
      )


def _restore(path: pathlib.Path, target: Params) -> Params:
  with checkpointer() as reader:
    # Compared first: orbax casts to the wanted dtype and says nothing, and its
    # error for a wrong shape is pages long.
    stored = reader.metadata(path).item_metadata.tree
    _check_params(stored, target, path)
    return reader.restore(path, target)


def _check_replaceable(
  target: pathlib.Path, digest: Callable[[], str], overwrite: bool
) -> None:
  """Raises ValueError if a write to `target` would lose other contents."""
  if not target.exists() or (target.is_dir() and not any(target.iterdir())):
    return
  if not (target / file_names.MANIFEST).is_file():
    raise ValueError(
      f'{target}: got a place that holds something else, expected a new or a'
      ' frozen directory; choose another place'
    )
  if overwrite:
    return
  try:
    existing = manifest_lib.read(target).weights_digest
  except ValueError as error:
    existing = f'that cannot be read ({error})'
  if existing != digest():
    raise ValueError(
      f'{target}: got a frozen directory with weights {existing}, expected'
      f' those of now, {digest()}, or none; choose another place or say'
      ' overwrite'
    )
