"""The generator: prompts, settings, streams side by side.

What the engine makes of them is the business of its own tests.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from inference import generate
from inference.sampling import settings as settings_lib
from models import transformer
from tests.helpers import frozen_dirs

_GREEDY = settings_lib.Settings(temperature=0.0, max_tokens=10)
_PROMPTS = ['def', '', 'longer than others', 'é']


def test_greedy_tokens_are_the_full_forwards(generator):
  (completion,) = generator.generate(['hello'], _GREEDY)
  ids = [*generator.prompt_ids('hello'), *completion.token_ids]
  model = transformer.Transformer(generator.frozen.config)
  logits_1TV, _ = model.apply(
    generator.engine.params, jnp.asarray([ids], jnp.int32)
  )
  # Ids beyond the tokenizer's are never sampled.
  choice_T = np.argmax(logits_1TV[0, :, :259], axis=-1)
  assert completion.token_ids == choice_T[5 : len(ids) - 1].tolist()
  assert len(completion.token_ids) == 10
  assert completion.num_completion_tokens == 10
  assert completion.num_prompt_tokens == 6
  assert completion.finish_reason == 'length'


@pytest.mark.parametrize(
  'settings',
  [_GREEDY, dataclasses.replace(_GREEDY, temperature=1.0, top_k=9, seed=5)],
)
def test_a_batch_answers_as_each_prompt_alone(generator, settings):
  together = generator.generate(_PROMPTS, settings)
  for prompt, completion in zip(_PROMPTS, together, strict=True):
    (alone,) = generator.generate([prompt], settings)
    assert completion.token_ids == alone.token_ids
    assert completion.text == alone.text


def test_each_prompt_may_have_settings_of_its_own(generator):
  sampled = dataclasses.replace(_GREEDY, temperature=1.0, seed=3, max_tokens=4)
  greedy, other = generator.generate(['abc', 'abc'], [_GREEDY, sampled])
  assert greedy.token_ids == generator.generate(['abc'], _GREEDY)[0].token_ids
  assert other.token_ids == generator.generate(['abc'], sampled)[0].token_ids
  assert (len(greedy.token_ids), len(other.token_ids)) == (10, 4)


def test_a_seed_reproduces_and_a_drawn_one_is_reported(generator):
  settings = settings_lib.Settings(max_tokens=10)
  (drawn,) = generator.generate(['abc'], settings)
  (other,) = generator.generate(['abc'], settings)
  assert drawn.seed != other.seed  # equal once in 2**53 runs
  (again,) = generator.generate(
    ['abc'], dataclasses.replace(settings, seed=drawn.seed)
  )
  assert again.token_ids == drawn.token_ids


def test_stream_pieces_join_to_the_completion(generator):
  settings = settings_lib.Settings(seed=1, max_tokens=40)
  *pieces, completion = generator.stream('abc', settings)
  assert len(pieces) > 3
  assert ''.join(pieces) == completion.text
  assert completion.text == generator.tokenizer.decode(completion.token_ids)
  (whole,) = generator.generate(['abc'], settings)
  assert whole.token_ids == completion.token_ids


def test_a_stop_string_ends_the_text_before_it(generator):
  (free,) = generator.generate(['hello'], _GREEDY)
  stop = free.text[3:5]
  settings = dataclasses.replace(_GREEDY, stop=('never', stop))
  *pieces, completion = generator.stream('hello', settings)
  assert completion.finish_reason == 'stop'
  assert completion.text == free.text[: free.text.index(stop)]
  assert ''.join(pieces) == completion.text
  # The tokens of the stop string were sampled: they are counted.
  assert completion.token_ids == free.token_ids[: len(completion.token_ids)]
  assert len(completion.token_ids) > len(completion.text.encode())


def test_n_completions_of_each_prompt_come_in_order(generator):
  settings = settings_lib.Settings(n=3, seed=7, max_tokens=5)
  several = generator.generate(['ab', 'c'], settings)
  seeds = [settings_lib.sample_seed(7, index) for index in range(3)]
  assert [completion.seed for completion in several] == seeds * 2
  one = dataclasses.replace(settings, n=1, seed=seeds[1])
  assert several[1].text == generator.generate(['ab'], one)[0].text
  assert several[4].text == generator.generate(['c'], one)[0].text
  with pytest.raises(ValueError, match='n: got 3, expected 1 in a stream'):
    generator.stream('ab', settings)


def test_a_text_prompt_gets_bos_and_ids_are_taken_verbatim(generator):
  assert generator.prompt_ids('ab') == (256, 97, 98)
  assert generator.prompt_ids('') == (256,)
  assert generator.prompt_ids([97, 98]) == (97, 98)
  by_text, by_ids = generator.generate(['ab', [256, 97, 98]], _GREEDY)
  assert by_text.token_ids == by_ids.token_ids


def test_a_model_that_never_saw_bos_gets_none(generator, monkeypatch):
  manifest = dataclasses.replace(generator.frozen.manifest, has_bos=False)
  without_bos = dataclasses.replace(generator.frozen, manifest=manifest)
  monkeypatch.setattr(generator, 'frozen', without_bos)
  assert generator.prompt_ids('ab') == (97, 98)
  assert generator.prompt_ids('') == (256,)


@pytest.mark.parametrize(
  ('prompt', 'message'),
  [
    ([], 'prompt: got no token ids, expected at least one'),
    ([1, 259], 'prompt: got token id 259, expected 0 <= id < 259'),
    ([-1], 'prompt: got token id -1'),
    ('x' * 55, 'got 56 tokens and 10 to generate, expected at most 64'),
    ('x' * 64, 'got 65 tokens and 10 to generate, expected at most 64'),
  ],
)
def test_a_prompt_that_cannot_be_answered_is_refused(
  generator, prompt, message
):
  # At the call, before the first update is requested.
  with pytest.raises(ValueError, match=message):
    generator.updates([prompt], _GREEDY)
  with pytest.raises(ValueError, match=message):
    generator.stream(prompt, _GREEDY)


def test_a_prompt_may_fill_the_context(generator):
  (completion,) = generator.generate(['x' * 53], _GREEDY)
  assert len(completion.token_ids) == 10
  unlimited = dataclasses.replace(_GREEDY, max_tokens=None)
  (completion,) = generator.generate(['x' * 53], unlimited)
  assert len(completion.token_ids) == 10


def test_prompts_of_all_lengths_may_fill_the_context_together(generator):
  unlimited = dataclasses.replace(_GREEDY, max_tokens=None)
  prompts = ['x' * 60, 'y']
  together = generator.generate(prompts, unlimited)
  assert [len(completion.token_ids) for completion in together] == [3, 62]
  for prompt, completion in zip(prompts, together, strict=True):
    (alone,) = generator.generate([prompt], unlimited)
    assert completion.token_ids == alone.token_ids


def test_prompts_and_settings_are_counted(generator):
  with pytest.raises(ValueError, match='got 0 prompts and 0 settings'):
    generator.generate([], _GREEDY)
  with pytest.raises(ValueError, match='got 1 prompts and 2 settings'):
    generator.generate(['a'], [_GREEDY, _GREEDY])


def test_recommended_length_yields_to_the_context_a_chosen_one_does_not(
  generator,
):
  assert generator.settings_for('x').max_tokens == 12
  assert generator.settings_for('x').temperature == 0.9
  assert generator.settings_for('x', temperature=0.0).temperature == 0.0
  assert generator.settings_for('x' * 60).max_tokens is None
  assert generator.settings_for('x' * 60, max_tokens=12).max_tokens == 12


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
  config = frozen_dirs.config(vocab_size=100)
  frozen_dirs.write(tmp_path / 'small', config=config)
  with pytest.raises(ValueError, match='got a tokenizer of 259 ids, expected'):
    generate.load(tmp_path / 'small')


def test_more_prompts_than_may_wait_are_all_answered(generator, monkeypatch):
  config = dataclasses.replace(generator.engine.config, max_waiting=2)
  monkeypatch.setattr(generator.engine, 'config', config)
  settings = dataclasses.replace(_GREEDY, max_tokens=2)
  prompts = [f'{index}' for index in range(9)]
  together = generator.generate(prompts, settings)
  assert len(together) == 9
  assert together[8].text == generator.generate(['8'], settings)[0].text
  # One of three sequences is larger than the queue will ever be.
  with pytest.raises(
    ValueError, match='got 3 completions to make, expected at'
  ):
    generator.generate(['a'], dataclasses.replace(settings, n=3))


def test_nothing_is_compiled_for_a_request(generator):
  metrics = generator.engine.metrics
  before = metrics.value('compilations_after_ready_total')
  sampled = settings_lib.Settings(
    seed=3, top_k=4, top_p=0.9, max_tokens=8, presence_penalty=1.0, logprobs=2
  )
  generator.generate(_PROMPTS, [_GREEDY, sampled, sampled, _GREEDY])
  assert before == metrics.value('compilations_after_ready_total') == 0
  assert generator.engine.compile_seconds > 0


def test_streams_that_are_open_together_lose_nothing(generator):
  settings = dataclasses.replace(_GREEDY, max_tokens=20)
  alone = [generator.generate([p], settings)[0].text for p in ('ab', 'xyz')]
  streams = [generator.stream(prompt, settings) for prompt in ('ab', 'xyz')]
  texts = ['', '']
  for _ in range(6):  # by turns, until one of them is left alone
    for index, stream in enumerate(streams):
      texts[index] += next(stream)
  for index, stream in enumerate(streams):
    *pieces, completion = stream
    assert texts[index] + ''.join(pieces) == completion.text == alone[index]


def test_closing_the_updates_stops_the_work(generator):
  updates = generator.updates(['abc', 'd'], _GREEDY)
  next(updates)
  assert generator.engine.manager.gauges().pages_used > 0
  updates.close()
  assert list(updates) == []
  assert list(generator.engine.run()) == []
  assert generator.engine.manager.gauges().pages_used == 0


def test_generation_leaves_the_weights_as_they_were(generator):
  digest = generator.frozen.manifest.weights_digest
  generator.generate(_PROMPTS, _GREEDY)
  assert generator.weights_digest() == digest
