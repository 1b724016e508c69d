"""compressed-tensors checkpoints, beside the package that defines them."""

import contextlib
import dataclasses
import io
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frozen import stored_kernels
from frozen.huggingface import config_json, exporting, importing, tensor_map
from frozen.huggingface.quantised import kept as kept_lib
from models import transformer
from models.linear.stored import round as rounding, tree as stored_tree
from tests.helpers import frozen_dirs
from tests.helpers.open_weights import (
  compressed_models,
  open_weights,
  quantised_dirs,
)

_WHY = 'the oracle is not installed: pip install -r requirements-peer.txt'
torch = pytest.importorskip('torch', reason=_WHY)
transformers = pytest.importorskip('transformers', reason=_WHY)
pytest.importorskip('compressed_tensors', reason=_WHY)

# float32 sums in another order, on logits of up to about 10.
TOLERANCE = 2e-4
TOKENS = np.arange(1, 25).reshape(2, 12)


@dataclasses.dataclass(frozen=True)
class Case:
  """A scheme, and the forms of the kernels that it becomes."""

  weights: dict
  form: str
  inputs: dict | None = None
  model: str = 'llama3'
  title: str = ''
  options: dict = dataclasses.field(default_factory=dict)


_W4 = {'num_bits': 4, 'strategy': 'group', 'group_size': 32}
_FP8 = {'num_bits': 8, 'type': 'float'}
_TOKEN = {'num_bits': 8, 'strategy': 'token', 'dynamic': True}
_STATIC = {'num_bits': 8, 'strategy': 'tensor'}
_FP4 = {'num_bits': 4, 'type': 'float', 'group_size': 16}
_MX = {'type': 'float', 'group_size': 32, 'strategy': 'group'}
CASES = {
  'W4A16': Case(_W4, 'int4'),
  'W4A16 tied': Case(_W4, 'int4', model='llama'),
  'W4A16 asymmetric': Case({**_W4, 'symmetric': False}, 'uint4'),
  'W4A16 channel': Case({'num_bits': 4, 'strategy': 'channel'}, 'int4'),
  'W4A16 channel asymmetric': Case(
    {'num_bits': 4, 'strategy': 'channel', 'symmetric': False}, 'uint4'
  ),
  'W4A16 joined': Case(_W4, 'int4', model='phi3'),
  'W8A16': Case({**_W4, 'num_bits': 8}, 'int8'),
  'W8A16 asymmetric': Case({**_W4, 'num_bits': 8, 'symmetric': False}, 'int8'),
  'W8A8 dynamic': Case(
    {'num_bits': 8, 'strategy': 'channel'}, 'int8', _TOKEN
  ),
  'W8A8 static': Case({'num_bits': 8, 'strategy': 'channel'}, 'int8', _STATIC),
  'W8A8 asymmetric': Case(
    {'num_bits': 8, 'strategy': 'channel', 'symmetric': False}, 'int8', _TOKEN
  ),
  'W4A8': Case(_W4, 'int8', _TOKEN),
  'FP8 static': Case(
    {**_FP8, 'strategy': 'tensor'}, 'fp8', {**_STATIC, 'type': 'float'}
  ),
  'FP8 dynamic': Case(
    {**_FP8, 'strategy': 'channel'}, 'fp8', {**_TOKEN, 'type': 'float'}
  ),
  'FP8 weights': Case({**_FP8, 'strategy': 'channel'}, 'fp8'),
  'FP8 block': Case(
    {**_FP8, 'strategy': 'block', 'block_structure': [24, 32]}, 'fp8'
  ),
  'FP8 block joined': Case(
    {**_FP8, 'strategy': 'block', 'block_structure': [24, 32]},
    'fp8',
    model='phi3',
  ),
  'NVFP4': Case(
    {**_FP4, 'strategy': 'tensor_group', 'scale_dtype': 'torch.float8_e4m3fn'},
    'fp4',
  ),
  'MXFP4': Case({**_MX, 'num_bits': 4, 'scale_dtype': 'torch.uint8'}, 'fp4'),
  'MXFP8': Case({**_MX, 'num_bits': 8, 'scale_dtype': 'torch.uint8'}, 'fp8'),
  'head and table': Case(
    _W4, 'int4', options={'ignore': (), 'targets': ('Linear', 'Embedding')}
  ),
}  # fmt: skip
# A scheme of each form; the others take the same code with other shapes.
_UNUSED = ('.input_scale', '.input_zero_point', '.input_global_scale')
_FAST = ('W4A16 asymmetric', 'W8A8 static', 'FP8 block', 'NVFP4')


@pytest.fixture(autouse=True)
def _quiet():
  transformers.logging.set_verbosity_error()
  transformers.logging.disable_progress_bar()
  num_threads = torch.get_num_threads()
  torch.set_num_threads(1)
  with contextlib.redirect_stderr(io.StringIO()):  # bars of progress
    yield
  torch.set_num_threads(num_threads)


