"""Quantised directories: from the command to the served model."""

import dataclasses
import hashlib
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from frozen import format as frozen_format
from frozen.quantize import calibration, quality, quantizing
from models import transformer
from models.linear.stored import round as rounding, tree as stored_tree
from tests.helpers import commands, frozen_dirs, tiny_models

_TEXT = ''.join(f'{n} is a number, {n * n} its square. ' for n in range(400))


@pytest.fixture
def text(tmp_path):
  path = tmp_path / 'squares.txt'
  path.write_text(_TEXT, 'utf-8')
  return calibration.Config(path=str(path), rows=16, length=48, held_out=4)


def _quantise(tmp_path, text, scheme, method, **fields):
  return quantizing.quantise_directory(
    tmp_path / 'float', tmp_path / 'out', scheme=scheme, method=method,
    text=text, **fields,
  )  # fmt: skip


_MIXTURE = {
  'num_experts': 4,
  'num_active_experts': 2,
  'num_shared_experts': 1,
  'expert_width': 16,
  'mlp_width': 0,
}


def _config(**fields):
  return frozen_dirs.config(**{'model_width': 32, 'mlp_width': 48, **fields})


def _kernels(params):
  return {
    path
    for path in frozen_format.leaves_by_path(params)
    if path.endswith('/kernel')
  }


@pytest.mark.slow
@pytest.mark.parametrize('method', quantizing.METHODS)
@pytest.mark.parametrize(
  'fields',
  [
    {},
    {'scan_layers': True},
    {'tie_embeddings': True, 'qkv_bias': True},
    _MIXTURE,
  ],
  ids=['separate', 'stacked', 'tied', 'mixture'],
)
def test_a_directory_is_written_with_its_record(tmp_path, text, method, fields):
  config = _config(**fields)
  source = frozen_dirs.write(tmp_path / 'float', config=config)
  text = dataclasses.replace(text, seed=5)
  manifest, report = _quantise(tmp_path, text, 'int8', method)
  frozen = frozen_format.read(tmp_path / 'out')
  assert frozen.manifest == manifest
  assert manifest.num_params == source.num_params
  assert manifest.lineage['quantised_from'] == source.weights_digest
  record = manifest.quantization['record']
  assert record['scheme'] == 'int8'
  assert record['method'] == method
  assert record['calibration']['seed'] == 5
  digest = hashlib.sha256(_TEXT.encode()).hexdigest()
  assert record['calibration']['sha256'] == digest
  saved = json.loads((tmp_path / 'out/quality.json').read_text('utf-8'))
  assert saved == report
  assert saved['quality'] == record['quality']
  separate = frozen_dirs.params(dataclasses.replace(config, scan_layers=False))
  expected = {
    path
    for path in _kernels(separate)
    if '/layer_' in path and '/router/' not in path
  }
  assert ('rounded_experts' in saved) == bool(config.num_experts)
  assert set(saved['kernels']) == expected
  assert set(manifest.quantization['kernels']) == expected
  for errors in saved['kernels'].values():
    # GPTQ moves weights away, so that outputs come nearer.
    assert 0 < errors['weight_error'] < (0.05 if method == 'gptq' else 0.01)
    assert 0 < errors['output_error'] < 0.02


@pytest.mark.slow
@pytest.mark.parametrize('scheme', sorted(rounding.SCHEMES))
def test_the_table_is_of_the_model_that_was_written(tmp_path, text, scheme):
  config = _config()
  frozen_dirs.write(tmp_path / 'float', config=config)
  _, report = _quantise(tmp_path, text, scheme, 'gptq')
  frozen = frozen_format.read(tmp_path / 'out')
  rows = calibration.rows(
    text, tiny_models.byte_tokenizer(), has_bos=True, max_length=64
  )
  tokens_RT = rows.held_out_RT
  logits, _ = transformer.Transformer(frozen.config).apply(
    frozen.params, tokens_RT
  )
  logits = np.asarray(logits, np.float64)[:, :-1]
  logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  chosen = np.take_along_axis(logprobs, tokens_RT[:, 1:, None], 2)
  assert report['quality']['perplexity'] == pytest.approx(
    np.exp(-chosen.mean()), rel=1e-4
  )


def test_gptq_is_nearer_to_the_original_than_rounding(tmp_path, text):
  frozen_dirs.write(tmp_path / 'float', config=_config())
  found = {}
  for method in ('rtn', 'gptq'):
    _, report = _quantise(tmp_path, text, 'int4', method, overwrite=True)
    found[method] = report
  assert found['gptq']['quality']['kl'] < 0.8 * found['rtn']['quality']['kl']
  # Errors of the outputs become smaller, and those of the weights larger.
  for path, errors in found['gptq']['kernels'].items():
    if 'layer_0' in path:  # later layers have other inputs
      nearest = found['rtn']['kernels'][path]
      assert errors['output_error'] < nearest['output_error']
      assert errors['weight_error'] > nearest['weight_error']


@pytest.mark.slow
def test_the_same_command_has_the_same_weights(tmp_path, text):
  frozen_dirs.write(tmp_path / 'float', config=_config())
  first, _ = _quantise(tmp_path, text, 'nf4', 'awq')
  again, _ = _quantise(tmp_path, text, 'nf4', 'awq', overwrite=True)
  assert first.weights_digest == again.weights_digest


