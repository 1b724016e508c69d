"""config.json: fields that are read or refused, and the family of exports."""

import dataclasses
import math
import re

import pytest

from frozen.huggingface import config_json
from frozen.huggingface.families import layer_kinds
from models.attention import rope_scaling
from tests.helpers import tiny_models

LLAMA = {
  'architectures': ['LlamaForCausalLM'],
  'model_type': 'llama',
  'vocab_size': 61,
  'hidden_size': 24,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'intermediate_size': 40,
  'max_position_embeddings': 32,
  'rms_norm_eps': 1e-5,
}


def _read(**fields):
  return config_json.read(LLAMA | fields)[1]


def test_llama_is_what_our_own_preset_is():
  expected = tiny_models.llama_like()
  assert _read(hidden_act='silu') == expected


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    (
      {'model_type': 'mamba'},
      "got model_type = 'mamba'.*expected one of llama",
    ),
    ({'model_type': ['llama']}, r"got model_type = \['llama'\]"),
    (
      {'architectures': ['LlamaForSequenceClassification']},
      'only language models are read',
    ),
    ({'key_value_gain': 2.0}, 'got key_value_gain = 2.0, expected only fie'),
    ({'hidden_act': 'mish'}, "got hidden_act = 'mish', expected one of silu"),
    ({'hidden_size': 25}, 'expected a multiple of num_attention_heads = 4'),
    ({'num_hidden_layers': '2'}, "num_hidden_layers = '2', expected an integ"),
    (
      {'num_hidden_layers': 0},
      'got num_hidden_layers = 0, expected an integer',
    ),
    (
      {'num_key_value_heads': 3},
      'expected a divisor of num_attention_heads = 4',
    ),
    ({'rms_norm_eps': math.nan}, 'got rms_norm_eps = nan, expected a positive'),
    ({'tie_word_embeddings': 1}, 'tie_word_embeddings = 1, expected true or'),
    ({'quantization_config': {'bits': 4}}, 'got quantization_config = '),
    (
      {'rope_scaling': {'type': 'x'}},
      "got rope_scaling.type = 'x', expected on",
    ),
    ({'rope_scaling': {'type': 'llama3', 'factor': 8.0}}, 'low_freq_factor'),
    (
      {'rope_scaling': {'type': 'linear', 'factor': 2.0, 'mrope_section': [1]}},
      r'got rope_scaling.mrope_section = \[1\], expected only fields of rop',
    ),
    ({'rope_scaling': 'yarn'}, "got rope_scaling = 'yarn', expected an object"),
  ],
)
def test_what_changes_the_mathematics_unseen_is_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    _read(**fields)


def test_a_missing_size_is_named():
  with pytest.raises(ValueError, match='got no hidden_size, expected one'):
    config_json.read({k: v for k, v in LLAMA.items() if k != 'hidden_size'})


def test_old_and_new_rotary_fields_say_the_same():
  old = _read(rope_theta=500.0, rope_scaling={'type': 'linear', 'factor': 4.0})
  new = _read(
    rope_parameters={
      'rope_type': 'linear', 'factor': 4.0, 'rope_theta': 500.0
    }
  )  # fmt: skip
  assert old == new
  assert old.rope_scaling.factor == 4.0
  assert old.rope_base == 500.0


def test_fields_without_effect_are_passed_over():
  extra = {'use_cache': True, 'torch_dtype': 'float16', 'is_causal': True}
  assert _read(**extra) == _read()
  assert _read(new_switch=None, tie_encoder_decoder=False) == _read()


@pytest.mark.parametrize(
  ('name', 'value'),
  [
    ('is_causal', False),
    ('new_switch', False),
    ('residual_multiplier', 0),
    ('residual_multiplier', 0.0),
    ('tie_encoder_decoder', 0),
    ('new_list', []),
  ],
)
def test_a_field_that_is_false_or_0_may_switch_something_off(name, value):
  with pytest.raises(ValueError, match=f'got {name} = {re.escape(str(value))}'):
    _read(**{name: value})


_SMALL = {
  'vocab_size': 64,
  'hidden_size': 32,
  'num_hidden_layers': 2,
  'num_attention_heads': 2,
  'num_key_value_heads': 1,
  'head_dim': 16,
  'intermediate_size': 64,
  'max_position_embeddings': 32,
}


@pytest.mark.parametrize('family', ['gemma', 'gemma2', 'gemma3_text'])
def test_two_activations_that_disagree_are_refused(family):
  values = {'model_type': family, **_SMALL}
  ours = {'hidden_activation': 'gelu_pytorch_tanh'}
  _, agreed = config_json.read(
    values | ours | {'hidden_act': 'gelu_pytorch_tanh'}
  )
  assert agreed == config_json.read(values | ours)[1]
  for other in ('relu', 'nonsense'):
    with pytest.raises(ValueError, match='expected the same|expected one of'):
      config_json.read(values | ours | {'hidden_act': other})


