"""Freezes a training run: a checkpoint becomes a frozen directory.

    python -m frozen.freeze --workdir=runs/quickstart --out=/tmp/quickstart

`train.py` does the same at the end of a run. This module knows what training
leaves behind (the files below), and imports nothing of training.

    WORKDIR/run.json                       config, data, lineage
    WORKDIR/tokenizer/
    WORKDIR/checkpoints/STEP/params/       restored, or
    WORKDIR/checkpoints/STEP/average/      of the weights, where a run keeps one
    WORKDIR/checkpoints/STEP/opt_state/    never read: three times the size
    WORKDIR/checkpoints/STEP/progress.json step, tokens, cost
    WORKDIR/checkpoints/STEP/seal.json     verified first: frozen/seals.py
"""

from collections.abc import Mapping
import json
import os
import pathlib
import sys
from typing import Any

from absl import app, flags, logging
import jax
import jax.numpy as jnp

from frozen import (
  format as frozen_format,
  manifest as manifest_lib,
  run_record,
  seals,
)
from models import layout, model_config
from storage import layout as storage_layout

LATEST = -1
DTYPES = ('float32', 'bfloat16')

# What training writes into run.json for whoever freezes it.
_RUN_FIELDS = {
  'experiment',
  'model',
  'data_mix',
  'knowledge_cutoff',
  'lineage',
  'has_bos',
  'code_commit',
}

# Recommended to whoever serves the weights; a request may choose otherwise.
DEFAULT_GENERATION = {
  'temperature': 0.8,
  'top_k': 0,
  'top_p': 0.95,
  'max_tokens': 256,
  'stop': [],
}


def serving_params(
  params: frozen_format.Params, config: model_config.ModelConfig, *, dtype: str
) -> tuple[frozen_format.Params, model_config.ModelConfig]:
  """Turns training params into serving params, and their config.

  Copies, never aliases: the train step donates its params, and would take the
  served ones with it. Unstacks scanned layers: decoding through a scan was
  measured 2.7 times slower on CPU, since it slices each layer's weights out.
  """
  params, config = layout.unstack(params, config)
  return jax.tree.map(lambda leaf: jnp.array(leaf, dtype), params), config


def freeze_checkpoint(
  workdir: str | os.PathLike,
  *,
  step: int = LATEST,
  out: str | os.PathLike,
  dtype: str = 'float32',
  weights: str = 'auto',
  generation: Mapping[str, Any] | None = None,
  chat_template: str = '',
  overwrite: bool = False,
) -> manifest_lib.Manifest:
  """Freezes one checkpoint of a run.

  Args:
    workdir: of the run.
    step: a step that has a checkpoint; LATEST for the last.
    out: the frozen directory to write.
    dtype: of the weights and of the computation that will use them.
    weights: one of `frozen.manifest.WEIGHTS`.
    generation: recommended settings, those of DEFAULT_GENERATION besides.
    chat_template: Jinja source; empty for the default transcript.
    overwrite: replace a frozen directory that holds other weights.

  Raises:
    FileNotFoundError: no run, or no such checkpoint; names those there are.
    ValueError: an unknown dtype, an average that the run does not keep, a
      checkpoint that is damaged or of another run, or `out` holds something
      else.
  """
  if dtype not in DTYPES:
    raise ValueError(
      f'dtype: got {dtype!r}, expected one of {", ".join(DTYPES)}'
    )
  workdir = pathlib.Path(workdir).resolve()
  run = _read_run(workdir)
  checkpoint = _checkpoint(workdir, step)
  config = model_config.ModelConfig.from_dict(run['model'])
  seals.check(checkpoint, run)
  progress = json.loads(
    (checkpoint / storage_layout.PROGRESS).read_text('utf-8')
  )
  weights = _chosen_weights(checkpoint, weights)
  params = _restore_params(
    checkpoint / {'raw': 'params', 'average': 'average'}[weights]
  )
  params, config = serving_params(params, config, dtype=dtype)
  return frozen_format.write(
    out,
    params=params,
    config=config,
    dtype=dtype,
    provenance=manifest_lib.Provenance(
      experiment=run['experiment'],
      code_commit=run['code_commit'],
      data_mix=run['data_mix'],
      knowledge_cutoff=run['knowledge_cutoff'],
      weights=weights,
      lineage=run['lineage'],
      has_bos=run['has_bos'],
      step=progress['step'],
      tokens_seen=progress['tokens_seen'],
      training_flops=progress['training_flops'],
      train_seconds=progress['train_seconds'],
    ),
    tokenizer_dir=workdir / storage_layout.TOKENIZER,
    generation={**DEFAULT_GENERATION, **(generation or {})},
    chat_template=chat_template,
    overwrite=overwrite,
  )


