"""Adapter directories: the change that a run made, without its base.

    python -m frozen.adapters import --base=FROZEN --source=PEFT_DIR --out=DIR
    python -m frozen.adapters merge --base=FROZEN --source=DIR --out=FROZEN2

    manifest.json               the base's digest, the adapter's own, lineage
    adapter_config.json         both as peft reads and writes them, see
    adapter_model.safetensors   frozen/huggingface/peft_files.py
    gains.safetensors           DoRA: the factor of each column of B
    chat_template.jinja         the run's template; empty: the base's template
    generation.json             recommended sampling settings

An adapter belongs to one base: the frozen directory whose weights have the
digest in its manifest. `read` refuses every other base. A merge adds A B to the
kernels in float32, and rounds them once to the dtype of the result.

The base of a run may have been quantised (`adapter.base`). The adapter was then
trained beside rounded kernels. A merge into such a base dequantises these
kernels, so the result is the function that was trained, not the float base plus
the adapter.
"""

from collections.abc import Mapping
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import sys
from typing import Any

from absl import app, flags, logging
import jax
import jax.numpy as jnp
import numpy as np

from checks import path_flags
from frozen import format as frozen_format, manifest as manifest_lib
from frozen.huggingface import peft_files, safetensors_files
from models import adapter_config, layout
from models.layers import adapters
from models.linear.stored import tree as stored_tree
from storage import atomic, digests, file_names

FORMAT_VERSION = 1
_GAINS = 'gains.safetensors'


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterManifest(manifest_lib.Provenance):
  """The contents of an adapter's manifest.json."""

  kind: str  # manifest_lib.ADAPTER
  format_version: int
  base_digest: str  # digest of the base's weights
  base_name: str
  base_form: str  # one of adapter_config.BASES: form of kernels in training
  num_params: int
  adapter_digest: str  # over the base's digest and the adapter's values
  files: dict[str, str]  # relative path -> SHA-256, all but the manifest
  manifest_digest: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapter:
  """The contents of an adapter directory, verified."""

  directory: pathlib.Path
  manifest: AdapterManifest
  # For models.layers.adapters; separate layers, the scale in B.
  tree: dict[str, Any]
  generation: dict[str, Any]
  chat_template: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
  """Adapters of a run, and the base that they were trained on."""

  base: frozen_format.Opened
  config: adapter_config.AdapterConfig
  effective: dict[str, Any]  # separate layers, as a model reads them
  layers: dict[str, peft_files.Layer]  # by path, as peft has them
  params: frozen_format.Params  # the base in training, float32


def trained(
  base_directory: str | os.PathLike,
  digest: str,
  config: adapter_config.AdapterConfig,
  tree: Any,
  *,
  is_stacked: bool,
) -> Trained:
  """Joins the adapters of a checkpoint to their base.

  Args:
    base_directory: frozen directory that the run started from.
    digest: digest of its weights when the run started.
    config: config of the run.
    tree: collection `adapters` of the checkpoint.
    is_stacked: whether the layers of the run are stacked.

  Raises:
    FileNotFoundError, ValueError: the base is missing or was changed.
  """
  base = frozen_format.read_whole(base_directory)
  if base.manifest.weights_digest != digest:
    raise ValueError(
      f'{base_directory}: got weights {base.manifest.weights_digest[:12]},'
      f' expected {digest[:12]}, on which the adapters were trained; put that'
      ' frozen directory back'
    )
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), base.params)
  params, separate = layout.unstack(params, base.config)
  stacked = dataclasses.replace(base.config, scan_layers=True)
  if is_stacked:
    params, _ = layout.stack(params, separate)
  if config.base != 'float':
    params = {'params': rounded(params['params'], config.base)}
  effective = adapter_config.effective(config, params['params'], tree)
  choices = config.choices(params['params'])
  trees = {'params': params['params'], 'raw': tree, 'read': effective}
  if is_stacked:
    trees, _ = layout.unstack(trees, stacked)
  layers = {}
  for path, entry in adapters.entries(trees['raw']):
    choice = choices[
      re.sub(r'^layer_\d+', 'layers', path) if is_stacked else path
    ]
    layers[path] = peft_files.Layer(
      np.asarray(entry[adapters.A]),
      np.asarray(entry[adapters.B]),
      choice.alpha,
      choice.scale,
      np.asarray(entry[adapter_config.MAGNITUDE]) if config.dora else None,
    )
  return Trained(
    base=base,
    config=config,
    effective=trees['read'],
    layers=layers,
    params={'params': trees['params']},
  )


