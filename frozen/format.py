"""The frozen directory: the only thing that crosses from life one to life two.

    manifest.json         config, digests, lineage, cost (`frozen.manifest`)
    params/               the weights, written by orbax
    tokenizer/            read by `text.tokenizer.load`
    chat_template.jinja   empty: the default transcript of `text.chat`
    generation.json       recommended sampling settings

The promise, tested by damage on purpose: a directory that `read` accepts holds
byte for byte the values given to `write`. Kernels may be in fewer bits, see
`frozen.stored_kernels`; they stay so. The manifest lists every file with its
SHA-256. The weights also have a digest of their own, which does not depend on
the way in which they are stored. A directory appears whole or not at all
(`storage.atomic`).
"""

from collections.abc import Callable, Mapping, Sequence
import concurrent.futures
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import shutil
from typing import Any

import jax
import numpy as np

from checks import expect
from frozen import manifest as manifest_lib, stored_kernels, stored_params
from models import axes, model_config, param_shapes
from models.layers import reward_head
from models.linear.stored import tree as stored_tree
from storage import atomic, digests, file_names
from text import tokenizer as tokenizer_lib

# Variables of `models.transformer.Transformer`, and the head of a reward model.
Params = Any


# (path, weight) -> the weight in the reader's form
Convert = Callable[[str, jax.Array], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opened:
  """A frozen directory of which only the manifest is verified yet."""

  directory: pathlib.Path
  manifest: manifest_lib.Manifest
  config: model_config.ModelConfig
  shapes: Params  # shapes of the weights, with their shardings
  generation: dict[str, Any]
  chat_template: str

  @property
  def tokenizer_dir(self) -> pathlib.Path:
    """Returns the directory that `text.tokenizer.load` reads."""
    return self.directory / file_names.TOKENIZER

  def check_files(self) -> None:
    """Verifies the digests of all files; raises as `read_params` does."""
    manifest_lib.check_files(self.directory, self.manifest)

  def read_params(
    self, convert: Convert = lambda name, weight: weight
  ) -> Params:
    """Returns the weights, and verifies the digests of all files.

    Args:
      convert: applied to each weight as soon as it is read, except to heads;
        it receives a path such as 'params/layer_0/mlp/up/kernel'. Only one
        weight at a time exists in both forms.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file differs from the file that was written.
    """
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
      # In a thread: digests need no Python lock.
      checked = pool.submit(self.check_files)
      try:
        params, digest = self._read_params(convert)
      except Exception:
        checked.result()  # its error names the damaged file
        raise
      checked.result()
    if digest != self.manifest.weights_digest:
      raise ValueError(
        f'{self.directory / file_names.PARAMS}: got weights with digest'
        f' {digest}, expected {self.manifest.weights_digest}; copy or freeze'
        ' the directory again'
      )
    return params

  def _read_params(self, convert: Convert) -> tuple[Params, str]:
    path = self.directory / file_names.PARAMS
    stored = stored_params.open_all(path)
    on_disk = stored_params.as_written(self.shapes)
    _check_params(stored_params.shapes(stored), on_disk, path)
    wanted, digest, read = leaves_by_path(self.shapes), hashlib.sha256(), {}
    for name, array in stored_params.read_all(stored):
      array = array.view(wanted[name].dtype)  # bytes of 8-bit floats
      _add_to_digest(digest, name, array)
      # No copy on a CPU: the memory is aligned, and nothing else holds it.
      weight = jax.device_put(array, wanted[name].sharding)
      is_head = name.startswith(f'{axes.HEADS}/')
      read[name] = weight if is_head else convert(name, weight)
    _add_forms_to_digest(digest, self.shapes)
    structure = jax.tree.structure(self.shapes)
    leaves = [read[name] for name in wanted]
    return jax.tree.unflatten(structure, leaves), digest.hexdigest()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frozen(Opened):
  """The contents of a frozen directory, verified."""

  params: Params


def weights_digest(params: Params) -> str:
  """Returns SHA-256 (hex) over names, dtypes, shapes and values.

  Leaves are sorted by path. Values are C-ordered bytes in the byte order of the
  machine, which is little-endian wherever JAX runs. So equal weights have equal
  digests in every storage. The forms of kernels in fewer bits follow.
  """
  digest = hashlib.sha256()
  for name, leaf in sorted(leaves_by_path(params).items()):
    _add_to_digest(digest, name, leaf)
  _add_forms_to_digest(digest, params)
  return digest.hexdigest()


def _add_forms_to_digest(digest, params: Params) -> None:
  # The same bytes mean other numbers in another form.
  if kernels := stored_kernels.described(params):
    digest.update(json.dumps(kernels, sort_keys=True).encode())


def _add_to_digest(digest, name: str, leaf: Any) -> None:
  array = np.ascontiguousarray(leaf)
  digest.update(f'{name}\0{array.dtype.name}\0{leaf.shape}\0'.encode())
  digest.update(array.reshape(-1).view(np.uint8).data)


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
  record: Mapping[str, Any] | None = None,
  texts: Mapping[str, str] | None = None,
  overwrite: bool = False,
) -> manifest_lib.Manifest:
  """Writes a frozen directory; a failure leaves `directory` unchanged.

  Args:
    directory: to write. Its parent is created.
    params: serving params, all of `dtype`; arrays of jax or numpy. Kernels may
      be of `models/linear/stored/`. With heads, it is no language model.
    config: config of the model. Its `spare_ids` are replaced by the ids that
      the tokenizer does not have.
    dtype: dtype of the weights.
    provenance: origin of the weights.
    tokenizer_dir: copied into the directory.
    generation: recommended sampling settings, JSON values.
    chat_template: Jinja source.
    record: origin of the kernels in fewer bits, JSON values.
    texts: other files, by name.
    overwrite: replace a frozen directory with other weights.

  Raises:
    ValueError: `params` do not fit `config`, or `directory` exists and has
      other contents.
  """
  target = pathlib.Path(directory).resolve()
  atomic.restore(target)
  config = _masking(config, tokenizer_dir)
  heads = sorted(params.get(axes.HEADS, ()))
  abstract = abstract_params(config, dtype, heads=heads)
  stored_kernels.check(params, abstract)
  quantization = stored_kernels.quantization(params, record)
  abstract = stored_kernels.with_kernels(abstract, quantization)
  _check_params(params, abstract, 'params')
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    # In a thread: writing to the disk leaves a core free.
    digest = pool.submit(weights_digest, params)
    _check_replaceable(target, digest.result, overwrite)
    with atomic.new_directory(target) as partial:
      stored_params.save(partial / file_names.PARAMS, params)
      _copy_tree(pathlib.Path(tokenizer_dir), partial / file_names.TOKENIZER)
      (partial / file_names.CHAT_TEMPLATE).write_bytes(
        chat_template.encode('utf-8')
      )
      (partial / file_names.GENERATION).write_text(
        json.dumps(dict(generation), indent=2) + '\n', encoding='utf-8'
      )
      for name, text in (texts or {}).items():
        (partial / name).write_text(text, encoding='utf-8')
      manifest = manifest_lib.sign(
        **dataclasses.asdict(provenance),
        model=config.to_dict(),
        dtype=dtype,
        quantization=quantization,
        num_params=_num_params(params),
        weights_digest=digest.result(),
        files=manifest_lib.file_digests(partial),
        heads=heads,
      )
      manifest_lib.write(partial, manifest)
  return manifest


