"""The environment variables that the test session was started with.

Tests and libraries change those of the test process. A process that a test starts gets these instead, so that
it does not depend on the tests before it.
"""

import os

START_ENVIRONMENT = dict(os.environ)
