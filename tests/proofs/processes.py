"""What the tests of tutorials/scale share: scripts that start processes."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def alive(pid):
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(true, seconds=120):
    until = time.monotonic() + seconds
    while not true() and time.monotonic() < until:
        time.sleep(0.1)
    return true()


@contextlib.contextmanager
def started(script, folder, *options, **changes):
    """A process that runs a script in a folder; it ends, whatever happens."""
    (folder / "script.py").write_text(script, encoding="utf-8")
    plain = {k: v for k, v in os.environ.items() if "PYTEST" not in k}
    process = subprocess.Popen(
        [sys.executable, *options, "script.py"],
        cwd=folder,
        # A test run in the background would hand down that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        env=plain | {"TMPDIR": str(folder), "OMP_NUM_THREADS": "1"} | changes,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.terminate()  # a launcher ends its workers then
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        for file in folder.glob("pid-*"):  # workers have sessions of their own
            if alive(int(file.read_text())):
                os.kill(int(file.read_text()), signal.SIGKILL)


def finished(script, folder, *options, seconds=180, **changes):
    """Run a script to its end; return the status and what it says of errors."""
    with started(script, folder, *options, **changes) as process:
        _, errors = process.communicate(timeout=seconds)
        return process.returncode, errors


WAITING = """
import os, time
open(f"{os.environ['TMPDIR']}/pid-{os.environ['RANK']}", "w").write(str(os.getpid()))
time.sleep(100)
"""


def check_that_an_interrupt_leaves_nothing(script, folder):
    """The script launches two processes that run WAITING, and is interrupted."""
    with started(script, folder) as page:
        files = [folder / f"pid-{rank}" for rank in range(2)]
        assert wait_until(lambda: all(f.exists() and f.read_text() for f in files))
        workers = [int(file.read_text()) for file in files]
        assert all(map(alive, workers))
        page.send_signal(signal.SIGINT)  # Ctrl-C in a notebook reaches the page alone
        _, errors = page.communicate(timeout=60)
    assert "KeyboardInterrupt" in errors
    assert wait_until(lambda: not any(map(alive, workers)), seconds=15)
    left = {path.name for path in folder.iterdir()}
    assert left == {"script.py", "pid-0", "pid-1"}
