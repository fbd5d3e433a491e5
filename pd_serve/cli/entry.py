"""The script `pd-serve`. An interrupt during its imports ends it as any later one does."""

import os


def main() -> None:
    """Runs the command line."""
    try:
        from pd_serve.cli.main import main as command_line
    except KeyboardInterrupt:
        os._exit(130)  # as the shell expects of an interrupted command
    command_line()
