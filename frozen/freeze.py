"""Freezing: a checkpoint of a training run becomes a frozen directory.

    python -m frozen.freeze --workdir=runs/quickstart --out=/tmp/quickstart

`train.py` does the same at the end of a run. This module reads the files that
training writes, and imports nothing of training:

    WORKDIR/run.json                       config, data, lineage, base
    WORKDIR/tokenizer/
    WORKDIR/checkpoints/STEP/params/       the weights, or
    WORKDIR/checkpoints/STEP/average/      their average, if the run keeps one
    WORKDIR/checkpoints/STEP/opt_state/    never read: three times the size
    WORKDIR/checkpoints/STEP/progress.json step, tokens, cost
    WORKDIR/checkpoints/STEP/seal.json     verified first: frozen/seals.py
"""

from collections.abc import Mapping
import dataclasses
import json
import os
import pathlib
import sys
from typing import Any

from absl import app, flags, logging
import jax
import jax.numpy as jnp

from checks import expect, path_flags, paths
from frozen import (
  adapters as adapters_lib,
  draft_heads,
  format as frozen_format,
  manifest as manifest_lib,
  recipe,
  run_record,
  seals,
  stored_params,
)
from models import adapter_config, axes, layout, model_config
from models.layers import adapters, draft_head, reward_head
from storage import file_names, public_paths

# The tree in a checkpoint for each kind of weights.
_TREES = {'raw': 'params', 'average': 'average'}
LATEST = -1
DTYPES = ('float32', 'bfloat16')

# Fields that training writes into run.json, and that freezing needs.
Frozen = (
  manifest_lib.Manifest
  | adapters_lib.AdapterManifest
  | draft_heads.DraftHeadManifest
)
_RUN_FIELDS = {
  'experiment',
  'model',
  'data_mix',
  'knowledge_cutoff',
  'lineage',
  'has_bos',
  'code_commit',
}

# Recommended settings of a run that starts from random weights. A request may
# override them.
DEFAULT_GENERATION = {
  'temperature': 0.8,
  'top_k': 0,
  'top_p': 0.95,
  'max_tokens': 128,
  'stop': [],
}


def base_of(directory: str | os.PathLike) -> dict[str, Any]:
  """Returns the parts of a frozen directory that training does not change.

  A run that starts from its weights records them as `base` in run.json, and
  every freeze of the run writes them again.
  """
  directory = pathlib.Path(directory)
  manifest = manifest_lib.read(directory)
  return {
    'chat_template': frozen_format.read_chat_template(directory),
    'generation': frozen_format.read_generation(directory),
    'knowledge_cutoff': manifest.knowledge_cutoff,
    'origin': manifest.origin,
  }