def test_bfloat16_stays_so_beside_the_kernels(tmp_path, text):
  config = _config()
  params = frozen_dirs.params(config, dtype='bfloat16')
  frozen_dirs.write(
    tmp_path / 'float', config=config, params=params, dtype='bfloat16'
  )
  _quantise(tmp_path, text, 'int8', 'smoothquant')
  params = frozen_format.read(tmp_path / 'out').params['params']
  assert params['embed']['embedding'].dtype == jnp.bfloat16
  assert params['layer_0']['attention_norm']['scale'].dtype == jnp.bfloat16
  assert stored_tree.is_stored(params['layer_0']['mlp']['down']['kernel'])


@pytest.mark.slow
def test_latent_attention_has_gptq_and_no_scales(tmp_path, text):
  config = _config(
    latent_width=8, rotary_width=4, num_kv_heads=4, head_width=10, value_width=6
  )
  frozen_dirs.write(tmp_path / 'float', config=config)
  with pytest.raises(ValueError, match='for attention/key_rope/kernel, exp'):
    _quantise(tmp_path, text, 'int8', 'awq')
  manifest, _ = _quantise(tmp_path, text, 'int8', 'gptq')
  stored = manifest.quantization['kernels']
  assert 'params/layer_0/attention/latent/kernel' in stored
  assert not any('key_up' in path for path in stored)


def test_a_directory_that_is_quantised_already_is_refused(tmp_path, text):
  frozen_dirs.write(tmp_path / 'float', config=_config())
  _quantise(tmp_path, text, 'int8', 'rtn')
  with pytest.raises(ValueError, match='are quantised already, expected'):
    quantizing.quantise_directory(
      tmp_path / 'out', tmp_path / 'again', scheme='int4', method='rtn',
      text=text,
    )  # fmt: skip
  assert not (tmp_path / 'again').exists()


@pytest.mark.slow
def test_a_mixture_of_experts_says_which_were_only_rounded(tmp_path, text):
  config = _config(**_MIXTURE, num_layers=1, scan_layers=False)
  frozen_dirs.write(tmp_path / 'float', config=config)
  few = dataclasses.replace(text, rows=1, length=8)
  said = []
  _, report = _quantise(tmp_path, few, 'int4', 'gptq', tell=said.append)
  moe = 'params/layer_0/moe/expert_{}/kernel'
  errors = [report['kernels'][moe.format(x)] for x in ('up', 'gate', 'down')]
  num = sum(error['rounded_experts'] for error in errors)
  assert report['rounded_experts'] == num > 0
  assert f'; {num} of the matrices of experts saw too few tokens' in said[0]
  router = frozen_format.read(tmp_path / 'out').params['params']['layer_0']
  floats = frozen_format.read(tmp_path / 'float').params['params']['layer_0']
  np.testing.assert_array_equal(
    router['moe']['router']['kernel'], floats['moe']['router']['kernel']
  )


@pytest.mark.parametrize(
  ('scheme', 'method', 'message'),
  [
    ('int3', 'rtn', "--scheme: got 'int3', expected one of int8"),
    ('int4', 'round', "--method: got 'round', expected one of rtn"),
    ('int4', 'smoothquant', "--scheme: got 'int4', expected one of int8"),
  ],
)
def test_unknown_schemes_and_methods_are_refused(
  tmp_path, text, scheme, method, message
):
  with pytest.raises(ValueError, match=message):
    _quantise(tmp_path, text, scheme, method)


def test_a_place_that_is_taken_is_refused_before_the_work(tmp_path, text):
  (tmp_path / 'out').mkdir()
  (tmp_path / 'out/notes.txt').write_text('mine')
  with pytest.raises(ValueError, match='--out: got .* which exists, expected'):
    _quantise(tmp_path, text, 'int8', 'rtn')  # there is no source either


def test_a_kernel_with_odd_inputs_is_named(tmp_path, text):
  frozen_dirs.write(tmp_path / 'float', config=_config(mlp_width=41))
  with pytest.raises(ValueError, match='mlp/down/kernel: kernel: got 41 inp'):
    _quantise(tmp_path, text, 'int4', 'gptq')


def _command(tmp_path, **fields):
  values = {
    'source': tmp_path / 'float',
    'out': tmp_path / 'out',
    'scheme': 'int4',
    'method': 'rtn',
    'rows': 8,
    'length': 32,
    'text': tmp_path / 'squares.txt',
    **fields,
  }
  return commands.run(
    'frozen/quantize/__main__.py',
    *(f'--{name}={value}' for name, value in values.items()),
  )


@pytest.mark.slow
def test_the_command_says_the_quality_and_so_does_a_server(tmp_path, text):
  frozen_dirs.write(tmp_path / 'float', config=_config())
  done = _command(tmp_path)
  assert done.returncode == 0, done.stderr
  manifest = frozen_format.open_directory(tmp_path / 'out').manifest
  line = quality.told(manifest)
  assert line.startswith('KL ')
  assert f'quality {line}' in done.stdout
  served = commands.run(
    'serve.py', f'--model={tmp_path / "out"}', '--prompt=1', '--max_tokens=4'
  )
  assert served.returncode == 0, served.stderr
  assert f'quality         {line}' in served.stdout
  assert quality.told(frozen_dirs.write(tmp_path / 'other')) == ''


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'source': pathlib.Path('nowhere')}, 'nowhere'),
    ({'text': 'nowhere.txt'}, 'nowhere.txt'),
    ({'rows': 100_000}, '--text: got'),
    ({'method': 'magic'}, "--method: got 'magic'"),
  ],
)
def test_the_command_ends_with_a_clear_error(tmp_path, text, fields, message):
  frozen_dirs.write(tmp_path / 'float', config=_config())
  done = _command(tmp_path, **fields)
  assert done.returncode == 2
  assert done.stderr.startswith('error: ')
  assert message in done.stderr
  assert not (tmp_path / 'out').exists()
