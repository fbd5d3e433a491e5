"""The script `pd-serve`, interrupted while it imports its commands."""

import subprocess
import sys

INTERRUPTED = """
import sys
from pd_serve.cli.entry import main

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "pd_serve.cli.main":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupt())
main()
"""


def test_an_interrupt_during_the_imports_is_no_traceback() -> None:
    ended = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True)

    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")


def test_the_script_runs_the_command_line() -> None:
    code = "import sys; sys.argv[1:] = ['--version']; from pd_serve.cli.entry import main; main()"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith("pd-serve ")
