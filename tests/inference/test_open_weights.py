"""The engine on tiny models with the features of open weights.

Windows with two rotary bases and soft-caps, latent attention, and layers
without positions: through pages, chunks and decode steps, the tokens are those
of a full forward.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inference import generate
from inference.engine import engine_config
from inference.sampling import settings as settings_lib
from models import transformer
from tests.helpers import frozen_dirs

ENGINE = engine_config.EngineConfig(
  max_sequences=2,
  decode_shapes=(2,),
  chunk_tokens=8,
  max_chunks=2,
  max_mixed_chunks=1,
  page_size=8,
)
MODELS = {
  'gemma': {
    'layer_pattern': 'lg',
    'window': 7,
    'rope_local_base': 100.0,
    'attention_softcap': 2.0,
    'query_scale': 0.5,
    'norm_place': 'both',
    'qk_norm': True,
    'embed_multiplier': 4.9,
    'mlp': 'geglu',
  },
  'deepseek': {
    'num_kv_heads': 4,
    'head_width': 10,
    'rotary_width': 4,
    'value_width': 6,
    'latent_width': 8,
    'num_dense_layers': 1,
    'num_experts': 4,
    'num_active_experts': 2,
    'num_shared_experts': 1,
    'expert_width': 12,
    'router_score': 'sigmoid',
    'router_correction': True,
  },
  'neox': {
    'layer_pattern': 'gn',
    'rotary_width': 2,
    'parallel_residual': True,
    'norm': 'layernorm',
    'mlp': 'gelu_exact',
    'use_bias': True,
  },
}


@pytest.mark.slow
@pytest.mark.parametrize('name', list(MODELS))
def test_greedy_tokens_are_the_full_forwards(tmp_path, name):
  config = frozen_dirs.config(**MODELS[name])
  frozen_dirs.write(tmp_path / 'frozen', config=config)
  generator = generate.load(tmp_path / 'frozen', ENGINE)
  settings = settings_lib.Settings(
    temperature=0.0, max_tokens=12, ignore_eos=True
  )
  # Longer than a window and a page, and shorter than both.
  prompts = ['a prompt of many blocks', 'abc']
  apply = jax.jit(transformer.Transformer(config).apply)
  for prompt, completion in zip(
    prompts, generator.generate(prompts, settings), strict=True
  ):
    start = generator.prompt_ids(prompt)
    ids = [*start, *completion.token_ids]
    padded_1T = jnp.asarray([ids + [0] * (64 - len(ids))], jnp.int32)
    logits_1TV, _ = apply(generator.engine.params, padded_1T)
    choice_T = np.argmax(logits_1TV[0, :, :259], axis=-1)
    expected = choice_T[len(start) - 1 : len(ids) - 1].tolist()
    assert completion.token_ids == expected
    assert len(completion.token_ids) == 12