def rounded(params: Any, form: str) -> Any:
  """Returns the collection `params` as a quantised base computes with it."""
  return stored_tree.whole_kernels(stored_tree.quantise_kernels(params, form))


def files_of(trained: Trained) -> peft_files.Files:
  """Returns the adapters of a run in the form of peft's files."""
  config = trained.config
  return peft_files.Files(trained.layers, config.rslora, config.dora)


def merge(params: frozen_format.Params, tree: adapters.Tree) -> Any:
  """Returns the variables of a base with an adapter merged into its kernels.

  Args:
    params: parameters with separate layers.
    tree: `Adapter.tree`.

  Returns:
    The same tree; merged kernels are float32.
  """
  merged = jax.tree.map(lambda x: x, params)  # new dicts, the same arrays
  for path, entry in adapters.entries(tree):
    owner = merged['params']
    for name in path.split('/'):
      owner = owner[name]
    owner['kernel'] = adapters.merged(owner['kernel'], entry)
  return merged


def write(
  directory: str | os.PathLike,
  files: peft_files.Files,
  base: frozen_format.Opened,
  *,
  provenance: manifest_lib.Provenance,
  base_form: str,
  texts: Mapping[str, str],
  overwrite: bool = False,
) -> AdapterManifest:
  """Writes an adapter directory; a failure leaves `directory` unchanged.

  Args:
    files: the adapter, as it was trained.
    base: base of the adapter. Only DoRA reads its weights.
    provenance: origin of the adapter.
    base_form: one of `adapter_config.BASES`.
    texts: contents of other files by name: the template, and settings.
    overwrite: replace another adapter.

  Raises:
    ValueError: peft cannot adapt the model, or `directory` has other contents.
  """
  target = pathlib.Path(directory).absolute()
  atomic.restore(target)
  _check_replaceable(target, overwrite)
  with atomic.new_directory(target) as partial:
    peft_files.write(partial, files, base)
    # The digest covers the files as they are read, so that peft's directory
    # with the same values has the same digest.
    again = peft_files.read(partial, base)
    if files.dora:
      safetensors_files.write_file(
        partial / _GAINS, _gains(again, base, base_form), np.dtype(np.float32)
      )
    for name, text in texts.items():
      (partial / name).write_bytes(text.encode('utf-8'))
    tree = _tree(partial, again)
    fields = {
      **dataclasses.asdict(provenance),
      'kind': manifest_lib.ADAPTER,
      'format_version': FORMAT_VERSION,
      'base_digest': base.manifest.weights_digest,
      'base_name': base.manifest.name,
      'base_form': base_form,
      'num_params': sum(x.a.size + x.b.size for x in again.layers.values()),
      'adapter_digest': _digest(base.manifest.weights_digest, tree),
      'files': manifest_lib.file_digests(partial),
    }
    manifest = AdapterManifest(
      **fields, manifest_digest=digests.of_json(fields)
    )
    text = json.dumps(dataclasses.asdict(manifest), indent=2)
    atomic.write_text(partial / file_names.MANIFEST, text + '\n')
  return manifest


def _check_replaceable(target: pathlib.Path, overwrite: bool) -> None:
  if not target.exists() or (target.is_dir() and not any(target.iterdir())):
    return
  if overwrite and (target / file_names.MANIFEST).is_file():
    return
  raise ValueError(
    f'{target}: got a place that holds something else, expected a new directory'
    ' or, with overwrite, one that was frozen; choose another place'
  )


def _gains(files, base, base_form) -> dict[str, np.ndarray]:
  """Returns the gain of each column, by layer."""
  params, _ = layout.unstack(
    frozen_format.read_whole(base.directory).params, base.config
  )
  leaves = frozen_format.leaves_by_path(params['params'])
  gains = {}
  for path, layer in files.layers.items():
    kernel = jnp.asarray(leaves[f'{path}/kernel'], jnp.float32)
    if base_form != 'float':
      kernel = stored_tree.as_base(kernel, base_form).whole(jnp.float32)
    gains[path] = np.asarray(gain_of(kernel, layer))
  return gains