@pytest.fixture(
  scope='module',
  params=[
    pytest.param(name, marks=[] if name in _FAST else pytest.mark.slow)
    for name in CASES
  ],
)
def checkpoint(request, tmp_path_factory):
  """A case, its directory, and its matrices as the package reads them."""
  case = CASES[request.param]
  directory = tmp_path_factory.mktemp('theirs')
  model = open_weights.build(case.model, **compressed_models.SIZES)
  inputs = case.inputs and compressed_models.args(**case.inputs)
  with contextlib.redirect_stderr(io.StringIO()):
    compressor = compressed_models.quantise(
      model,
      compressed_models.args(**case.weights),
      inputs=inputs,
      **case.options,
    )
    compressed_models.save(model, compressor, directory)
    compressor.decompress_model(model)
  # As weights only: their forward pass rounds activations, too.
  for module in model.modules():
    module.quantization_enabled = False
  return case, directory, model


def _logits(source, params):
  model = transformer.Transformer(source.config)
  params = jax.tree.map(jnp.asarray, params)
  logits, _ = jax.jit(model.apply)(params, jnp.asarray(TOKENS))
  return np.asarray(logits)


def test_matrices_and_logits_are_those_of_the_package(checkpoint):
  _, directory, model = checkpoint
  source = importing.open_source(directory)
  modules = dict(model.named_modules())
  compared = 0
  for name, tensor in source.tensors.items():
    if tensor.dtype == 'QUANTISED':
      weight = modules[name.removesuffix('.weight')].weight
      got = torch.tensor(tensor.whole())
      assert torch.equal(got.to(weight.dtype), weight), name
      # The package rounds fp4 to bfloat16; the products are compared below.
      weight.data = got
      compared += 1
  assert compared >= 8
  params = importing.load_params(source, 'float32')
  with torch.no_grad():
    expected = model.float()(torch.tensor(TOKENS)).logits.numpy()
  got = _logits(source, params)
  scale = np.abs(expected).max()
  np.testing.assert_allclose(got, expected, atol=TOLERANCE * scale)


def test_kept_matrices_have_the_logits_of_floats(checkpoint):
  case, directory, _ = checkpoint
  source = importing.open_source(directory)
  pieces = importing.check_tensors(source)
  kept = kept_lib.kernels(source.tensors, pieces)
  assert not kept.notes
  assert {kernel.form for kernel in kept.kernels.values()} == {case.form}
  assert kept.names == {
    name for name, x in source.tensors.items() if x.dtype == 'QUANTISED'
  }
  floats = importing.load_params(source, 'float32')
  params = importing.load_params(source, 'float32', kept=kept.kernels)
  stored = [
    x
    for x in jax.tree.leaves(params, is_leaf=stored_tree.is_stored)
    if stored_tree.is_stored(x)
  ]
  assert len(stored) == len(kept.kernels)
  expected, got = _logits(source, floats), _logits(source, params)
  scale = np.abs(expected).max()
  # The same numbers, multiplied in blocks.
  np.testing.assert_allclose(got, expected, atol=1e-5 * scale)


def test_activations_are_said_to_stay_floats(checkpoint):
  case, directory, _ = checkpoint
  notes = importing.open_source(directory).quantisation.notes
  told = [note for note in notes if note.startswith('activations stay in fl')]
  assert len(told) == bool(case.inputs)
  values = json.loads((directory / 'config.json').read_text())
  assert values['quantization_config']['quant_method'] == 'compressed-tensors'
  names = importing.safetensors_files.open_directory(directory)
  has_scales = any(name.endswith('input_scale') for name in names)
  assert has_scales == any('were not read' in note for note in notes)
  assert tensor_map.prefix_of(case.model) == 'model.'


@pytest.fixture(scope='module')
def exported(checkpoint, tmp_path_factory):
  """A kept import of a checkpoint, written again, and notes of the export."""
  root = tmp_path_factory.mktemp('again')
  importing.import_directory(checkpoint[1], root / 'ours', weights='kept')
  result = exporting.export_directory(
    root / 'ours', root / 'theirs', form=exporting.COMPRESSED
  )
  return root / 'theirs', result.notes


def test_a_kept_import_is_exported_with_its_bytes(
  checkpoint, exported, tmp_path
):
  case, directory, _ = checkpoint
  again, notes = exported
  assert not any('floats' in note for note in notes)
  first, second = (
    importing.safetensors_files.open_directory(place)
    for place in (directory, again)
  )
  unused = {name for name in first if name.endswith(_UNUSED)}
  assert second.keys() == first.keys() - unused
  is_cut = case.model == 'phi3' and case.weights['strategy'] == 'block'
  for name, tensor in second.items():
    if is_cut and ('qkv' in name or 'gate_up' in name):
      continue  # a block has rows of two matrices: each row has a scale now
    assert tensor.dtype == first[name].dtype, name
    got, expected = tensor.whole(), first[name].whole()
    assert got.shape == expected.shape, name
    assert got.tobytes() == expected.tobytes(), name
  importing.import_directory(again, tmp_path / 'ours', weights='kept')
  exporting.export_directory(
    tmp_path / 'ours', tmp_path / 'theirs', form=exporting.COMPRESSED
  )
  for name in ('model.safetensors', 'config.json'):
    written = (tmp_path / 'theirs' / name).read_bytes()
    assert written == (again / name).read_bytes(), name


