"""What the children of the fault suites have imported before they begin."""

import tests.fakes  # noqa: F401
