"""Byte-level byte-pair encoding, learnt from the documents of a run.

Text is split by GPT-2's regular expression. The UTF-8 bytes of each part are
joined to tokens by the learnt merges. There is no normalizer and
every byte has an id, so that every string has ids and decodes to itself.

The result is a `tokenizer.json`, which `text/hf_tokenizer.py` reads like the
file of an open model. Its config has the kind 'bpe' and names the special
tokens:

    {"kind": "bpe", "special_tokens": {"bos": "<|bos|>", ...}}

References: Sennrich et al. 2016 (arXiv:1508.07909); Radford et al. 2019
(GPT-2), which works on bytes and whose split is used here.
"""

from collections.abc import Iterable
import json

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from checks import expect
from text import hf_files, hf_tokenizer

SPECIAL_TOKENS = {'bos': '<|bos|>', 'eos': '<|eos|>', 'pad': '<|pad|>'}
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)


def train(
  texts: Iterable[str], vocab_size: int
) -> hf_tokenizer.HuggingFaceTokenizer:
  """Returns a tokenizer with at most `vocab_size` ids, learnt from `texts`.

  Deterministic: the same texts give the same vocabulary. It is smaller than
  `vocab_size` only if the texts have too few pairs to merge.

  Raises:
    ValueError: `vocab_size` cannot hold every byte and the special tokens.
  """
  expect.at_least(
    'tokenizer.vocab_size',
    vocab_size,
    MIN_VOCAB_SIZE,
    f'256 bytes and {len(SPECIAL_TOKENS)} special tokens need an id each',
  )
  model = tokenizers.Tokenizer(models.BPE())
  # use_regex is GPT-2's split: contractions, letters, digits, punctuation,
  # each with at most one leading space, and runs of white space.
  model.pre_tokenizer = pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=True
  )
  model.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=list(SPECIAL_TOKENS.values()),
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  model.train_from_iterator(texts, trainer)
  config = {'kind': hf_files.TRAINED, 'special_tokens': SPECIAL_TOKENS}
  return hf_tokenizer.HuggingFaceTokenizer(
    {
      hf_files.MODEL: model.to_str(pretty=True).encode(),
      hf_files.CONFIG: json.dumps(config).encode(),
    }
  )
