"""Lower priority for threads other than the event loop's.

The event loop has little to do for each client, and all clients wait for it.
Text work, the engine and XLA can keep every core busy, and the event loop would
queue for a core with them.
"""

import os
import sys
import threading

# About 2.5 times less of a core. With much less, a thread that holds Python's
# lock gets no core to release it on, and the event loop waits longer.
_NICE = 4


def lower() -> None:
  """Lowers the priority of this thread, and of threads that it will start."""
  if sys.platform == 'linux':  # elsewhere only processes have priorities
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice + _NICE)
