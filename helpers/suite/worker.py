"""What runs one notebook in a process of its own: `python -m helpers.suite.worker ARGUMENTS`, JSON for papermill.

papermill's own command line reads parameters as YAML, where 1e-05 is a text. And it would go on for hours after its
runner is killed; this process interrupts itself, so that the kernel ends with it.
"""

import json
import os
import signal
import sys
import threading
import time


def main(arguments: str) -> None:
    """Execute a notebook; the JSON holds the arguments of `papermill.execute_notebook`.

    Its kernel's threads wait asleep, unless the user has said how. By default they spin, and where anything else runs,
    each keeps the one it waits for from its core: a training step with two threads then takes many times as long.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # is read when torch is loaded
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    sys.modules["rfc3987_syntax"] = None  # jsonschema goes without; building its grammar takes longer than all the rest
    import papermill

    papermill.execute_notebook(**json.loads(arguments))


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":
    main(sys.argv[1])
