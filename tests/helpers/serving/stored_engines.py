"""Answers of engines of kernels in fewer bits, against those of the floats."""

from typing import Any, NamedTuple

import jax
import numpy as np

from inference.engine import engine as engine_lib, engine_config
from inference.requests import requests
from inference.sampling import settings as settings_lib
from models import model_config, transformer
from tests.helpers import tiny_models
from tests.helpers.open_weights import stored_params

_IDS = [256, *b'the weights say this, and nothing else does']
_NUM_IDS = 259  # of the byte tokenizer


class Answer(NamedTuple):
  """Greedy tokens, and their log-probabilities."""

  ids: list[int]
  chosen: list[float]


def answer(
  config: model_config.ModelConfig, params: Any, **layout: Any
) -> Answer:
  """Returns the answer of a new engine with fields of `EngineConfig`."""
  engine = engine_lib.Engine(
    config,
    params,
    tokenizer=tiny_models.byte_tokenizer(),
    weights_digest='d',
    config=engine_config.EngineConfig(
      max_sequences=2, decode_shapes=(2,), page_size=16, num_pages=8,
      chunk_tokens=16, max_chunks=1, max_mixed_chunks=1, constraints=False,
      **layout,
    ),
  )  # fmt: skip
  settings = settings_lib.Settings(
    temperature=0.0, max_tokens=10, logprobs=0, ignore_eos=True
  )
  request = requests.Request(prompt_ids=tuple(_IDS), settings=settings)
  *_, (_, update) = engine.answer([request])
  done = update.completion
  assert done is not None
  assert done.logprobs is not None
  return Answer(list(done.token_ids), [each.chosen for each in done.logprobs])


def check(config: model_config.ModelConfig, params: Any, found: Answer) -> None:
  """Asserts that an answer is the one of the model in floats."""
  tokens = np.asarray([[*_IDS, *found.ids]], np.int32)
  whole = stored_params.whole(params)
  logits, _ = transformer.Transformer(config).apply(whole, tokens)
  logprobs = np.asarray(jax.nn.log_softmax(logits[0, :, :_NUM_IDS]))
  rows = logprobs[len(_IDS) - 1 : -1]
  assert found.ids == rows.argmax(axis=-1).tolist()
  # The bound of floats over devices, see test_engine_matrix.py.
  np.testing.assert_allclose(found.chosen, rows.max(axis=-1), atol=1e-5)
