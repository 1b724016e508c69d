"""A frozen directory in fewer bits, layer by layer.

Two streams of activations go through the layers: the original's, and the stream
of the layers quantised so far, on which GPTQ, AWQ and SmoothQuant calibrate. So
later layers can compensate for errors of earlier layers. Only one layer at a
time has its statistics in memory.

Only kernels of linear layers and of experts are quantised. Embedding, head,
norms, biases and routers stay in floats.
"""

from collections.abc import Callable, Mapping
import dataclasses
import json
import os
import pathlib
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp

from checks import expect
from frozen import (
  format as frozen_format,
  manifest as manifest_lib,
  stored_kernels,
)
from frozen.quantize import (
  activations,
  calibration,
  experts,
  gptq,
  quality,
  rotation,
  scaling,
)
from models import layout, model_config
from models.linear.stored import (
  kernel as kernel_lib,
  round as rounding,
)
from storage import file_names
from text import tokenizer as tokenizer_lib

METHODS = ('rtn', 'gptq', 'awq', 'smoothquant')
_SMOOTHED = ('int8', 'int8-g32', 'fp8')  # formats that also fit activations


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
  """A model in fewer bits, before it is written."""

  params: frozen_format.Params  # with separate layers
  config: model_config.ModelConfig
  kernels: dict[str, dict[str, float]]  # errors of each, by path
  quality: dict[str, Any]


def quantise_directory(
  source: str | os.PathLike,
  out: str | os.PathLike,
  *,
  scheme: str,
  method: str,
  text: calibration.Config,
  rotate: bool = False,
  overwrite: bool = False,
  tell: Callable[[str], None] = lambda line: None,
) -> tuple[manifest_lib.Manifest, dict[str, Any]]:
  """Writes a frozen directory in fewer bits; returns manifest and report.

  Args:
    source: frozen directory in floats.
    out: directory to write.
    scheme: one of `models.linear.stored.round.SCHEMES`.
    method: one of METHODS.
    text: text to calibrate and to measure with; its seed draws the rotation.
    rotate: turn the residual stream first, see `rotation.py`.
    overwrite: replace a frozen directory at `out`.
    tell: receives a line per layer.

  Raises:
    OSError: there is no such directory or text.
    ValueError: the model cannot be stored so, the text is too short, or `out`
      has other contents.
  """
  check_method(scheme, method)
  _check_free(pathlib.Path(out), overwrite)
  opened = frozen_format.open_directory(source)
  check_source(opened)
  manifest = opened.manifest
  if rotate:
    rotation.check(opened.config)
  rows = calibration.rows(
    text,
    tokenizer_lib.load(opened.tokenizer_dir),
    has_bos=manifest.has_bos,
    max_length=opened.config.max_length,
  )
  params, config = layout.unstack(opened.read_params(), opened.config)
  record: dict[str, Any] = {'scheme': scheme, 'method': method}
  if rotate:
    params, config = rotation.rotated(params, config, text.seed)
    record['rotation'] = text.seed
  result = quantised(
    params, config, rows, scheme=scheme, method=method, tell=tell
  )
  record['calibration'] = rows.record
  record['quality'] = result.quality
  report = {
    **record,
    'original': manifest.weights_digest,
    'kernels': result.kernels,
  }
  if opened.config.num_experts:
    report['rounded_experts'] = sum(
      errors.get('rounded_experts', 0) for errors in result.kernels.values()
    )
  written = frozen_format.write(
    out,
    params=result.params,
    config=result.config,
    dtype=manifest.dtype,
    provenance=_provenance(manifest),
    tokenizer_dir=opened.tokenizer_dir,
    generation=opened.generation,
    chat_template=opened.chat_template,
    record=record,
    texts={file_names.QUALITY: json.dumps(report, indent=2) + '\n'},
    overwrite=overwrite,
  )
  return written, report


def _provenance(original: manifest_lib.Manifest) -> manifest_lib.Provenance:
  """Returns the provenance of weights that are made of those of a manifest."""
  fields = {
    field.name: getattr(original, field.name)
    for field in dataclasses.fields(manifest_lib.Provenance)
  }
  fields['lineage'] = {
    **original.lineage,
    'quantised_from': original.weights_digest,
  }
  return manifest_lib.Provenance(**fields)


def check_method(scheme: str, method: str) -> None:
  """Raises ValueError for a scheme and a method that do not fit together."""
  expect.one_of('--scheme', scheme, rounding.SCHEMES)
  expect.one_of('--method', method, METHODS)
  if method == 'smoothquant':
    expect.one_of(
      '--scheme',
      scheme,
      _SMOOTHED,
      '--method=smoothquant makes activations fit 8 bits beside the weights;'
      ' for 4 bits take gptq or awq',
    )


def check_source(opened: frozen_format.Opened) -> None:
  """Raises ValueError for a model that cannot be quantised."""
  manifest = opened.manifest

  def refuse(got: str, expected: str, fix: str):
    raise ValueError(
      f'--source: got {opened.directory}, {got}, expected {expected}; {fix}'
    )

  if manifest.quantization != stored_kernels.NONE:
    refuse(
      'whose kernels are quantised already',
      'weights in floats',
      'quantise the directory that it was made of',
    )
  if manifest.heads:
    refuse(
      f'with heads {manifest.heads}',
      'a language model',
      'serve a reward model in floats',
    )