def read(
  directory: str | os.PathLike, *, sharding: jax.sharding.Sharding | None = None
) -> Frozen:
  """Reads a frozen directory and verifies every digest.

  Args:
    directory: written by `write`.
    sharding: sharding of the weights; None: all on the first device.

  Raises:
    FileNotFoundError: there is no frozen directory, or a file is missing.
    ValueError: a file differs from the file that was written.
  """
  opened = open_directory(directory, sharding=sharding)
  return Frozen(**vars(opened), params=opened.read_params())


def open_directory(
  directory: str | os.PathLike, *, sharding: jax.sharding.Sharding | None = None
) -> Opened:
  """Opens a frozen directory, as `read` does, without its weights.

  Raises:
    FileNotFoundError: there is no frozen directory, or a file is missing.
    ValueError: its manifest is damaged or altered.
  """
  directory = pathlib.Path(directory).absolute()
  manifest = manifest_lib.read(directory)
  config = _config_of(directory, manifest)
  if sharding is None:
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  try:
    if 'spare_ids' not in manifest.model:  # written by an earlier version
      config = _masking(config, directory / file_names.TOKENIZER)
    return Opened(
      directory=directory,
      manifest=manifest,
      config=config,
      shapes=_shapes(directory, manifest, config, sharding),
      generation=read_generation(directory),
      chat_template=read_chat_template(directory),
    )
  except (OSError, ValueError):
    manifest_lib.check_files(directory, manifest)  # its error names the file
    raise


