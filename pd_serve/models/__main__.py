"""`python -m pd_serve.models NAME` prints the directory of a model, made first if need be."""

import sys

from pd_serve.errors import PdServeError
from pd_serve.models.catalog import DEFAULT_MODEL, demo_names, resolve


def main(arguments: list[str]) -> int:
    if len(arguments) > 1 or {"-h", "--help"} & set(arguments):
        names = ", ".join(demo_names())
        print(f"usage: python -m pd_serve.models [NAME]   demo models: {names}", file=sys.stderr)
        return 2
    try:
        print(resolve(arguments[0] if arguments else DEFAULT_MODEL))
    except PdServeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
