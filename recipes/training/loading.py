"""How data comes to the device: by how many processes, and ahead of the step that needs it."""

import os

MOST = 16  # workers of a process: more than that compete for memory rather than load faster


def workers_for(processes: int, *, device: bool) -> int:
    """The loading processes of each of `processes` that share this machine's cores; none where they train on cores."""
    if not device:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST, max(1, cores // processes - 1))  # a core stays with the process itself