def _read_run(workdir: pathlib.Path) -> dict[str, Any]:
  path = workdir / storage_layout.RUN
  if not path.is_file():
    raise FileNotFoundError(
      f'{path}: got no such file, expected the --workdir of a training run;'
      ' train one with `python train.py --workdir=...`'
    )
  run = run_record.read(workdir)
  if missing := _RUN_FIELDS - run.keys():
    raise ValueError(
      f'{path}: got no {", ".join(sorted(missing))}, expected all of'
      f' {", ".join(sorted(_RUN_FIELDS))}; it is of another version of this'
      ' code: freeze with that one'
    )
  return run


def _checkpoint(workdir: pathlib.Path, step: int) -> pathlib.Path:
  """Returns the directory of a finished checkpoint."""
  root = workdir / storage_layout.CHECKPOINTS
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
  """Returns raw or average, for what is asked for."""
  if weights not in manifest_lib.WEIGHTS:
    raise ValueError(
      f'weights: got {weights!r}, expected one of'
      f' {", ".join(manifest_lib.WEIGHTS)}'
    )
  has_average = (checkpoint / 'average').is_dir()
  if weights == 'average' and not has_average:
    raise ValueError(
      f'weights: got average, but {checkpoint} has none, expected raw or auto;'
      ' a run keeps one that is trained with --config.ema_decay=0.999'
    )
  if weights == 'auto':
    return 'average' if has_average else 'raw'
  return weights


def _restore_params(path: pathlib.Path) -> frozen_format.Params:
  """Restores params as they were saved, onto one device."""
  # Without a sharding orbax would rebuild the mesh that they were trained on.
  sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  with frozen_format.checkpointer() as checkpointer:
    target = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=sharding
      ),
      checkpointer.metadata(path).item_metadata.tree,
    )
    return checkpointer.restore(path, target)


def main(argv) -> None:
  """Freezes what the flags name and prints the manifest's main lines."""
  if len(argv) > 1:
    raise app.UsageError(f'got arguments {argv[1:]}, expected flags only')
  values = flags.FLAGS
  logging.set_verbosity(logging.ERROR)  # orbax tells its every step
  try:
    manifest = freeze_checkpoint(
      values.workdir,
      step=values.step,
      out=values.out,
      dtype=values.dtype,
      weights=values.weights,
      overwrite=values.overwrite,
    )
  except (ValueError, FileNotFoundError) as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)
  print(f'frozen: {values.out}')
  print(
    f'step {manifest.step}, {manifest.num_params:,} {manifest.dtype} params'
  )
  print(f'weights {manifest.weights_digest} ({manifest.weights})')


def _define_flags() -> None:
  flags.DEFINE_string('workdir', None, 'Directory of a training run.')
  flags.DEFINE_integer('step', LATEST, 'Checkpoint to freeze; -1 is the last.')
  flags.DEFINE_string('out', None, 'Frozen directory to write.')
  flags.DEFINE_enum('dtype', 'float32', DTYPES, 'Of the frozen weights.')
  flags.DEFINE_enum(
    'weights',
    'auto',
    manifest_lib.WEIGHTS,
    'Which of the run; auto: the average where it keeps one.',
  )
  flags.DEFINE_bool(
    'overwrite', False, 'Replace a frozen directory that holds other weights.'
  )
  flags.mark_flags_as_required(['workdir', 'out'])


if __name__ == '__main__':
  # Not at import: train.py imports this module and has a --workdir of its own.
  _define_flags()
  app.run(main)