def _reference_logits(directory):
  """Returns the logits of transformers, which reads with the package."""
  values = json.loads((directory / 'config.json').read_text())
  # It dequantises all matrices by one group (5.24). Without this it refuses the
  # package's own packed zeros, and computes with fp4 in bfloat16.
  is_uniform = len(values['quantization_config']['config_groups']) == 1
  how = transformers.CompressedTensorsConfig(dequantize=is_uniform)
  with warnings.catch_warnings():
    warnings.filterwarnings('ignore', 'You passed `quantization_config`')
    model = transformers.AutoModelForCausalLM.from_pretrained(
      directory,
      dtype=torch.float32,
      attn_implementation='eager',
      quantization_config=how,
    )
  with torch.no_grad():
    return model(torch.tensor(TOKENS)).logits.float().numpy()


def test_transformers_reads_an_export(checkpoint, exported):
  case, directory, _ = checkpoint
  if 'targets' in case.options:
    pytest.skip('transformers loads no quantised Embedding')
  source = importing.open_source(directory)
  params = importing.load_params(source, 'float32')
  if case.weights.get('scale_dtype'):
    params = _rounded(params)
  expected = _logits(source, params)
  got = _reference_logits(exported[0])
  scale = np.abs(expected).max()
  np.testing.assert_allclose(got, expected, atol=TOLERANCE * scale)


def _rounded(params):
  """Rounds kernels as the package does if scales are exponents or fp8."""
  return jax.tree_util.tree_map_with_path(
    lambda path, x: (
      jnp.asarray(x, jnp.bfloat16).astype(jnp.float32)
      if path[-1].key == 'kernel'
      else x
    ),
    params,
  )


@pytest.mark.parametrize(
  'scheme',
  [
    'int8', 'int4',
    *(
      pytest.param(name, marks=pytest.mark.slow)
      for name in ('int8-g32', 'fp8', 'mxfp4', 'nvfp4')
    ),
  ],
)  # fmt: skip
def test_transformers_reads_what_was_quantised_here(tmp_path, scheme):
  config = dataclasses.replace(quantised_dirs.CONFIG, mlp_width=64)
  params = jax.tree_util.tree_map_with_path(
    lambda path, x: (
      rounding.by_scheme(x, scheme) if path[-1].key == 'kernel' else x
    ),
    frozen_dirs.params(config),
  )
  frozen_dirs.write(
    tmp_path / 'ours',
    config=config,
    params=params,
    provenance=frozen_dirs.provenance(step=0),
  )
  exporting.export_directory(
    tmp_path / 'ours', tmp_path / 'theirs', form=exporting.COMPRESSED
  )
  source = importing.open_source(tmp_path / 'theirs')
  kept = kept_lib.kernels(source.tensors, importing.check_tensors(source))
  for path, leaf in stored_kernels.by_path(params['params']).items():
    if stored_tree.is_stored(leaf):
      got = kept.kernels[path]
      assert (got.form, got.tile) == (leaf.form, leaf.tile)
      np.testing.assert_array_equal(got.values, leaf.values)
  whole = stored_tree.whole_kernels(params)
  expected = _logits(source, _rounded(whole) if 'fp4' in scheme else whole)
  got = _reference_logits(tmp_path / 'theirs')
  scale = np.abs(expected).max()
  np.testing.assert_allclose(got, expected, atol=TOLERANCE * scale)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['gpt_neox', 'deepseek_v3'])
def test_rows_of_blocks_follow_the_order_of_heads(tmp_path, name):
  """Tensors that join matrices head by head, or have other rotary channels."""
  _, theirs = open_weights.config_of(name, vocab_size=400)
  architecture = config_json.FAMILIES[theirs.model_type].architecture
  values = json.loads(json.dumps(theirs.to_dict()))
  _, config = config_json.read(values | {'architectures': [architecture]})
  block = [24, 20]
  quantised_dirs.write(
    tmp_path,
    quantised_dirs.fp8(tuple(block)),
    {'quant_method': 'fp8', 'weight_block_size': block},
    config,
  )
  source = importing.open_source(tmp_path)
  kept = kept_lib.kernels(source.tensors, importing.check_tensors(source))
  floats = importing.load_params(source, 'float32')
  params = importing.load_params(source, 'float32', kept=kept.kernels)
  expected, got = _logits(source, floats), _logits(source, params)
  scale = np.abs(expected).max()
  np.testing.assert_allclose(got, expected, atol=1e-5 * scale)
  if name == 'deepseek_v3':  # routers, kv_b_proj
    assert 'quantised matrices became floats' in kept.notes[0]
    up = kept.kernels['layer_1/moe/expert_up/kernel']
    assert (up.form, up.tile) == ('fp8', tuple(block))
