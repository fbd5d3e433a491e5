"""Compiles regexes for outlines in processes of their own, which end when they take too long or too much.

vLLM compiles them in a thread, which goes on when its time has passed: the schema of one request, such as a
text of `maxLength` 1,000,000, may take all memory. Run as a script, this is that process.
"""

import math
import resource
import subprocess
import sys

import outlines_core as oc

#: Most memory of a process that compiles a regex, in bytes of address space.
MEMORY_BYTES = 2 << 30

#: Length of the regex's length, which comes first.
_PREFIX = 8


def compile_index(regex: str, vocabulary: oc.Vocabulary, seconds: float) -> oc.Index:
    """Compiles a regex.

    Args:
        seconds: How long that may take; 0 for any time.

    Raises:
        ValueError: It takes longer, or more than `MEMORY_BYTES`, or is none.
    """
    text, (binary,) = regex.encode(), vocabulary.__reduce__()[1]
    command = [sys.executable, "-P", __file__, str(math.ceil(seconds))]
    asked = len(text).to_bytes(_PREFIX) + text + binary
    try:
        done = subprocess.run(command, input=asked, capture_output=True, timeout=seconds or None, check=False)
    except subprocess.TimeoutExpired:
        raise ValueError(f"the regex does not compile within {seconds:g} s") from None
    if done.returncode < 0:  # the allocator ends the process
        raise ValueError(f"the regex takes more than {MEMORY_BYTES >> 20} MiB to compile")
    if done.returncode:
        raise ValueError(done.stderr.decode(errors="replace").strip())
    return oc.Index.from_binary(done.stdout)


def _compile() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if seconds := int(sys.argv[1]):  # the instance may have ended
        resource.setrlimit(resource.RLIMIT_CPU, (seconds + 1, seconds + 1))
    asked = sys.stdin.buffer.read()
    end = _PREFIX + int.from_bytes(asked[:_PREFIX])
    try:
        index = oc.Index(asked[_PREFIX:end].decode(), oc.Vocabulary.from_binary(asked[end:]))
    except Exception as error:
        sys.exit(str(error))
    sys.stdout.buffer.write(index.__reduce__()[1][0])


if __name__ == "__main__":
    _compile()
