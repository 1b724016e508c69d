"""What `train.py` exits with, for people, supervisors and schedulers.

    0        complete
    1, 2     the user's to change: flags, experiment, workdir, data; and what
             argparse and the shell use for wrong usage
    3        a loss was not finite: every attempt would find the same
    4        supervised: died of the same step again and again
    70       an unexpected exception, told with its traceback (EX_SOFTWARE)
    75       try again, perhaps elsewhere: another process of the run failed,
             the disk is full, another run holds the workdir, or the supervisor
             ran out of restarts (EX_TEMPFAIL)
    128 + n  ended by signal n. 143 and 130: SIGTERM and Ctrl-C asked it to
             stop, and everything is saved

1 to 4 need a person, and starting again repeats them. From 64 up, the same
command goes on from the last checkpoint, so a scheduler may requeue:

    Slurm        in the batch script, after srun:
                   code=$?; [ $code -ge 64 ] && scontrol requeue $SLURM_JOB_ID
                 or RequeueExit=70,75,143 in slurm.conf. A preempted job is
                 requeued by itself if submitted with --requeue.
    Kubernetes   restartPolicy: Never, and two podFailurePolicy.rules with
                 onExitCodes.operator: In: action: FailJob for [1, 2, 3, 4],
                 action: Ignore for [75, 143], so that a preemption does not
                 count towards backoffLimit, and a crash (70, 137, 139) does.

70 and 75 are of sysexits.h. Both leave 128 + n to signals, as shells do.
"""

import signal

COMPLETE = 0
USER_ERROR = 1
USAGE = 2
NON_FINITE = 3
SAME_STEP = 4
CRASHED = 70
TRY_AGAIN = 75

# Whoever asked for it does not want the run started again here.
STOPPED = (128 + signal.SIGTERM, 128 + signal.SIGINT)
FINAL = (COMPLETE, USER_ERROR, USAGE, NON_FINITE, SAME_STEP, *STOPPED)


def of_returncode(returncode: int) -> int:
  """Returns the shell's number for what `subprocess` tells of a child."""
  return 128 - returncode if returncode < 0 else returncode


def name(code: int) -> str:
  """Returns 'SIGKILL' for 137, 'exit code 70' for 70."""
  try:
    return signal.Signals(code - 128).name
  except ValueError:
    return f'exit code {code}'
