"""Fork, threads, Ctrl-C, memory: what a process does to a library over a long day."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import mha


def inputs(salt: int = 0, shape: tuple[int, ...] = (2, 8, 200, 32)) -> Any:
    rng = np.random.default_rng(salt)
    return [rng.standard_normal(shape).astype(np.float32) for _ in range(3)]


def attend(salt: int = 0) -> Any:
    q, k, v = inputs(salt)
    output, lse = mha.scaled_dot_product_attention(q, k, v, is_causal=True, return_lse=True)
    return mha.scaled_dot_product_attention_backward(output, q, k, v, output, lse, is_causal=True).key


def _in_child(queue: Any) -> None:
    queue.put(float(attend(1).sum()))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")  # JAX, where another test has loaded it
def test_children_forked_after_use_do_not_hang() -> None:
    expected = float(attend(1).sum())
    context = multiprocessing.get_context("fork")
    for _ in range(5):
        queue = context.Queue()
        child = context.Process(target=_in_child, args=(queue,))
        child.start()
        try:
            assert queue.get(timeout=20) == expected
            child.join(timeout=20)
            assert child.exitcode == 0
        finally:
            child.kill()
    assert float(attend(1).sum()) == expected


def test_concurrent_calls_give_what_single_ones_give() -> None:
    expected = [attend(i).tobytes() for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            assert [x.tobytes() for x in pool.map(attend, range(8))] == expected


def test_each_thread_has_its_own_latest_call() -> None:
    layer = mha.MultiHeadAttention(16, 2)
    barrier = threading.Barrier(2)

    def work(salt: int) -> Any:
        x = np.random.default_rng(salt).standard_normal((1, 4 + salt, 16)).astype(np.float32)
        layer(x, x, x)
        barrier.wait(timeout=20)
        return layer.backward(x).query.shape

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, range(2))) == [(1, 4, 16), (1, 5, 16)]


INTERRUPTED = """
import signal, sys, threading, time, os
import numpy as np, mha
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts with SIGINT ignored
x = np.ones((1, {heads}, {length}, 64), np.float32)
small = np.ones((1, 1, 8, 8), np.float32)
if "{which}" == "backward":
    output, lse = x, np.zeros(x.shape[:3], np.float32)
    call = lambda: mha.scaled_dot_product_attention_backward(x, x, x, x, output, lse)
else:
    call = lambda: mha.scaled_dot_product_attention(x, x, x)
sent = []
def interrupt():
    sent.append(time.perf_counter()); os.kill(os.getpid(), signal.SIGINT)
timer = threading.Timer(0.7, interrupt)
mha.scaled_dot_product_attention(small, small, small)
timer.start()
try:
    call()
    print("finished")
except KeyboardInterrupt:
    print("interrupted", time.perf_counter() - sent[0])
print("next", mha.scaled_dot_product_attention(small, small, small).sum())
"""


@pytest.mark.skipif(not hasattr(signal, "SIGINT") or sys.platform == "win32", reason="needs POSIX signals")
@pytest.mark.parametrize(
    ("which", "heads", "length"), [("forward", 1, 60000), ("backward", 1, 40000), ("backward", 16, 12000)]
)
def test_ctrl_c_is_answered_within_200_ms(which: str, heads: int, length: int) -> None:
    code = INTERRUPTED.format(which=which, heads=heads, length=length)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    first, second = run.stdout.strip().splitlines()
    assert first.startswith("interrupted"), run.stdout + run.stderr
    assert float(first.split()[1]) < 0.2
    assert second == f"next {8 * 8.0}"


PEAK = """
import resource, sys, threading
import numpy as np, mha
def peak():
    return int([l for l in open("/proc/self/status") if l.startswith("VmHWM")][0].split()[1]) * 1024
rng = np.random.default_rng(0)
q, k, v = (rng.standard_normal((1, 1, {length}, 64), dtype=np.float32) for _ in range(3))
small = q[:, :, :64].copy()
o, l = mha.scaled_dot_product_attention(small, small, small, return_lse=True)
mha.scaled_dot_product_attention_backward(o, small, small, small, o, l)
before = peak()
out, lse = mha.scaled_dot_product_attention(q, k, v, return_lse=True)
forward = peak() - before - out.nbytes - lse.nbytes
now = peak()
g = mha.scaled_dot_product_attention_backward(out, q, k, v, out, lse)
print(forward, peak() - now - sum(x.nbytes for x in g[:3]))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the peak memory from /proc")
@pytest.mark.parametrize("length", [8192, pytest.param(32768, marks=pytest.mark.slow)])
def test_no_buffer_of_size_l_by_s(length: int) -> None:
    code = PEAK.format(length=length)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=True)
    forward, backward = map(int, run.stdout.split())
    assert forward < 16 * 2**20, forward
    assert backward < 16 * 2**20, backward


def test_memory_does_not_grow_over_many_calls() -> None:
    resource = pytest.importorskip("resource", reason="reads the peak memory from resource")
    layer = mha.MultiHeadAttention(32, 4)
    x = np.ones((2, 20, 32), np.float32)

    def rounds(count: int) -> int:
        for _ in range(count):
            layer.backward(layer(x, x, x, need_weights=True)[0])
        return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)

    first = rounds(300)
    assert rounds(1000) - first < 1024


def test_import_is_silent_and_light() -> None:
    heavy = ("cupy", "torch", "matplotlib", "threadpoolctl")
    code = f"import sys, mha; print([name for name in {heavy} if name in sys.modules])"
    start = time.perf_counter()
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
    assert run.stderr == ""
    assert time.perf_counter() - start < 10


UNREADABLE = """
import ctypes, mmap
import numpy as np, mha
page = mmap.PAGESIZE
half = page // 256
memory = mmap.mmap(-1, 2 * page)
k = np.frombuffer(memory, np.float32).reshape(1, 1, 2 * half, 64)
k[...] = 1
assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(k.ctypes.data + page), page, 0) == 0
for queries in (3, 70):
    q = np.ones((1, 1, queries, 64), np.float32)
    options = dict(key_lengths=np.array([half]))
    output, lse = mha.scaled_dot_product_attention(q, k, k, return_lse=True, **options)
    gradients = mha.scaled_dot_product_attention_backward(q, q, k, k, output, lse, **options)
    assert (output == 1).all() and (gradients.key[:, :, half:] == 0).all()
    padding = np.arange(2 * half)[None] >= half
    result = mha.multi_head_attention(q[0], k[0], k[0], 64, 1, 0.0, 0.0, np.zeros(0, np.float32), 0, 0, 0, 0,
                                      key_padding_mask=padding, need_weights=True)
    assert (result.attn_output == 1).all()
    mha.multi_head_attention_backward(q[0], result, result.attn_output_weights)
print("never read")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="protects memory pages with mprotect")
@pytest.mark.parametrize("threads", ["1", "8"])
def test_keys_that_a_sample_does_not_have_are_never_read(threads: str) -> None:
    """They lie in a page that may not be touched."""
    code = f"import mha; mha.set_num_threads({threads}); mha.cpu.plan._SMALL_WORK = 0\n{UNREADABLE}"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "never read"


@pytest.mark.skipif(getattr(sys, "_is_gil_enabled", lambda: True)(), reason="only for a free-threaded Python")
def test_a_free_threaded_python_keeps_its_gil_off() -> None:
    attend()
    assert not sys._is_gil_enabled()
