"""A quantised checkpoint is served: kept matrices answer as floats do."""

import numpy as np
import pytest

from frozen import format as frozen_format
from frozen.huggingface import importing
from inference.engine import engine as engine_lib, engine_config
from inference.requests import requests
from inference.sampling import settings as settings_lib
from models.linear.stored import tree as stored_tree
from tests.helpers.open_weights import quantised_dirs
from text import tokenizer as tokenizer_lib

_ENGINE = engine_config.EngineConfig(
  max_sequences=1,
  decode_shapes=(1,),
  chunk_tokens=16,
  max_chunks=1,
  max_mixed_chunks=1,
  page_size=8,
)
_GREEDY = settings_lib.Settings(
  temperature=0.0, max_tokens=8, logprobs=3, ignore_eos=True
)


def _answer(directory):
  frozen = frozen_format.read(directory)
  engine = engine_lib.Engine(
    frozen.config,
    frozen.params,
    tokenizer=tokenizer_lib.load(frozen.tokenizer_dir),
    weights_digest=frozen.manifest.weights_digest,
    config=_ENGINE,
  )
  request = requests.Request(prompt_ids=tuple(range(3, 15)), settings=_GREEDY)
  *_, (_, update) = engine.answer([request])
  assert update.completion
  return frozen, update.completion


@pytest.mark.slow
@pytest.mark.parametrize('is_mixture', [False, True])
def test_the_engine_answers_from_kept_matrices_as_from_floats(
  tmp_path, is_mixture
):
  field = {
    'quant_method': 'gptq',
    'bits': 4,
    'group_size': 16,
    'desc_act': True,
    'sym': False,
  }
  quantise = quantised_dirs.gptq(4, 16, ordered=True)
  config = quantised_dirs.MIXTURE if is_mixture else quantised_dirs.CONFIG
  quantised_dirs.write(tmp_path / 'theirs', quantise, field, config)
  answers = {}
  for weights in ('float', 'kept'):
    importing.import_directory(
      tmp_path / 'theirs', tmp_path / weights, weights=weights
    )
    frozen, answers[weights] = _answer(tmp_path / weights)
    layer = frozen.params['params']['layer_0']
    owner = layer['moe']['expert_up'] if is_mixture else layer['mlp']['up']
    kernel = owner['kernel']
    assert stored_tree.is_stored(kernel) == (weights == 'kept')
  floats, kept = answers['float'], answers['kept']
  assert kept.token_ids == floats.token_ids
  for one, other in zip(kept.logprobs, floats.logprobs, strict=True):
    # The same numbers in float32, in blocks, on logits of up to about 10.
    np.testing.assert_allclose(one.chosen, other.chosen, atol=1e-5)