def chosen_generation(freeze: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the recommended settings that an experiment chooses.

  Args:
    freeze: fields of `training.experiment.FreezeConfig`.
  """
  chosen = {}
  if freeze.get('temperature', -1) >= 0:
    chosen['temperature'] = freeze['temperature']
  if freeze.get('max_tokens', 0) > 0:
    chosen['max_tokens'] = freeze['max_tokens']
  return chosen


def generation_of(
  run: Mapping[str, Any], chosen: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns the recommended settings that a run freezes.

  Args:
    run: fields of run.json.
    chosen: settings that differ from the settings of the run's base, or from
      DEFAULT_GENERATION.
  """
  base = run.get('base', {}).get('generation', DEFAULT_GENERATION)
  return {**base, **chosen}


def serving_params(
  params: frozen_format.Params, config: model_config.ModelConfig, *, dtype: str
) -> tuple[frozen_format.Params, model_config.ModelConfig]:
  """Returns serving params of training params, and their config."""
  # Unstacked: decoding through a scan was measured 2.7 times slower on CPU,
  # because it slices each layer's weights out.
  params, config = layout.unstack(params, config)
  # Copies, never aliases: the train step donates its params, and would delete
  # aliased serving params with them.
  return jax.tree.map(lambda leaf: jnp.array(leaf, dtype), params), config


def freeze_checkpoint(
  workdir: str | os.PathLike,
  *,
  step: int = LATEST,
  out: str | os.PathLike,
  dtype: str = 'float32',
  weights: str = 'auto',
  generation: Mapping[str, Any] | None = None,
  chat_template: str | None = None,
  merge_adapter: bool | None = None,
  overwrite: bool = False,
) -> Frozen:
  """Writes one checkpoint of a run as a frozen directory.

  A run that trained a draft head writes the directory of one, without dtype.

  Args:
    workdir: directory of the run.
    step: step of the checkpoint; LATEST for the last one.
    out: the frozen directory to write.
    dtype: dtype of the weights, and of the computation that will use them.
    weights: one of `frozen.manifest.WEIGHTS`.
    generation: recommended settings that the experiment chooses, see
      `generation_of`; None: the settings of the recorded experiment.
    chat_template: Jinja source, '' for the default transcript; None: that of
      the weights that the run started from.
    merge_adapter: for a run that trained adapters: whether to merge them into
      their base; False: write an adapter directory, without dtype. None: as the
      run was configured.
    overwrite: whether to replace a frozen directory with other weights.

  Raises:
    FileNotFoundError: there is no base, no run or no such checkpoint; the error
      lists the checkpoints of the run.
    ValueError: the dtype is unknown, the run keeps no average, the checkpoint
      is damaged or of another run, or `out` has other files.
  """
  expect.one_of('dtype', dtype, DTYPES)
  workdir = pathlib.Path(workdir).resolve()
  run = _read_run(workdir)
  checkpoint = _checkpoint(workdir, step)
  base, template = run.get('base', {}), chat_template
  if template is None:
    template = base.get('chat_template', '')
  config = model_config.ModelConfig.from_dict(run['model'])
  seals.check(checkpoint, run)
  progress = json.loads((checkpoint / file_names.PROGRESS).read_text('utf-8'))
  weights = _chosen_weights(checkpoint, weights)
  params = _restore_params(checkpoint / _TREES[weights])
  heads = _served_heads(params)
  provenance = _provenance(run, base, progress, weights)
  settings = _settings(run, generation)
  made = _recipe(workdir, run, progress)
  if head := params.get(axes.HEADS, {}).get(draft_head.NAME):
    return _write_head(out, head, run, provenance, made, overwrite)
  if adapters.COLLECTION in params:
    trained = _trained_adapters(run, config, params[adapters.COLLECTION])
    if not _merges(run, merge_adapter, heads):
      texts = _texts(template, settings) | made
      return _write_adapter(out, trained, provenance, texts, overwrite)
    params = adapters_lib.merge(trained.params, trained.effective)
    config = dataclasses.replace(config, scan_layers=False)
  params, config = serving_params(
    {'params': params['params'], **heads}, config, dtype=dtype
  )
  return frozen_format.write(
    out,
    params=params,
    config=config,
    dtype=dtype,
    provenance=provenance,
    tokenizer_dir=workdir / file_names.TOKENIZER,
    generation=settings,
    chat_template=template,
    texts=made,
    overwrite=overwrite,
  )


def _write_adapter(
  out, trained, provenance, texts, overwrite
) -> adapters_lib.AdapterManifest:
  """Writes an adapter directory."""
  return adapters_lib.write(
    out,
    adapters_lib.files_of(trained),
    trained.base,
    provenance=provenance,
    base_form=trained.config.base,
    texts=texts,
    overwrite=overwrite,
  )


def _write_head(
  out, head, run, provenance, made, overwrite
) -> draft_heads.DraftHeadManifest:
  """Writes the directory of a draft head."""
  num_ids = run['config']['objective']['num_ids']
  return draft_heads.write(
    out,
    head,
    base_digest=run['lineage']['init_from'],
    num_ids=num_ids or run['model']['vocab_size'],
    provenance=provenance,
    texts=made,
    overwrite=overwrite,
  )


def _settings(
  run: Mapping[str, Any], generation: Mapping[str, Any] | None
) -> dict[str, Any]:
  if generation is None:
    generation = chosen_generation(run.get('config', {}).get('freeze', {}))
  return generation_of(run, generation)


def _served_heads(params: frozen_format.Params) -> dict[str, Any]:
  """Returns the head of a reward model, as a collection.

  Other parameters of an objective are not frozen: only training needs them.
  """
  heads = params.get(axes.HEADS, {})
  if reward_head.NAME not in heads:
    return {}
  return {axes.HEADS: {reward_head.NAME: heads[reward_head.NAME]}}


def _merges(
  run: Mapping[str, Any], merge_adapter: bool | None, heads: Mapping[str, Any]
) -> bool:
  """Returns whether to freeze the base and its adapter as one.

  Raises:
    ValueError: there are heads, which an adapter directory cannot hold.
  """
  if merge_adapter is None:
    merge_adapter = run['config'].get('freeze', {}).get('merge_adapter', True)
  if heads and not merge_adapter:
    raise ValueError(
      'freeze.merge_adapter: got False for a reward model, expected True: an'
      ' adapter directory has no head; freeze with --merge_adapter'
    )
  return bool(merge_adapter)


def _trained_adapters(
  run: Mapping[str, Any], config: model_config.ModelConfig, tree: Any
) -> adapters_lib.Trained:
  """Returns the adapters of a checkpoint, with the base of their run."""
  recorded = run['config']
  return adapters_lib.trained(
    paths.expanded('config.init_from', recorded['init_from']),
    run['lineage']['init_from'],
    adapter_config.AdapterConfig(**recorded['adapter']),
    tree,
    is_stacked=config.scan_layers,
  )


def _recipe(
  workdir: pathlib.Path, run: Mapping[str, Any], progress: Mapping[str, Any]
) -> dict[str, str]:
  """Returns the file that describes the making of the weights, by name."""
  made = recipe.of_run(workdir, run, progress['step'])
  return {file_names.RECIPE: json.dumps(made, indent=1) + '\n'} if made else {}


def _texts(template: str, settings: Mapping[str, Any]) -> dict[str, str]:
  return {
    file_names.CHAT_TEMPLATE: template,
    file_names.GENERATION: json.dumps(dict(settings), indent=2) + '\n',
  }


def _provenance(
  run: Mapping[str, Any],
  base: Mapping[str, Any],
  progress: Mapping[str, Any],
  weights: str,
) -> manifest_lib.Provenance:
  """Returns the origin of weights, from the records of their run.

  Args:
    run: content of run.json.
    base: its part about the weights that the run started from.
    progress: progress of the checkpoint.
    weights: one of `frozen.manifest.WEIGHTS`.
  """
  return manifest_lib.Provenance(
    experiment=run['experiment'],
    code_commit=run['code_commit'],
    data_mix=[
      mixed | {'path': public_paths.public(mixed['path'])}
      for mixed in run['data_mix']
    ],
    # Dates of ISO 8601 sort as text; '' is an unknown date.
    knowledge_cutoff=max(
      run['knowledge_cutoff'], base.get('knowledge_cutoff', '')
    ),
    weights=weights,
    lineage=run['lineage'],
    has_bos=run['has_bos'],
    step=progress['step'],
    tokens_seen=progress['tokens_seen'],
    training_flops=progress['training_flops'],
    train_seconds=progress['train_seconds'],
    origin=base.get('origin', {}),
  )


def _read_run(workdir: pathlib.Path) -> dict[str, Any]:
  path = workdir / file_names.RUN
  if not path.is_file():
    raise FileNotFoundError(
      f'{path}: got no such file, expected the --workdir of a training run;'
      ' train one with `python train.py --workdir=...`'
    )
  run = run_record.read(workdir)
  if missing := _RUN_FIELDS - run.keys():
    raise ValueError(
      f'{path}: got no {", ".join(sorted(missing))}, expected all of'
      f' {", ".join(sorted(_RUN_FIELDS))}; another version of this code wrote'
      ' the run: freeze it with that version'
    )
  return run


def _checkpoint(workdir: pathlib.Path, step: int) -> pathlib.Path:
  """Returns the directory of a finished checkpoint."""
  root = workdir / file_names.CHECKPOINTS
  steps = seals.steps(root)
  if not steps:
    raise FileNotFoundError(
      f'{root}: got no checkpoints, expected at least one; train for longer'
    )
  if step == LATEST:
    step = steps[-1]
  if step not in steps:
    raise FileNotFoundError(
      f'{root}: got no checkpoint of step {step}, expected one of'
      f' {", ".join(map(str, steps))}; choose one with --step, or -1 for the'
      ' last'
    )
  return root / str(step)


def _chosen_weights(checkpoint: pathlib.Path, weights: str) -> str:
  """Returns 'raw' or 'average': the weights to freeze."""
  expect.one_of('weights', weights, manifest_lib.WEIGHTS)
  has_average = (checkpoint / 'average').is_dir()
  if weights == 'average' and not has_average:
    raise ValueError(
      f'weights: got average, but {checkpoint} has none, expected raw or auto;'
      ' a run keeps an average if it trains with --config.ema_decay=0.999'
    )
  if weights == 'auto':
    return 'average' if has_average else 'raw'
  return weights


def _restore_params(path: pathlib.Path) -> frozen_format.Params:
  """Returns the saved params, on one device."""
  # Without a sharding, orbax would rebuild the mesh of the training run.
  sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  with stored_params.checkpointer() as checkpointer:
    target = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=sharding
      ),
      checkpointer.metadata(path).item_metadata.tree,
    )
    return checkpointer.restore(path, target)


