"""Limit of a process's open files."""

import resource

#: What a process with many peers needs: two descriptors for each connection of ZeroMQ and of UCX.
MOST = 65_536


def allow_many_open_files() -> None:
    """Raises this process's limit as far as it may. Shells often start programs with 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = MOST if hard == resource.RLIM_INFINITY else min(MOST, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
