"""ModelConfig: refused values, and the round trip through JSON."""

import math

import pytest

from models import model_config
from tests.helpers import tiny_models


@pytest.mark.parametrize(
  ('field', 'value', 'message'),
  [
    ('num_layers', 0, 'model.num_layers: got 0, expected a positive integer'),
    ('max_length', 2**31, 'max_length: got 2147483648, expected at most 2,14'),
    ('norm', 'batchnorm', "got 'batchnorm', expected one of rmsnorm"),
    ('mlp', 'mish', "got 'mish', expected one of swiglu, geglu"),
    ('positions', 'none', "got 'none', expected one of rope, learned"),
    ('num_kv_heads', 3, 'expected a divisor of num_heads = 4'),
    ('head_width', 5, 'expected an even number'),
    ('dropout_rate', 1.0, 'expected 0 <= rate < 1'),
    ('init_std', 0.0, 'expected a positive number'),
    ('logit_softcap', -1.0, 'model.logit_softcap: got -1.0, expected a number'),
    ('logit_softcap', math.nan, 'model.logit_softcap: got nan, expected'),
    ('mup_base_width', -1, 'mup_base_width: got -1, expected a positive int'),
    ('mup_base_width', 2.5, 'mup_base_width: got 2.5, expected a positive int'),
    (
      'mup_base_head_width',
      -8,
      'mup_base_head_width: got -8, expected a posit',
    ),
    ('mlp', 'none', 'mlp_width: got 40 with mlp = .none., expected none of'),
    ('mup_base_head_width', 8, 'got 8 without muP, expected 0; set model.mup'),
  ],
)
def test_impossible_configs_are_refused(field, value, message):
  with pytest.raises(ValueError, match=message):
    tiny_models.llama_like(**{field: value}).validate()


@pytest.mark.parametrize('make', [tiny_models.gpt2_like, tiny_models.stable])
def test_config_survives_json_and_refuses_other_fields(make):
  config = make()
  assert model_config.ModelConfig.from_dict(config.to_dict()) == config
  with pytest.raises(ValueError, match=r"unknown fields \['depth'\]"):
    model_config.ModelConfig.from_dict({**config.to_dict(), 'depth': 3})


def test_a_missing_field_has_its_default_if_there_is_one():
  fields = tiny_models.llama_like().to_dict()
  del fields['rope_scaling']['amplitude'], fields['qk_norm']
  config = model_config.ModelConfig.from_dict(fields)
  assert config == tiny_models.llama_like()
  del fields['num_heads']
  with pytest.raises(ValueError, match=r"missing fields \['num_heads'\]"):
    model_config.ModelConfig.from_dict(fields)
  fields['rope_scaling']['twist'] = 1
  with pytest.raises(ValueError, match='missing fields'):
    model_config.ModelConfig.from_dict(fields)
  fields['num_heads'] = 4
  with pytest.raises(
    ValueError, match=r"unknown fields rope_scaling \['twist'\], expected"
  ):
    model_config.ModelConfig.from_dict(fields)