def main(argv) -> None:
  """Freezes the run that the flags name, and prints a summary."""
  if len(argv) > 1:
    raise app.UsageError(f'got arguments {argv[1:]}, expected flags only')
  values = flags.FLAGS
  logging.set_verbosity(logging.ERROR)  # orbax logs every step that it takes
  try:
    manifest = freeze_checkpoint(
      values.workdir,
      step=values.step,
      out=values.out,
      dtype=values.dtype,
      weights=values.weights,
      merge_adapter=values.merge_adapter,
      overwrite=values.overwrite,
    )
  except (ValueError, FileNotFoundError) as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)
  print(f'frozen: {values.out}')
  if isinstance(manifest, adapters_lib.AdapterManifest):
    print(f'step {manifest.step}, {manifest.num_params:,} params of adapters')
    print(f'adapter {manifest.adapter_digest} ({manifest.weights})')
    print(f'of base {manifest.base_digest} ({manifest.base_name})')
    return
  if isinstance(manifest, draft_heads.DraftHeadManifest):
    print(f'step {manifest.step}, {manifest.num_params:,} params of a head')
    print(f'draft head {manifest.head_digest} ({manifest.weights})')
    print(f'of weights {manifest.base_digest}')
    return
  print(
    f'step {manifest.step}, {manifest.num_params:,} {manifest.dtype} params'
  )
  print(f'weights {manifest.weights_digest} ({manifest.weights})')


def _define_flags() -> None:
  path_flags.DEFINE_path('workdir', None, 'Directory of a training run.')
  flags.DEFINE_integer(
    'step', LATEST, 'Step of the checkpoint to freeze; -1 is the last one.'
  )
  path_flags.DEFINE_path('out', None, 'Frozen directory to write.')
  flags.DEFINE_enum(
    'dtype',
    'float32',
    DTYPES,
    'Dtype of the frozen weights and of the computation that uses them.',
  )
  flags.DEFINE_enum(
    'weights',
    'auto',
    manifest_lib.WEIGHTS,
    'Weights to freeze: raw, or their average over training. auto takes the'
    ' average if the run keeps one.',
  )
  flags.DEFINE_bool(
    'merge_adapter',
    None,
    'For a run that trained adapters: freeze the base with the adapters merged'
    ' into it, or an adapter directory. Default: as the run was configured.',
  )
  flags.DEFINE_bool(
    'overwrite', False, 'Replace a frozen directory with other weights.'
  )
  flags.mark_flags_as_required(['workdir', 'out'])


if __name__ == '__main__':
  # Not at import: train.py imports this module and has a --workdir of its own.
  _define_flags()
  app.run(main)
