"""`python -m mlx_forget.engines.guard PARENT COMMAND...` becomes COMMAND, which the kernel terminates when its parent has died (Linux).

For launchers that do not look after their parent themselves. The wish survives `exec`; a parent that died before it is noticed here.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit(128 + signal.SIGTERM)
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