def quantised(
  params: frozen_format.Params,
  config: model_config.ModelConfig,
  rows: calibration.Rows,
  *,
  scheme: str,
  method: str,
  tell: Callable[[str], None] = lambda line: None,
) -> Result:
  """Returns a model in fewer bits.

  Args:
    params: with separate layers.
    config: config of the model.
    rows: rows of text.
    scheme: see `quantise_directory`.
    method: see `quantise_directory`.
    tell: receives a line per layer.

  Raises:
    ValueError: a kernel cannot be stored in the scheme, or its input not be
      scaled by the method.
  """
  tree = params['params']
  outer = {name: x for name, x in tree.items() if not _is_layer(name)}
  drawn, new = (
    activations.embedded(config, outer, tokens_RT)
    for tokens_RT in (rows.drawn_RT, rows.held_out_RT)
  )
  old, kernels = new, {}
  found = dict(outer)
  for n in range(config.num_layers):
    name = f'layer_{n}'
    block = activations.block(config, n)
    moments, routed = activations.inputs_of(block, tree[name], drawn)
    old = activations.advance(block, tree[name], old)
    found[name], errors = _layer(
      tree[name],
      moments,
      routed,
      config,
      name=name,
      scheme=scheme,
      method=method,
    )
    drawn, new = (
      activations.advance(block, found[name], batches)
      for batches in (drawn, new)
    )
    kernels |= {
      f'params/{name}/{path}': error for path, error in errors.items()
    }
    tell(f'{name}: {_told(errors)}')
  return Result(
    params={'params': found},
    config=config,
    kernels=kernels,
    quality=quality.table(config, outer, old, new, rows.held_out_RT),
  )


def _told(errors: Mapping[str, Mapping[str, float]]) -> str:
  worst = max(error['output_error'] for error in errors.values())
  told = f'largest error of an output {worst:.2%}'
  few = [error.get('rounded_experts', 0) for error in errors.values()]
  if any(few):
    told += (
      f'; {sum(few)} of the matrices of experts saw too few tokens and were'
      ' only rounded'
    )
  return told


def _is_layer(name: str) -> bool:
  return name.startswith('layer_')


def _layer(
  params: Any,
  moments: Mapping[str, activations.Moments],
  routed: activations.Routed | None,
  config: model_config.ModelConfig,
  *,
  name: str,
  scheme: str,
  method: str,
) -> tuple[Any, dict[str, dict[str, float]]]:
  """Returns a layer in fewer bits, and the errors of its kernels."""
  layer: dict[str, Any] = traverse_util.flatten_dict(params, sep='/')
  scale_I = None
  if method in ('awq', 'smoothquant'):
    layer, moments, scale_I = scaling.scaled(
      layer, moments, config, method=method, scheme=scheme,
      experts=None if routed is None else experts.inputs(layer, routed),
    )  # fmt: skip
  errors = {}
  for path, of_input in moments.items():
    w_IO = jnp.asarray(layer[path], jnp.float32)
    try:
      if method == 'gptq':
        kernel = gptq.quantise(w_IO, of_input.second_II, scheme)
      else:
        kernel = rounding.by_scheme(w_IO, scheme)
    except ValueError as error:
      raise ValueError(f'{name}/{path}: {error}') from None
    errors[path] = {
      key: float(value)
      for key, value in _errors(kernel, w_IO, of_input.second_II).items()
    }
    layer[path] = kernel
  if routed is not None:
    try:
      made = experts.quantise(
        layer, routed, scale_I, scheme=scheme, method=method
      )
    except ValueError as error:
      raise ValueError(f'{name}/{error}') from None
    layer, errors = layer | made.kernels, errors | made.errors
  return traverse_util.unflatten_dict(layer, sep='/'), errors


@jax.jit
def _errors(
  kernel: kernel_lib.Kernel, w_IO: jax.Array, second_II: jax.Array
) -> dict[str, jax.Array]:
  """Returns RMS errors of weights and outputs, relative to the exact ones."""
  delta_IO = kernel.whole(jnp.float32) - w_IO

  def relative(delta, whole):
    return jnp.sqrt(jnp.maximum(delta, 0) / jnp.where(whole > 0, whole, 1))

  return {
    'weight_error': relative(jnp.sum(delta_IO**2), jnp.sum(w_IO**2)),
    'output_error': relative(
      scaling.output_error(delta_IO, second_II),
      scaling.output_error(w_IO, second_II),
    ),
  }


def _check_free(out: pathlib.Path, overwrite: bool) -> None:
  """Raises ValueError if `out` has contents, before the work begins."""
  if not overwrite and out.exists() and (out.is_file() or any(out.iterdir())):
    raise ValueError(
      f'--out: got {out}, which exists, expected a new directory; choose'
      ' another place, or say --overwrite'
    )