def gain_of(kernel: jax.Array, layer: peft_files.Layer) -> jax.Array:
  """Returns the factor of each column of W + scale A B in a layer of DoRA."""
  entry = {adapters.A: jnp.asarray(layer.a), adapters.B: jnp.asarray(layer.b)}
  norms = adapter_config.column_norms(kernel, entry, layer.scale)
  return jnp.asarray(layer.magnitude) / norms


def _tree(directory: pathlib.Path, files: peft_files.Files) -> dict[str, Any]:
  """Returns the tree that a model reads, from the files of a directory."""
  gains: Mapping[str, Any] = {}
  if files.dora:
    gains = safetensors_files.read_header(directory / _GAINS)
  tree = {}
  for path, layer in files.layers.items():
    b = jnp.asarray(layer.b) * layer.scale
    tree[path] = {adapters.A: jnp.asarray(layer.a), adapters.B: b}
    if files.dora:
      tree[path][adapters.GAIN] = jnp.asarray(gains[path].whole())
  return adapters.nested(tree)


def _digest(base_digest: str, tree: adapters.Tree) -> str:
  own = frozen_format.weights_digest(tree)
  return hashlib.sha256(f'{base_digest}\0{own}'.encode()).hexdigest()


def is_adapter(directory: str | os.PathLike) -> bool:
  """Returns whether the manifest of a directory says that it is an adapter."""
  try:
    text = (pathlib.Path(directory) / file_names.MANIFEST).read_text('utf-8')
    return json.loads(text).get('kind') == manifest_lib.ADAPTER
  except (OSError, ValueError, AttributeError):
    return False


def read_manifest(directory: str | os.PathLike) -> AdapterManifest:
  """Reads and verifies the manifest of an adapter, and no other file.

  Raises:
    FileNotFoundError: there is no manifest.
    ValueError: it is damaged, or not an adapter's.
  """
  path = pathlib.Path(directory) / file_names.MANIFEST
  if not path.is_file():
    is_peft = (path.parent / peft_files.CONFIG).is_file()
    raise FileNotFoundError(
      f'{path}: got no such file, expected an adapter directory; '
      + ('import this one' if is_peft else 'import one')
      + ' of peft with `python -m frozen.adapters import`, or train with'
      ' adapter.rank and freeze.merge_adapter=false'
    )
  return manifest_lib.read_beside(
    path,
    AdapterManifest,
    kind=manifest_lib.ADAPTER,
    version=FORMAT_VERSION,
    name='an adapter',
  )


def read(directory: str | os.PathLike, base: frozen_format.Opened) -> Adapter:
  """Reads an adapter directory and verifies every digest.

  Args:
    base: the frozen directory that the adapter changes.

  Raises:
    FileNotFoundError: there is no adapter, or a file is missing.
    ValueError: a file is damaged, or the adapter belongs to another base.
  """
  directory = pathlib.Path(directory).absolute()
  manifest = read_manifest(directory)
  if manifest.base_digest != base.manifest.weights_digest:
    raise ValueError(
      f'{directory}: got an adapter of {manifest.base_name} with weights'
      f' {manifest.base_digest[:12]}, expected one of {base.manifest.name} with'
      f' weights {base.manifest.weights_digest[:12]}; take the base that it was'
      ' trained on'
    )
  manifest_lib.check_files(directory, manifest)
  tree = _tree(directory, peft_files.read(directory, base))
  if (digest := _digest(manifest.base_digest, tree)) != manifest.adapter_digest:
    raise ValueError(
      f'{directory}: got an adapter with digest {digest[:12]}, expected'
      f' {manifest.adapter_digest[:12]}; copy or freeze it again'
    )
  return Adapter(
    directory=directory,
    manifest=manifest,
    tree=tree,
    generation=frozen_format.read_generation(directory),
    chat_template=frozen_format.read_chat_template(directory),
  )


