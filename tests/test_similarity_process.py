"""The extension as a guest in a process: signals, forks, threads, staleness."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from attribution import similarity
from tests import oracle

ROOT = Path(__file__).resolve().parents[1]


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_control_c_ends_a_long_call_within_a_second() -> None:
    code = """
        import signal, threading, time, os
        import numpy as np
        from attribution import similarity
        row = np.ones((1, 512), np.float32)
        gallery = np.broadcast_to(row, (300_000_000, 512))   # minutes of work in no memory
        pressed = []
        def press():
            time.sleep(0.5)
            pressed.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGINT)
        threading.Thread(target=press).start()
        try:
            similarity.search(row, gallery, k=3)
        except KeyboardInterrupt:
            print("interrupted after", time.monotonic() - pressed[0])
    """
    done = run_python(code)
    assert "interrupted after" in done.stdout, done.stderr
    assert float(done.stdout.split()[-1]) < 1


def test_a_forked_child_retrieves_too() -> None:
    code = """
        import os, sys
        import numpy as np
        from attribution import similarity
        rows = np.eye(300, dtype=np.float32)
        want = similarity.search(rows, rows, k=2, threads=2)[0]
        child = os.fork()
        got = similarity.search(rows, rows, k=2, threads=2)[0]
        assert (got == want).all()
        if child == 0:
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        print("both")
    """
    assert "both" in run_python(code).stdout


def test_calls_share_their_threads_and_leave_one_team_behind() -> None:
    code = """
        import os, threading, time
        import numpy as np
        from attribution import similarity
        rows = np.random.default_rng(0).standard_normal((2000, 32)).astype(np.float32)
        search = lambda threads: similarity.search(rows[:20], rows, k=5, threads=threads)[0]
        running = lambda: set(os.listdir("/proc/self/task"))
        want, before = search(1), running()
        assert (search(3) == want).all()
        own = running() - before
        assert len(own) == 2, own
        for _ in range(20):
            assert (search(3) == want).all()
            assert running() - before == own
        calls = [threading.Thread(target=search, args=(threads,)) for threads in (2, 3, 4) * 3]
        for call in calls: call.start()
        for call in calls: call.join()
        assert (search(4) == want).all()
        for _ in range(1000):  # a thread that was joined may be seen a little longer
            if len(running() - before) > 3: time.sleep(0.01)
        assert len(running() - before) == 3
        mask = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(mask)})
        assert (search(4) == want).all()
        allowed = [os.sched_getaffinity(int(task)) for task in running() - before]
        assert allowed == [{min(mask)}] * 3, allowed
        print("shared")
    """
    done = run_python(code)
    assert "shared" in done.stdout, done.stderr


def test_signals_go_to_the_programs_own_threads() -> None:
    code = """
        import os, re
        from pathlib import Path
        import numpy as np
        from attribution import similarity
        before = set(os.listdir("/proc/self/task"))
        rows = np.eye(300, dtype=np.float32)
        similarity.search(rows, rows, k=2, threads=2)
        (own,) = set(os.listdir("/proc/self/task")) - before
        blocked = re.search(r"SigBlk:\\s+(\\w+)", Path(f"/proc/self/task/{own}/status").read_text())[1]
        for signal in (2, 11):
            print(signal, "blocked:", int(blocked, 16) >> signal - 1 & 1)
    """
    done = run_python(code)
    assert done.stdout.splitlines() == ["2 blocked: 1", "11 blocked: 0"], done.stderr  # SIGINT, SIGSEGV


def test_the_callers_mode_of_arithmetic_changes_no_score() -> None:
    """Flushed subnormal numbers would: in the calling thread, and in those that are begun meanwhile."""
    code = """
        import numpy as np, torch
        from attribution import similarity
        rng = np.random.default_rng(0)
        gallery = (rng.standard_normal((2000, 32)) * 1e-40).astype(np.float32)
        queries = rng.standard_normal((6, 32)).astype(np.float32)
        scale = np.full(2000, 1e38, np.float32)
        options = {"k": 3, "inv_tau": 5.0, "b": -0.5, "scale": scale}
        want = similarity.attribute(queries, gallery, threads=1, **options)
        assert want.scores.min() > 0.01
        assert torch.set_flush_denormal(True)
        for threads in (1, 3):
            got = similarity.attribute(queries, gallery, threads=threads, **options)
            assert (got.ids == want.ids).all() and (got.scores == want.scores).all(), got.scores
            assert (got.influence == want.influence).all()
        assert np.float32(1e-40) * np.float32(1) == 0  # the caller's mode is as it was
        print("same")
    """
    done = run_python(code)
    assert "same" in done.stdout, done.stderr


def test_a_program_ends_though_a_daemon_thread_retrieves() -> None:
    code = """
        import threading, time
        import numpy as np
        from attribution import similarity
        row = np.ones((1, 64), np.float32)
        gallery = np.broadcast_to(row, (100_000, 64))
        def retrieve():
            while True:
                similarity.search(row, gallery, k=3, threads=2)
        for _ in range(2):
            threading.Thread(target=retrieve, daemon=True).start()
        time.sleep(0.5)
        print("ends")
    """
    done = run_python(code)
    assert (done.stdout.strip(), done.stderr, done.returncode) == ("ends", "", 0)


def test_other_python_threads_run_meanwhile() -> None:
    queries, gallery = oracle.planted(np.random.default_rng(0), 64, 20_000, 64)
    ticks, done = [], threading.Event()

    def tick() -> None:
        while not done.is_set():
            ticks.append(time.monotonic())
            time.sleep(0.001)

    ticker = threading.Thread(target=tick)
    ticker.start()
    begin = time.monotonic()
    while time.monotonic() - begin < 0.3:
        similarity.attribute(queries, gallery, k=10, inv_tau=5.0, b=0.0)
    done.set()
    ticker.join()
    assert len(ticks) > 20


def test_concurrent_calls_do_not_disturb_each_other() -> None:
    queries, gallery = oracle.planted(np.random.default_rng(1), 20, 3000, 32)
    want = similarity.attribute(queries, gallery, k=10, inv_tau=9.0, b=-0.04)
    got: list[similarity.Attribution] = []
    calls = [
        threading.Thread(
            target=lambda: got.append(similarity.attribute(queries, gallery, k=10, inv_tau=9.0, b=-0.04))
        )
        for _ in range(6)
    ]
    for call in calls:
        call.start()
    for call in calls:
        call.join()
    assert len(got) == 6
    for other in got:
        np.testing.assert_array_equal(other.ids, want.ids)
        np.testing.assert_array_equal(other.influence, want.influence)


def test_peak_memory_does_not_grow_with_the_gallery() -> None:
    code = """
        import resource, sys
        import numpy as np
        from attribution import similarity
        queries = np.random.default_rng(0).standard_normal((256, 16)).astype(np.float32)
        shard = np.random.default_rng(1).standard_normal((4096, 16)).astype(np.float32)
        def peak(shards):
            similarity.attribute(queries, [shard] * shards, k=100, inv_tau=1.0, b=-0.5)
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        similarity.search(queries[:1], shard, k=1)
        begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print((peak(2) - begin) / 1024, (peak(60) - begin) / 1024)
    """
    small, large = map(float, run_python(code).stdout.split())
    assert large < 64  # MB; the scores alone would be 240
    assert large < small + 16


@pytest.mark.parametrize("value", ["0", "-1", "many"])
def test_a_thread_count_that_is_none_is_refused(value: str, monkeypatch) -> None:
    monkeypatch.setenv("ATTRIBUTION_THREADS", value)
    with pytest.raises(ValueError, match=f"ATTRIBUTION_THREADS: wanted an integer >= 1, got '{value}'"):
        similarity.search(np.ones((1, 1), np.float32), np.ones((1, 1), np.float32), k=1)


def test_an_unknown_instruction_set_is_refused(monkeypatch) -> None:
    monkeypatch.setenv("ATTRIBUTION_ISA", "abacus")
    with pytest.raises(ValueError, match=r"ATTRIBUTION_ISA: wanted one of .*portable.*, got abacus"):
        similarity.search(np.ones((1, 1), np.float32), np.ones((1, 1), np.float32), k=1)


def test_an_extension_built_from_other_sources_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(similarity, "sources_digest", lambda names: "0" * 64)
    similarity.load_extension.cache_clear()
    with pytest.raises(
        ImportError, match=r"stale extension; run: uv sync --reinstall-package attribution-by-cust"
    ):
        similarity.search(np.ones((1, 1), np.float32), np.ones((1, 1), np.float32), k=1)
    monkeypatch.undo()
    similarity.load_extension.cache_clear()


def test_signals_are_left_as_they_were() -> None:
    handler = signal.getsignal(signal.SIGINT)
    similarity.search(np.ones((1, 1), np.float32), np.ones((1, 1), np.float32), k=1)
    assert signal.getsignal(signal.SIGINT) is handler