def read_whole(directory: str | os.PathLike) -> Frozen:
  """Reads a frozen directory, whose kernels are then floats of its dtype.

  The manifest stays the directory's own. Raises as `read` does.
  """
  frozen = read(directory)
  if not stored_kernels.described(frozen.params):
    return frozen
  dtype = frozen.manifest.dtype
  return dataclasses.replace(
    frozen,
    params=stored_tree.whole_kernels(frozen.params, dtype),
    shapes=abstract_params(frozen.config, dtype, heads=frozen.manifest.heads),
  )


def shapes_of(
  manifest: manifest_lib.Manifest, config: model_config.ModelConfig
) -> Params:
  """Returns the shapes of the weights of a frozen directory, as stored."""
  return stored_kernels.with_kernels(
    abstract_params(config, manifest.dtype, heads=manifest.heads),
    manifest.quantization,
  )


def storage_text(manifest: manifest_lib.Manifest) -> str:
  """Returns the storage of kernels in fewer bits, in one line; '' for none."""
  if manifest.quantization == stored_kernels.NONE:
    return ''
  config = model_config.ModelConfig.from_dict(manifest.model)
  shapes = shapes_of(manifest, config)
  return stored_kernels.summary(manifest.quantization, shapes)


def _shapes(directory: pathlib.Path, manifest, config, sharding) -> Params:
  shapes = abstract_params(config, manifest.dtype, sharding, manifest.heads)
  try:
    return stored_kernels.with_kernels(shapes, manifest.quantization)
  except ValueError as error:
    raise ValueError(f'{directory / file_names.MANIFEST}: {error}') from None


def _num_params(params: Params) -> int:
  return sum(
    math.prod(leaf.shape)
    for leaf in jax.tree.leaves(params, is_leaf=stored_tree.is_stored)
  )


def leaves_by_path(params: Params) -> dict[str, Any]:
  """Returns the leaves by path, such as 'params/layer_0/mlp/up/kernel'."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(params)
  return {
    '/'.join(str(getattr(key, 'key', key)) for key in path): leaf
    for path, leaf in leaves
  }


def abstract_params(
  config: model_config.ModelConfig,
  dtype: str,
  sharding: Any = None,
  heads: Sequence[str] = (),
) -> Params:
  """Returns the shapes of a model's variables, all of one dtype.

  Raises:
    ValueError: this code does not know one of the heads.
  """

  def shape(leaf):
    return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding)

  tree = jax.tree.map(shape, param_shapes.of(config)['params'])
  if not heads:
    return {'params': tree}
  expect.one_of('heads', tuple(heads), [(reward_head.NAME,)])
  kernel = jax.ShapeDtypeStruct((config.model_width, 1), dtype)
  head = {'kernel': shape(kernel)}
  return {'params': tree, axes.HEADS: {reward_head.NAME: head}}


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
  """Copies contents only: the modes of `source` are not copied."""
  target.mkdir()
  for name in digests.names(source):
    (target / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / name, target / name)


def _check_params(params: Params, abstract_params: Params, where) -> None:
  """Raises ValueError if names, shapes or dtypes are not as expected."""
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
      f' the new weights, {digest()}, or none; choose another place or say'
      ' overwrite'
    )
