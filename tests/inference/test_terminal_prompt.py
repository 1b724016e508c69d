"""One prompt in the terminal; `tests/test_serve.py` runs the command."""

import types

from inference import terminal_prompt


def test_special_tokens_in_a_text_prompt_are_warned_of():
  generator = types.SimpleNamespace(
    warning=lambda prompt: f'prompt: {prompt} is odd',
    prompt_ids=lambda prompt: (1, 2),
    settings_for=lambda ids, **chosen: (ids, chosen),
  )
  warnings = []
  asked = terminal_prompt.asked(
    generator, 'a', {'top_k': 3}, warn=warnings.append
  )
  assert asked == ((1, 2), ((1, 2), {'top_k': 3}))
  assert warnings == ['warning: prompt: a is odd']
