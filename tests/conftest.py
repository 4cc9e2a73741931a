"""All tests run at smoke scale in a cache folder of their own, shared by the whole test session."""

import os
import tempfile
from pathlib import Path

import hypothesis
import pytest

# A test is not wrong because the machine has other things to do.
hypothesis.settings.register_profile("patient", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("patient")

# Set before anything reads it; workers of pytest-xdist inherit the first process's folder.
os.environ["FORGET_SCALE"] = "smoke"
_HOME = Path(tempfile.gettempdir()) / f"mlx-forget-tests-{os.environ.get('PYTEST_XDIST_TESTRUNUID', os.getpid())}"


@pytest.fixture(scope="session", autouse=True)
def cache_folder():
    os.environ["FORGET_HOME"] = str(_HOME)
    _HOME.mkdir(exist_ok=True)
    return _HOME


def pytest_sessionfinish(session, exitstatus):
    """The first process removes the cache once every worker is done."""
    import shutil

    if not hasattr(session.config, "workerinput"):
        run = getattr(session.config, "testrunuid", None)
        dsession = session.config.pluginmanager.getplugin("dsession")
        if dsession is not None:
            run = dsession.nodemanager.testrunuid
        shutil.rmtree(Path(tempfile.gettempdir()) / f"mlx-forget-tests-{run or os.getpid()}", ignore_errors=True)


@pytest.fixture
def run_forget(capfd):
    """Run the command line in this process; returns (exit code, stdout, stderr)."""
    from mlx_forget.cli import main

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return int(stop.value.code or 0), out, err

    return run
