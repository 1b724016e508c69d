"""The options of an evaluation: every field is a flag of serve.py.

Imports nothing heavy, so that `serve.py --help` need not wait for SciPy.
"""

import dataclasses
import math

from checks import expect, flag_field


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """The settings of an evaluation; a task names the fields that it reads.

  Raises:
    ValueError: a value is out of range.
  """

  limit: int = flag_field.field(
    0,
    'Evaluates only this many first examples, for perplexity pieces of 4096'
    ' bytes of text; 0 takes all. Set it for a quick look.',
  )
  stride: int = flag_field.field(
    0,
    'perplexity: tokens that each window adds; 0 is half of the context. Lower'
    ' it to give each token more context, which takes longer.',
  )
  num_fewshot: int | None = flag_field.field(
    None,
    'gsm8k and lm_eval: solved examples in front of each question. If not'
    ' given: none, or the default of the lm_eval task.',
  )
  fewshot_path: str = flag_field.field(
    '',
    'gsm8k: file of the solved examples, in the format of the task. Needed with'
    ' num_fewshot.',
    is_path=True,
  )
  max_tokens: int = flag_field.field(
    512,
    'generate, gsm8k, verify and judge: most tokens of a completion. Tasks of'
    ' lm_eval have their own.',
  )
  temperature: float = flag_field.field(
    0.0,
    'generate, gsm8k, verify and judge: divides the logits before sampling; 0'
    ' is greedy. Tasks of lm_eval have their own.',
  )
  num_samples: int = flag_field.field(
    1,
    'generate, gsm8k and verify: completions per prompt, for pass@k. More than'
    ' 1 needs a temperature above 0.',
  )
  seed: int = flag_field.field(
    0, 'Seed of the samples, and of the random draws of lm_eval.'
  )
  chat: bool = flag_field.field(
    False,
    "generate, gsm8k, verify and lm_eval: puts each prompt into the model's"
    ' chat template. Set it for models that were trained on chats.',
  )

  def __post_init__(self):
    for name, least in (
      ('limit', 0),
      ('stride', 0),
      ('num_fewshot', 0),
      ('max_tokens', 1),
      ('num_samples', 1),
      ('seed', 0),
    ):
      if (value := getattr(self, name)) is not None:
        expect.at_least(name, value, least)
    if self.seed >= 2**32:
      raise ValueError(
        f'seed: got {self.seed}, expected below {2**32}, as NumPy needs it'
      )
    if not 0 <= self.temperature < math.inf:
      raise ValueError(
        f'temperature: got {self.temperature}, expected a number >= 0'
      )
