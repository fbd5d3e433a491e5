"""`python -m pd_serve.models NAME` prints the directory of a model, made first if need be."""

import sys

from pd_serve.errors import PdServeError
from pd_serve.models.catalog import DEFAULT_MODEL, resolve

if __name__ == "__main__":
    try:
        print(resolve((sys.argv[1:] or [DEFAULT_MODEL])[0]))
    except PdServeError as error:
        sys.exit(f"error: {error}")
