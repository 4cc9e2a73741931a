"""Every reader of a file is given files that are almost right: it reads them, or says one sentence. No traceback, no hang.

A good file of each kind is changed in a few places. What was ever found is kept in `finds` and tried first. `FUZZ_EXAMPLES` is the number
of examples per reader (`make fuzz`: 10,000): example k of a reader is always the same, and `FUZZ_FIRST` is the first k. The first ones are
hypothesis's, which makes what it finds small; the others cost it more time than the readers do, and are drawn here. What fails is kept in
build/fuzz, one file for each place in the code.
"""

import hashlib
import os
import resource
import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_forget.errors import UserError
from tests.fuzz.changes import HOW, PIECES, changed, drawn
from tests.fuzz.given_files import GIVEN
from tests.fuzz.own_files import OWN

READERS = GIVEN | OWN
FEW = 25
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "50"))
FIRST = int(os.environ.get("FUZZ_FIRST", "0"))
FINDS = Path(__file__).parent / "finds"
KEPT = Path("build/fuzz")
CHANGES = st.lists(
    st.tuples(
        st.sampled_from(HOW),
        st.floats(0, 1, exclude_max=True),
        st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from(PIECES)),
    ),
    min_size=1,
    max_size=4,
)


def try_reading(name: str, path: Path) -> None:
    """A reader reads, or says one sentence."""
    try:
        READERS[name][2](path)
    except UserError as error:
        sentence = str(error)
    else:
        sentence = "read"
    assert sentence.strip()


@contextmanager
def limits() -> Iterator[None]:
    """Nothing may ask for more memory than there is text to read."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    handler = signal.signal(signal.SIGPROF, _too_long)
    resource.setrlimit(resource.RLIMIT_DATA, (6 << 30, before[1]))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _too_long(number: int, frame: object) -> None:
    raise TimeoutError("five seconds of CPU time")


def place_of(error: BaseException) -> str:
    """Where an error came from: the innermost line that is the tool's own."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "mlx_forget/" in frame.filename or "_backend/" in frame.filename] or frames
    return f"{type(error).__name__} at {Path(own[-1].filename).name}:{own[-1].lineno}: {str(error)[:200]}"


@pytest.mark.parametrize("name", READERS)
def test_what_is_almost_right_is_read_or_refused(name, tmp_path):
    path = tmp_path / READERS[name][0]
    path.parent.mkdir(parents=True, exist_ok=True)
    READERS[name][1](path)
    good = path.read_bytes()
    READERS[name][2](path)

    def read(content: bytes) -> None:
        # A new file: what was read from the old one may still be mapped.
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        signal.setitimer(signal.ITIMER_PROF, 5)
        try_reading(name, path)

    @settings(
        max_examples=min(FEW, EXAMPLES), deadline=None, database=None, suppress_health_check=list(HealthCheck), derandomize=True
    )
    @given(CHANGES)
    def shrunk(changes):
        read(changed(good, changes))

    failed: dict[str, Path] = {}
    with limits():
        for find in sorted(FINDS.glob(f"{name.replace(' ', '-')}-*")):
            read(find.read_bytes())
        if FIRST == 0:
            shrunk()
        for number in range(max(FIRST, FEW), EXAMPLES):
            content = changed(good, drawn(Random(f"{name} {number}")))
            try:
                read(content)
            except Exception as error:
                place = place_of(error)
                if place.partition(": ")[0] not in {known.partition(": ")[0] for known in failed}:
                    KEPT.mkdir(parents=True, exist_ok=True)
                    failed[place] = KEPT / f"{name.replace(' ', '-')}-{hashlib.sha256(content).hexdigest()[:8]}"
                    failed[place].write_bytes(content)
    assert not failed, "\n".join(f"{place} ({kept})" for place, kept in failed.items())
    print(f"fuzz: {EXAMPLES - FIRST:,} examples of {name}, tracebacks: none", flush=True)
