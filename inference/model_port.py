"""The model port: functions that evaluations and rollouts call.

    score = model_port.scorer(engine)
    logprobs = score([(context_ids, continuation_ids), ...])

Both functions use the engine that serves, so evaluations and on-policy RL get
the same answers as clients. `evals.ports` has the contracts.
"""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np

from evals import encoding, judges, ports
from inference import chat_prompts, generate, terminal_chat
from inference.engine import engine as engine_lib
from inference.requests import requests as requests_lib
from inference.sampling import settings as settings_lib
from models.layers import reward_head
from text import chat
from text.replies import fitting, turns

# The engine needs a token after a prompt. It takes this id without sampling.
_UNREAD = settings_lib.Settings(temperature=0.0, max_tokens=1)


def evaluated(generator: generate.Generator) -> ports.Model:
  """Returns the model that evaluations measure: the engine that serves."""
  manifest, engine = generator.frozen.manifest, generator.engine
  adapter = {}
  if digest := generator.adapter_digest:
    adapter = {'adapter_digest': digest}

  def encode_chat(messages):
    prompt, _ = terminal_chat.render(generator, messages)
    return list(generator.prompt_ids(prompt))

  def render_chat(messages, *, add_generation_prompt):
    conversation = chat.Conversation(
      messages=messages, add_generation_prompt=add_generation_prompt
    )
    return chat_prompts.render(generator, conversation).text

  functions: dict[str, Any] = {
    'logprob_fn': scorer(engine, digest),
    # Several ids may end a text; the tokenizer knows only one as its EOS.
    'sample_fn': sampler(engine, digest, stop_ids=generator.defaults.stop_ids),
  }
  if manifest.heads:  # it predicts no tokens
    functions = {
      'reward_fn': rewarder(generator),
      'encode_answer': functools.partial(encode_answer, generator),
    }
  return ports.Model(
    **functions,
    tokenizer=generator.tokenizer,
    max_length=engine.context,
    adds_bos=manifest.has_bos,
    encode_prompt=encoding.naming_special_tokens(generator.tokenizer),
    render_chat=render_chat if generator.frozen.chat_template else None,
    encode_chat=encode_chat,
    description={
      'experiment': manifest.name,
      'weights_digest': manifest.weights_digest,
      'dtype': manifest.dtype,
      'step': manifest.step,
      **adapter,
    },
  )


def scorer(engine: engine_lib.Engine, adapter: str = '') -> ports.LogprobFn:
  """Returns a function that scores continuations of contexts, in order.

  The function raises ValueError for an empty context or continuation, and for
  a pair of more tokens than the model's context plus one: the last token is
  predicted and never read.

  Args:
    engine: the engine that computes.
    adapter: digest of a loaded adapter; '': the base.
  """
  settings = settings_lib.Settings(
    temperature=0.0, max_tokens=1, logprobs=1, prompt_logprobs=1
  )

  def score(
    pairs: Sequence[tuple[ports.Ids, ports.Ids]],
  ) -> list[ports.Logprobs]:
    requests = []
    for context, continuation in pairs:
      if not len(context) or not len(continuation):
        raise ValueError(
          f'scoring: got a context of {len(context)} tokens and a continuation'
          f' of {len(continuation)}, expected at least one of each; put BOS in'
          ' front'
        )
      *read, target = (*context, *continuation)
      requests.append(
        requests_lib.Request(
          prompt_ids=tuple(map(int, read)),
          target=int(target),
          settings=settings,
          adapter=adapter,
        )
      )
    answers = answer_all(engine, requests)
    return [
      _logprobs(completion, len(continuation))
      for (completion,), (_, continuation) in zip(answers, pairs, strict=True)
    ]

  return score


def sampler(
  engine: engine_lib.Engine, adapter: str = '', **fixed: Any
) -> ports.SampleFn:
  """Returns a function that completes prompts, several times each.

  Samples of one call differ from each other, even where prompts are the same.
  Another call with the same seed returns the same samples.
  """

  def sample(
    prompts: Sequence[ports.Ids],
    settings: ports.SampleSettings,
    num_samples: int,
  ) -> list[list[ports.Completion]]:
    common = settings_lib.Settings(
      **settings.filters,
      **fixed,
      temperature=settings.temperature,
      max_tokens=settings.max_tokens,
      stop=settings.stop,
      n=num_samples,
      logprobs=0,
    )
    requests = [
      requests_lib.Request(
        prompt_ids=tuple(map(int, prompt)),
        settings=dataclasses.replace(
          common,
          # Two numbers: with one, the seed would be a sample seed of prompt 0.
          seed=settings_lib.folded_seed(settings.seed, index, 0),
        ),
        adapter=adapter,
      )
      for index, prompt in enumerate(prompts)
    ]
    return [
      [_sample(completion) for completion in completions]
      for completions in answer_all(engine, requests)
    ]

  return sample


