"""The terminal of a run: a progress bar, or a line per report."""

import rich.console
import rich.progress

_BARS = '▁▂▃▄▅▆▇█'


def sparkline(values: list[float], width: int = 60) -> str:
  """Returns the values as one line of bars, averaged into `width` buckets."""
  if not values:
    return ''
  width = min(width, len(values))
  edges = [round(i * len(values) / width) for i in range(width + 1)]
  means = [
    sum(values[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)
  ]
  low, high = min(means), max(means)
  span = (high - low) or 1.0
  return ''.join(
    _BARS[round((mean - low) / span * (len(_BARS) - 1))] for mean in means
  )


class Terminal:
  """A progress bar on a terminal, plain lines elsewhere."""

  def __init__(self, console: rich.console.Console, *, num_steps: int):
    self._console = console
    self._num_steps = num_steps
    self._bar = rich.progress.Progress(
      rich.progress.TextColumn('step {task.completed}/{task.total}'),
      rich.progress.BarColumn(bar_width=20),
      rich.progress.TextColumn('{task.fields[text]}'),
      console=console,
      transient=True,
      refresh_per_second=4,
      disable=not console.is_terminal,
    )
    self._task = self._bar.add_task('', total=num_steps, text='compiling')

  def __enter__(self) -> 'Terminal':
    self._bar.start()
    return self

  def __exit__(self, *exception) -> None:
    self._bar.stop()

  def update(self, step: int, loss: float, speed: dict[str, float]) -> None:
    """Shows the progress of the run; speed is empty while it is unknown."""
    parts = [f'loss {loss:.4f}']
    if speed:
      left = (self._num_steps - step) * speed['seconds_per_step']
      parts += [
        f'{speed["tokens_per_s"]:,.0f} tokens/s',
        f'MFU {speed["mfu"]:.1%}',
      ]
      if 'positions_mfu' in speed:
        parts[1] += f' ({speed["positions_per_s"]:,.0f} with padding)'
        parts[2] += f' ({speed["positions_mfu"]:.1%} with padding)'
      parts += [
        f'goodput {speed["goodput"]:.0%}',
        f'{_duration(left)} left',
      ]
    text = ' | '.join(parts)
    self._bar.update(self._task, completed=step, text=text)
    if not self._console.is_terminal:
      self.say(f'step {step}/{self._num_steps} | {text}')

  def say(self, text: str) -> None:
    """Prints a line that stays."""
    self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def _duration(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f'{hours}h{minutes:02d}m'
  return f'{minutes}m{seconds:02d}s'
