"""The tokenizer over HTTP, in vLLM's shapes, as lm-eval's remote mode asks it.

    GET  /tokenizer_info   names of the special tokens, and the chat template
    POST /tokenize         {'prompt': text} to {'tokens': ids}
    POST /detokenize       {'tokens': ids} to {'prompt': text}

The name of a special token in a prompt is plain text, so that no user can forge
the end of a document. Clients of these routes know special tokens by name and
ask for the id of a name. So /tokenize returns the id of a special token if the
whole text is a name that /tokenizer_info lists, and `add_special_tokens` is
false.
"""

from typing import Any

from inference import generate
from inference.server import schema


def info(generator: generate.Generator) -> dict[str, Any]:
  """Returns the body of /tokenizer_info."""
  return {
    'tokenizer_class': generator.tokenizer.kind,
    'vocab_size': generator.tokenizer.vocab_size,
    'model_max_length': generator.engine.context,
    **{name: f'<|{name}|>' for name in _special_ids(generator)},
    'chat_template': generator.frozen.chat_template or None,
  }


def tokenize(
  generator: generate.Generator, body: schema.TokenizeRequest
) -> dict[str, Any]:
  """Returns the ids of a text.

  Raises:
    ApiError: status 400, the text is missing, or cannot be encoded.
  """
  text = body.text()
  names = {f'<|{name}|>': i for name, i in _special_ids(generator).items()}
  try:
    if body.add_special_tokens:
      ids = list(generator.prompt_ids(text))
    elif text in names:
      ids = [names[text]]
    else:
      ids = generator.tokenizer.encode(text)
  except ValueError as error:
    raise schema.invalid('prompt', str(error)) from error
  return {
    'tokens': ids,
    'count': len(ids),
    'max_model_len': generator.engine.context,
  }


def detokenize(
  generator: generate.Generator, body: schema.DetokenizeRequest
) -> dict[str, Any]:
  """Returns the text of ids.

  Raises:
    ApiError: status 400, an id is outside the vocabulary.
  """
  most = generator.tokenizer.vocab_size
  for token_id in body.tokens:
    if not 0 <= token_id < most:
      raise schema.invalid(
        'tokens', f'got token id {token_id}, expected 0 <= id < {most}'
      )
  return {'prompt': generator.tokenizer.decode(body.tokens)}


def _special_ids(generator: generate.Generator) -> dict[str, int]:
  tokenizer = generator.tokenizer
  return {
    'bos_token': tokenizer.bos_id,
    'eos_token': tokenizer.eos_id,
    'pad_token': tokenizer.pad_id,
  }