def rewarder(generator: generate.Generator) -> ports.RewardFn:
  """Returns a function from the ids of answers to their rewards.

  Answers are prompts of the engine, which computes them together, in chunks,
  and a common beginning once. The head is the same function as in training. It
  reads the hidden state of the last token, after the final norm.

  Raises:
    ValueError: the generator holds no reward model.
  """
  if reward_head.NAME not in generator.frozen.manifest.heads:
    raise ValueError(
      f'model: got {generator.frozen.directory}, a language model, expected a'
      ' reward model; train one with experiments/reward.py'
    )

  def score(answers: Sequence[ports.Ids]) -> list[float]:
    if not answers:
      return []
    completions = answer_all(
      generator.engine,
      [
        requests_lib.Request(
          prompt_ids=tuple(map(int, ids)),
          settings=_UNREAD,
          target=0,
          pooling='last',
        )
        for ids in answers
      ],
    )
    states_BD = jnp.asarray([each.pooled_D for (each,) in completions])
    head = generator.heads[reward_head.NAME]
    return np.asarray(reward_head.rewards(head, states_BD)).tolist()

  return score


def encode_answer(
  generator: generate.Generator, prompt: judges.Prompt, answer: str
) -> tuple[int, ...]:
  """Returns the ids of an answer with its prompt, as training has them.

  Args:
    generator: has the tokenizer and the chat template.
    prompt: messages, or the text of one message of the user.
    answer: the text of the assistant. The last id is its stop token.

  Raises:
    ValueError: the chat template refuses the conversation.
  """
  if isinstance(prompt, str):
    prompt = [{'role': 'user', 'content': prompt}]
  messages = [*prompt, {'role': 'assistant', 'content': answer}]
  tokenizer, frozen = generator.tokenizer, generator.frozen
  template = turns.of(tokenizer, frozen.chat_template)
  found = turns.find(
    template,
    fitting.fitted(messages, template.style),
    untrained=range(len(prompt)),
  )
  has_bos = frozen.manifest.has_bos
  ids, _ = turns.encode(tokenizer, template, found, has_bos=has_bos)
  return tuple(ids)


def answer_all(
  engine: engine_lib.Engine, requests: Sequence[requests_lib.Request]
) -> list[list[requests_lib.Completion]]:
  """Returns the n completions of each request.

  Raises:
    ValueError: a request could never be answered; raised before any work.
    NotFinite: the model computed numbers that are not finite.
  """
  answers: list[list[Any]] = [[None] * each.settings.n for each in requests]
  for which, update in engine.answer(requests):
    if update.completion:
      update.completion.check()
      answers[which][update.index] = update.completion
  return answers


def _logprobs(
  completion: requests_lib.Completion, length: int
) -> ports.Logprobs:
  read, target = completion.prompt_logprobs or [], completion.logprobs or []
  # The first token of a prompt has no log-probability. It is never part of a
  # continuation, since a context has at least one token.
  found = [each for each in (*read, *target)[-length:] if each]
  token_logprobs = np.asarray([each.chosen for each in found], np.float32)
  return ports.Logprobs(
    # In float64: a float32 sum over a long text would lose digits.
    logprob=float(token_logprobs.sum(dtype=np.float64)),
    is_greedy=all(each.chosen >= each.values[0] for each in found),
    token_logprobs=token_logprobs,
  )


def _sample(completion: requests_lib.Completion) -> ports.Completion:
  assert completion.logprobs is not None
  ids = tuple(completion.token_ids)
  return ports.Completion(
    text=completion.text,
    ids=ids[: completion.num_text_ids],
    all_ids=ids,
    logprobs=np.asarray(
      [each.chosen for each in completion.logprobs], np.float32
    ),
  )