@pytest.mark.parametrize('family', ['llama', 'mistral', 'qwen2', 'olmo2'])
@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'partial_rotary_factor': 0.5}, 'got partial_rotary_factor = 0.5'),
    (
      {'rope_parameters': {'partial_rotary_factor': 0.5}},
      'got rope_parameters.partial_rotary_factor = 0.5, expected None or 1',
    ),
    (
      {'rope_theta': 1e4, 'rope_parameters': {'rope_theta': 2e4}},
      'got rope_theta = 10000.0, expected 20000.0, as in rope_parameters',
    ),
    (
      {'rope_parameters': {'rope_type': 'linear'}},
      'got no rope_parameters.factor, expected one',
    ),
    (
      {
        'rope_parameters': {'rope_type': 'linear', 'factor': 2.0},
        'rope_scaling': {'rope_type': 'linear', 'factor': 4.0},
      },
      'got rope_scaling = .* the same as rope_parameters',
    ),
  ],
)
def test_rotary_fields_are_refused_by_their_names(family, fields, message):
  values = {'model_type': family, **_SMALL}
  config_json.read(values | {'partial_rotary_factor': 1.0})
  with pytest.raises(ValueError, match=f'a/config.json: {message}'):
    config_json.read(values | fields, 'a/config.json')


@pytest.mark.parametrize(
  ('letters', 'pattern'),
  [
    ('gggg', ''),
    ('ll', ''),
    ('lglg', 'lg'),
    ('lllglllg', 'lllg'),
    ('lllgl', 'lllg'),
    ('ggl', 'ggl'),
    ('nn', 'n'),
  ],
)
def test_patterns_are_the_shortest(letters, pattern):
  assert layer_kinds.pattern(letters) == pattern


@pytest.mark.parametrize(
  ('config', 'family'),
  [
    (tiny_models.llama_like(), 'llama'),
    (tiny_models.llama_like(scan_layers=True, dropout_rate=0.1), 'llama'),
    (tiny_models.llama_like(qk_norm=True), 'qwen3'),
    (tiny_models.llama_like(window=7), 'mistral'),
    (tiny_models.llama_like(qkv_bias=True), 'qwen2'),
    (tiny_models.llama_like(layer_pattern='gn'), 'smollm3'),
    (tiny_models.gpt2_like(), 'gpt2'),
    (tiny_models.mixture(num_shared_experts=0), 'mixtral'),
    (tiny_models.mixture(num_shared_experts=0, qk_norm=True), 'qwen3_moe'),
  ],
)
def test_an_export_chooses_a_family_that_computes_the_same(config, family):
  assert config_json.write(config)[0] == family


@pytest.mark.parametrize(
  'config',
  [
    tiny_models.stable(),  # muP
    tiny_models.mixture(),  # shared experts without latent attention
    tiny_models.llama_like(logit_softcap=5.0),
    tiny_models.llama_like(mlp='gelu'),
    tiny_models.gpt2_like(use_bias=False),
  ],
)
def test_what_no_family_computes_is_refused(config):
  with pytest.raises(ValueError, match='got a model that no family of transf'):
    config_json.write(config)


def test_a_family_that_was_asked_for_must_fit():
  config = tiny_models.llama_like(qk_norm=True)
  with pytest.raises(ValueError, match='llama: qk_norm is True, there False'):
    config_json.write(config, 'llama')
  with pytest.raises(ValueError, match="family: got 'mamba', expected one of"):
    config_json.write(config, 'mamba')


def test_every_kind_of_stretching_survives_the_way_there_and_back():
  pairs = 3
  for scaling in (
    rope_scaling.RopeScaling(kind='linear', factor=2.0),
    rope_scaling.RopeScaling(kind='dynamic', factor=2.0, original_length=32),
    rope_scaling.RopeScaling(
      kind='llama3',
      factor=8.0,
      original_length=16,
      low_frequency=1.0,
      high_frequency=4.0,
    ),
    rope_scaling.RopeScaling(
      kind='yarn',
      factor=3.0,
      original_length=16,
      beta_fast=30.0,
      beta_slow=2.0,
      is_truncated=False,
      amplitude=1.25,
    ),
    rope_scaling.RopeScaling(
      kind='longrope',
      original_length=16,
      amplitude=1.5,
      short_divisors=(1.0, 1.5, 2.0),
      long_divisors=(2.0, 3.0, 4.0),
    ),
  ):
    config = tiny_models.llama_like(rope_scaling=scaling)
    config.validate()
    assert len(scaling.short_divisors) in (0, pairs)
    family, values = config_json.write(config)
    again = config_json.read(values)[1]
    assert again.rope_scaling == scaling
    assert dataclasses.replace(again, rope_scaling=scaling) == again
