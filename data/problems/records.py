"""Problems as records of training data.

    text        {"text": "QUESTION\\nLINES\\n#### ANSWER"}
    chat        {"messages": [user, assistant]}
    pairs       {"prompt": [user], "chosen": [...], "rejected": [...], "margin"}
    labelled    {"prompt": [user], "completion": [...], "label": true | false}
    questions   {"question", "answer"}, the format of `--eval=gsm8k:FILE`

Every record has the `id` of its problem, and all but `questions` its `family`
and `level`. The margin is the share of the lines of the chosen solution that
the rejected one does not have.
"""

from typing import Any

from data.problems import draws as draws_lib, generator, problem

Record = dict[str, Any]


def make(settings: generator.Settings, split: str) -> list[Record]:
  """Returns `settings.count` records of a split, of different problems.

  Raises:
    ValueError: there is no such split, or there are not as many problems.
  """
  return [of(made, settings) for made in generator.make(settings, split)]


def of(made: problem.Problem, settings: generator.Settings) -> Record:
  """Returns the record of a problem."""
  right = made.solution()
  named = {'id': made.id, 'family': made.family, 'level': made.level}
  if settings.kind == 'text':
    return {'text': f'{made.question}\n{right.text}', **named}
  if settings.kind == 'questions':
    return {'question': made.question, 'answer': right.text, 'id': made.id}
  prompt = [_message('user', made.question)]
  # Drawn by the question, so that a record does not depend on earlier records.
  draws = draws_lib.Draws(settings.seed, 'mistake', made.question)
  share = draws.share()
  is_right = share < 0.5  # read by the kind labelled
  if settings.kind == 'chat' and share >= settings.wrong / 100:
    return {'messages': [*prompt, _said(right)], **named}
  difficulty = draws.pick(settings.difficulties)
  wrong, margin = made.wrong_solution(difficulty, draws)
  if settings.kind == 'chat':
    return {'messages': [*prompt, _said(wrong)], **named}
  if settings.kind == 'pairs':
    return {
      'prompt': prompt,
      'chosen': [_said(right)],
      'rejected': [_said(wrong)],
      'margin': round(margin, 4),
      **named,
    }
  said = _said(right if is_right else wrong)
  return {'prompt': prompt, 'completion': [said], 'label': is_right, **named}


def _said(solution: problem.Solution) -> dict[str, str]:
  return _message('assistant', solution.text)


def _message(role: str, text: str) -> dict[str, str]:
  return {'role': role, 'content': text}
