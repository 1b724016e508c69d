"""Mixtures of experts that the package compressed-tensors has quantised."""

import contextlib
import dataclasses
import io
import json

import jax.numpy as jnp
import numpy as np
import pytest

from frozen import format as frozen_format
from frozen.huggingface import (
  config_json,
  exporting,
  importing,
  safetensors_files,
)
from frozen.huggingface.quantised import parts
from models.linear.stored import tree as stored_tree
from tests.helpers import frozen_dirs
from tests.helpers.open_weights import (
  compressed_models,
  hf_files,
  quantised_dirs,
)

_WHY = 'the oracle is not installed: pip install -r requirements-peer.txt'
torch = pytest.importorskip('torch', reason=_WHY)
pytest.importorskip('compressed_tensors', reason=_WHY)

_MIXTRAL = dataclasses.replace(
  quantised_dirs.MIXTURE, model_width=64, expert_width=96
)
_CONFIGS = {
  'mixtral': _MIXTRAL,
  'qwen3_moe': dataclasses.replace(_MIXTRAL, qk_norm=True),
}
_W4 = {'num_bits': 4, 'strategy': 'group', 'group_size': 32}
_FP8 = {'num_bits': 8, 'type': 'float', 'strategy': 'block'}
_FP4 = {'num_bits': 4, 'type': 'float', 'group_size': 16}
_MX = {'type': 'float', 'group_size': 32, 'strategy': 'group'}
# The weights of a scheme, the family, and the form of the kernels.
CASES = {
  'W4A16 asymmetric': ({**_W4, 'symmetric': False}, 'qwen3_moe', 'uint4'),
  'W8A16': ({**_W4, 'num_bits': 8}, 'mixtral', 'int8'),
  'FP8 block': ({**_FP8, 'block_structure': [24, 32]}, 'mixtral', 'fp8'),
  'MXFP4': (
    {**_MX, 'num_bits': 4, 'scale_dtype': 'torch.uint8'}, 'mixtral', 'fp4'
  ),
  'NVFP4': (
    {**_FP4, 'strategy': 'tensor_group', 'scale_dtype': 'torch.float8_e4m3fn'},
    'qwen3_moe',
    'fp4',
  ),
}  # fmt: skip


@pytest.fixture(scope='module', params=CASES)
def checkpoint(request, tmp_path_factory):
  """A family, a form, a directory, and the package's floats by module."""
  weights, family, form = CASES[request.param]
  config = _CONFIGS[family]
  found, values = config_json.write(config)
  assert found == family
  pieces = exporting.tensor_map.pieces(family, config, values)
  tensors = exporting.tensors_of(frozen_dirs.params(config), pieces)
  directory = tmp_path_factory.mktemp('theirs')
  with contextlib.redirect_stderr(io.StringIO()):  # bars of progress
    model = compressed_models.linears(tensors)
    compressor = compressed_models.quantise(
      model,
      compressed_models.args(**weights),
      ignore=('lm_head', 're:.*gate$'),
    )
    written = {name: x.contiguous() for name, x in model.state_dict().items()}
    safetensors = pytest.importorskip('safetensors.torch', reason=_WHY)
    safetensors.save_file(written, directory / safetensors_files.SINGLE)
    hf_files.llama3(directory)
    (directory / 'config.json').write_text(json.dumps(values))
    compressor.update_config(str(directory))
    compressor.decompress_model(model)
  return family, form, directory, dict(model.named_modules())


def test_experts_are_kept_with_the_numbers_and_bytes_of_the_package(
  checkpoint, tmp_path
):
  family, form, directory, modules = checkpoint
  result = importing.import_directory(
    directory, tmp_path / 'ours', weights='kept'
  )
  assert not any('became floats' in note for note in result.notes)
  frozen = frozen_format.read(tmp_path / 'ours')
  # 4 matrices of attention and 3 of experts, in 2 layers.
  text = frozen_format.storage_text(frozen.manifest)
  assert text.startswith(f'14 x {form} (compressed-tensors')
  name = 'block_sparse_moe' if family == 'mixtral' else 'mlp'
  theirs = ('w1', 'w3', 'w2')
  if family != 'mixtral':
    theirs = ('gate_proj', 'up_proj', 'down_proj')
  for n in range(2):
    moe = frozen.params['params'][f'layer_{n}']['moe']
    assert not stored_tree.is_stored(moe['router']['kernel'])
    for ours, last in zip(('gate', 'up', 'down'), theirs, strict=True):
      kernel = moe[f'expert_{ours}']['kernel']
      assert kernel.form == form
      whole = np.asarray(kernel.whole(jnp.float32)).swapaxes(-1, -2)
      for e in range(8):
        weight = modules[f'model.layers.{n}.{name}.experts.{e}.{last}'].weight
        got = torch.tensor(whole[e])
        # The package subtracts zeros before it scales: half a bit each. It
        # rounds fp4 to bfloat16.
        torch.testing.assert_close(
          got.to(weight.dtype), weight.data, rtol=0, atol=1e-6
        )
  exported = exporting.export_directory(
    tmp_path / 'ours', tmp_path / 'again', form=exporting.COMPRESSED
  )
  assert any('loads no experts' in note for note in exported.notes)
  first, second = (
    quantised_dirs.load(place) for place in (directory, tmp_path / 'again')
  )
  assert second.keys() == first.keys()
  for tensor, x in first.items():
    assert second[tensor].dtype == x.dtype, tensor
    assert second[tensor].tobytes() == x.tobytes(), tensor
  source = importing.open_source(tmp_path / 'again')
  num = sum(x.dtype == parts.DTYPE for x in source.tensors.values())
  assert num == 2 * (4 + 3 * 8)
