"""Scores and samples through the engine, against the model itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evals import ports
from inference import model_port
from models import transformer


def _logprobs(generator, ids):
  """Returns the log-softmax after each of `ids`, in float64."""
  model_config = generator.engine.model_config
  model = transformer.Transformer(model_config)
  padded_1T = np.zeros((1, model_config.max_length), np.int32)
  padded_1T[0, : len(ids)] = ids
  logits_1TV, _ = jax.jit(model.apply)(
    generator.engine.params, jnp.asarray(padded_1T)
  )
  logits_TV = np.asarray(logits_1TV[0, : len(ids), :259], np.float64)
  return logits_TV - np.logaddexp.reduce(logits_TV, axis=-1, keepdims=True)


def test_scores_are_those_of_the_full_forward(generator):
  rng = np.random.default_rng(0)
  length = generator.engine.model_config.max_length
  pairs = [
    ([256], [97]),
    ([256, 1, 2], [3, 4, 5]),
    # One token more than the context: the last one is only predicted.
    (rng.integers(0, 256, length - 19).tolist(), [9] * 20),
    (rng.integers(0, 256, 33).tolist(), rng.integers(0, 256, 2).tolist()),
  ]
  scores = model_port.scorer(generator.engine)(pairs)
  for (context, continuation), score in zip(pairs, scores, strict=True):
    ids = [*context, *continuation]
    expected_TV = _logprobs(generator, ids[:-1])[len(context) - 1 :]
    expected = np.take_along_axis(
      expected_TV, np.asarray(continuation)[:, None], axis=1
    )[:, 0]
    # float32 sums in another order, over a softmax of 259.
    np.testing.assert_allclose(score.token_logprobs, expected, atol=2e-5)
    assert score.logprob == pytest.approx(expected.sum(), abs=1e-4)
    assert score.is_greedy == (expected_TV.argmax(-1) == continuation).all()


def test_the_greedy_continuation_is_told_from_others(generator):
  context = [256, 104, 105]
  best = int(_logprobs(generator, context)[-1].argmax())
  score = model_port.scorer(generator.engine)
  good, bad = score([(context, [best]), (context, [(best + 1) % 259])])
  assert good.is_greedy
  assert not bad.is_greedy
  assert good.logprob > bad.logprob


def test_nothing_is_scored_behind_nothing(generator):
  with pytest.raises(ValueError, match='context of 0 tokens and a contin'):
    model_port.scorer(generator.engine)([([], [1])])


def _wanted(**fields):
  return ports.SampleSettings(max_tokens=6, temperature=1.0, **fields)


@pytest.mark.slow
def test_samples_differ_within_a_call_and_repeat_with_it(generator):
  sample = model_port.sampler(generator.engine, ignore_eos=True)
  prompts = [[256, 97], [256, 97], [256, 98]]
  first = sample(prompts, _wanted(seed=3), 4)
  assert [len(samples) for samples in first] == [4, 4, 4]
  distinct = {each.all_ids for samples in first for each in samples}
  assert len(distinct) == 12  # 6 of 259 tokens: no two alike by chance
  again = sample(prompts, _wanted(seed=3), 4)
  assert [[e.all_ids for e in s] for s in again] == [
    [e.all_ids for e in s] for s in first
  ]
  for prompt, samples in zip(prompts, first, strict=True):
    for each in samples:
      assert each.text == generator.tokenizer.decode(each.ids)
      expected_TV = _logprobs(generator, [*prompt, *each.all_ids])
      expected = expected_TV[
        np.arange(len(each.all_ids)) + len(prompt) - 1, each.all_ids
      ]
      np.testing.assert_allclose(each.logprobs, expected, atol=2e-5)


def test_a_request_that_cannot_be_answered_stops_all_of_them(generator):
  length = generator.engine.model_config.max_length
  with pytest.raises(ValueError, match=f'got {length + 1} tokens'):
    model_port.scorer(generator.engine)([([1], [2]), ([1] * (length + 1), [2])])
  assert not generator.engine.has_work


def test_filters_reach_the_sampler(generator):
  sample = model_port.sampler(generator.engine)
  greedy = ports.SampleSettings(max_tokens=6)
  (first,), (second,) = sample([[256, 97]] * 2, greedy, 1)
  assert first.all_ids == second.all_ids
  (third,), (fourth,) = sample(
    [[256, 97]] * 2, _wanted(filters={'top_k': 1}), 1
  )
  assert first.all_ids == third.all_ids == fourth.all_ids