def import_directory(
  source: str | os.PathLike,
  base_directory: str | os.PathLike,
  out: str | os.PathLike,
  *,
  overwrite: bool = False,
) -> AdapterManifest:
  """Writes an adapter that peft saved as an adapter directory.

  Raises:
    FileNotFoundError: a file, or the base, is missing.
    ValueError: the adapter cannot be read, or does not fit the base.
  """
  base = frozen_format.open_directory(base_directory)
  source = pathlib.Path(source)
  files = peft_files.read(source, base)
  manifest = base.manifest
  provenance = manifest_lib.Provenance(
    **{
      field.name: getattr(manifest, field.name)
      for field in dataclasses.fields(manifest_lib.Provenance)
    }
  )
  provenance = dataclasses.replace(
    provenance,
    experiment=source.name,
    step=0,
    tokens_seen=0,
    training_flops=0.0,
    train_seconds=0.0,
    lineage={'init_from': manifest.weights_digest},
  )
  return write(
    out,
    files,
    base,
    provenance=provenance,
    base_form='float',
    texts={
      file_names.CHAT_TEMPLATE: base.chat_template,
      file_names.GENERATION: json.dumps(base.generation, indent=2) + '\n',
    },
    overwrite=overwrite,
  )


def merge_directory(
  source: str | os.PathLike,
  base_directory: str | os.PathLike,
  out: str | os.PathLike,
  *,
  overwrite: bool = False,
) -> manifest_lib.Manifest:
  """Writes a frozen directory of a base with an adapter merged into it.

  Raises:
    FileNotFoundError, ValueError: see `read`.
  """
  base = frozen_format.read_whole(base_directory)
  adapter = read(source, base)
  params, config = layout.unstack(base.params, base.config)
  form = adapter.manifest.base_form
  if form != 'float':
    params = {'params': rounded(params['params'], form)}
  dtype = base.manifest.dtype
  provenance = manifest_lib.Provenance(
    **{
      field.name: getattr(adapter.manifest, field.name)
      for field in dataclasses.fields(manifest_lib.Provenance)
    }
  )
  lineage = {'adapter': adapter.manifest.adapter_digest}
  return frozen_format.write(
    out,
    params=jax.tree.map(
      lambda x: jnp.asarray(x, dtype), merge(params, adapter.tree)
    ),
    config=config,
    dtype=dtype,
    provenance=dataclasses.replace(
      provenance, lineage=provenance.lineage | lineage
    ),
    tokenizer_dir=base.tokenizer_dir,
    generation=adapter.generation,
    chat_template=adapter.chat_template,
    overwrite=overwrite,
  )


def main(argv: list[str]) -> None:
  """Imports or merges the adapter that the flags name."""
  if len(argv) != 2 or argv[1] not in ('import', 'merge'):
    raise app.UsageError(
      f'got arguments {argv[1:]}, expected one of import, merge, as in import'
      ' --base=FROZEN --source=DIR --out=DIR'
    )
  logging.set_verbosity(logging.ERROR)  # orbax logs every step that it takes
  values = flags.FLAGS
  act = import_directory if argv[1] == 'import' else merge_directory
  try:
    manifest = act(
      values.source, values.base, values.out, overwrite=values.overwrite
    )
  except (ValueError, OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)
  print(f'frozen: {values.out}, {manifest.num_params:,} params')
  if isinstance(manifest, AdapterManifest):
    print(f'adapter {manifest.adapter_digest}')
    print(f'of base {manifest.base_digest} ({manifest.base_name})')
  else:
    print(f'weights {manifest.weights_digest}')


def _define_flags() -> None:
  path_flags.DEFINE_path(
    'base', None, "Frozen directory of the adapter's base."
  )
  path_flags.DEFINE_path(
    'source',
    None,
    "Import: a directory of peft's save_pretrained. Merge: an adapter"
    ' directory.',
  )
  path_flags.DEFINE_path('out', None, 'Directory to write.')
  flags.DEFINE_bool('overwrite', False, 'Replace a frozen directory at --out.')
  flags.mark_flags_as_required(['base', 'source', 'out'])


if __name__ == '__main__':
  _define_flags()
  app.run(main)
