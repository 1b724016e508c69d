"""The tokenizer over HTTP, in vLLM's shapes, for lm-eval's remote mode.

    GET  /tokenizer_info   strings of the special tokens, and the chat template
    POST /tokenize         {'prompt': text} to {'tokens': ids}
    POST /detokenize       {'tokens': ids} to {'prompt': text}

The name of a special token in a prompt is plain text, so that no user can forge
the end of a document. Clients of these routes know special tokens by name and
ask for the id of a name. So /tokenize returns the id of a special token if the
whole text is a string that /tokenizer_info lists, and `add_special_tokens` is
false.
"""

from typing import Any

from inference import generate
from inference.server.api import errors, tokenizer_schema

_NAMES = 'bos_token', 'eos_token', 'pad_token'


def info(generator: generate.Generator) -> dict[str, Any]:
  """Returns the body of /tokenizer_info."""
  return {
    'tokenizer_class': generator.tokenizer.kind,
    'vocab_size': generator.tokenizer.vocab_size,
    'model_max_length': generator.engine.context,
    **dict.fromkeys(_NAMES),
    **{name: text for name, (text, _) in _special_tokens(generator).items()},
    'chat_template': generator.frozen.chat_template or None,
  }


def tokenize(
  generator: generate.Generator, body: tokenizer_schema.TokenizeRequest
) -> dict[str, Any]:
  """Returns the ids of a text.

  Raises:
    ApiError: status 400, the text is missing, or cannot be encoded.
  """
  text = body.text()
  ids_by_text = dict(_special_tokens(generator).values())
  try:
    if body.add_special_tokens:
      ids = list(generator.prompt_ids(text))
    elif text in ids_by_text:
      ids = [ids_by_text[text]]
    else:
      ids = generator.tokenizer.encode(text)
  except ValueError as error:
    raise errors.invalid('prompt', str(error)) from error
  return {
    'tokens': ids,
    'count': len(ids),
    'max_model_len': generator.engine.context,
  }


def detokenize(
  generator: generate.Generator, body: tokenizer_schema.DetokenizeRequest
) -> dict[str, Any]:
  """Returns the text of ids.

  Raises:
    ApiError: status 400, an id is outside the vocabulary.
  """
  most = generator.tokenizer.vocab_size
  for token_id in body.tokens:
    if not 0 <= token_id < most:
      raise errors.invalid(
        'tokens', f'got token id {token_id}, expected 0 <= id < {most}'
      )
  return {'prompt': generator.tokenizer.decode(body.tokens)}


def _special_tokens(
  generator: generate.Generator,
) -> dict[str, tuple[str, int]]:
  """Returns the strings and ids of the special tokens, by name.

  The strings are the model's own, as its chat template has them. Bytes have no
  special tokens with strings: there `<|NAME|>` stands for the id.
  """
  tokenizer = generator.tokenizer
  if not tokenizer.special_tokens:
    ids = tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id
    return {
      name: (f'<|{name}|>', token_id)
      for name, token_id in zip(_NAMES, ids, strict=True)
    }
  # An EOS that only generation_config.json names is listed, too.
  texts = {i: text for text, i in tokenizer.special_tokens.items()}
  named = {'eos_token': texts.get(tokenizer.eos_id, ''), **tokenizer.names}
  return {
    name: (text, tokenizer.special_tokens[text])
    for name, text in named.items()
    if text in tokenizer.special_tokens
  }
