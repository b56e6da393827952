"""Products of bfloat16 pairs at every level, though plans take them only where a processor has the instruction."""

from __future__ import annotations

import dataclasses
import signal

import numpy as np
import pytest
from cases import Case, in_groups
from emulator import amx_level
from shared import prepared, problem_of
from tolerance import TRUTH, assert_as_good_as_naive

import mha
from mha import cpu, optional
from mha.cpu import launch, load
from mha.matrix import Matrix, heads_of, rows_of

if optional.bfloat16 is None:
    pytest.skip("bfloat16 needs ml_dtypes", allow_module_level=True)

SIZES = [(1, 1, 1), (1, 65, 7), (3, 5, 0), (7, 33, 300), (97, 130, 64), (100, 16, 513), (200, 64, 257)]
NAMES = [case.name for case in in_groups("edge", "mask", "shape")]


@pytest.fixture(params=[*load.runnable_levels(), "amx emulated"])
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every level that runs here, and the one of matrix tiles with these in memory."""
    if request.param != "amx emulated":
        monkeypatch.setenv("MHA_CPU_ISA", request.param)
    elif (why_not := amx_level.why_not()) is not None:
        pytest.skip(why_not)
    else:
        emulated = amx_level.kernels()
        monkeypatch.setattr(load, "kernels", lambda level: emulated)
    return request.param


@pytest.fixture(autouse=True)
def always_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    original = launch.facts
    monkeypatch.setattr(
        launch, "facts", lambda dtype: dataclasses.replace(original(dtype), paired=dtype == optional.bfloat16)
    )


@pytest.mark.parametrize("name", NAMES)
def test_attention(name: str, level: str) -> None:
    problem, _, _, truth, naive = prepared(name, "bfloat16")
    output, lse, _ = cpu.attention_forward(problem)
    assert_as_good_as_naive(output, naive.output, truth.output, "output")
    assert_as_good_as_naive(lse, naive.lse, truth.lse, "lse")


@pytest.mark.parametrize("layout", ["rows", "left by columns", "right by columns", "heads"])
@pytest.mark.parametrize("size", SIZES)
def test_products(size: tuple[int, int, int], layout: str, level: str) -> None:
    m, n, k = size
    rng = np.random.default_rng(0)
    left, right, bias = (rng.standard_normal(shape).astype(optional.bfloat16) for shape in ((m, k), (k, n), (n,)))
    operands = {
        "left by columns": (rows_of(left.T.copy()).T, rows_of(right)),
        "right by columns": (rows_of(left), rows_of(right.T.copy()).T),
        # Columns of two heads, with a gap between their memory.
        "heads": (heads_of(np.stack([np.pad(x, ((0, 3), (0, 0))) for x in np.split(left, 2, axis=1)])[None, :, :m])
                  if k % 2 == 0 else rows_of(left), rows_of(right)),
    }  # fmt: skip
    out = np.full((m, n), 9, optional.bfloat16)
    cpu.product(*operands.get(layout, (rows_of(left), rows_of(right))), rows_of(out), bias)
    naive = left.astype(np.float32) @ right.astype(np.float32) + bias.astype(np.float32)
    truth = left.astype(TRUTH) @ right.astype(TRUTH) + bias.astype(TRUTH)
    assert_as_good_as_naive(out, naive.astype(out.dtype), truth, "product")


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_packed_weights(size: tuple[int, int, int], transposed: bool, level: str) -> None:
    m, n, k = size
    rng = np.random.default_rng(0)
    left, right = (rng.standard_normal(shape).astype(optional.bfloat16) for shape in ((m, k), (k, n)))
    right_matrix = rows_of(right.T.copy()).T if transposed else rows_of(right)
    plain, packed = (np.empty((m, n), optional.bfloat16) for _ in range(2))
    cpu.product(rows_of(left), right_matrix, rows_of(plain))
    made = cpu.pack(right_matrix)
    width = made.memory.nbytes // 4 // max(-(-k // 2), 1)
    assert k == 0 or n <= width < 2 * max(n, 64), "pairs take half the memory"
    cpu.product(rows_of(left), made, rows_of(packed))
    assert packed.tobytes() == plain.tobytes()


@pytest.mark.parametrize("which", [np.nan, np.inf])
def test_what_is_hidden_from_some_rows_does_not_leak(which: float, level: str) -> None:
    case = Case("pairs_hidden", "", queries=70, keys=131, head_dim=7, v_head_dim=9, mask="bool_4d")
    arrays = case.inputs(optional.bfloat16)
    arrays["value"][:, :, 40] = which
    arrays["key"][:, :, 90] = which
    arrays["attn_mask"][..., 40] = arrays["attn_mask"][..., 90] = False
    hidden, _, _ = cpu.attention_forward(problem_of(case, arrays))
    for key in (40, 90):
        arrays["value"][:, :, key] = arrays["key"][:, :, key] = 0
    zeros, _, _ = cpu.attention_forward(problem_of(case, arrays))
    # Beside what is not finite the probabilities are not rounded to bfloat16.
    np.testing.assert_allclose(hidden.astype("f8"), zeros.astype("f8"), atol=2**-7 * np.abs(zeros).max().astype("f8"))


@pytest.mark.parametrize("kept", [0, 1, 64, 65])
def test_keys_that_a_sample_has_not_are_not_read(kept: int, level: str) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 2, 130, 10)).astype(optional.bfloat16) for _ in range(3))
    k[1, :, kept:] = v[1, :, kept:] = np.nan
    lengths = np.array([130, kept])
    output = mha.scaled_dot_product_attention(q, k, v, key_lengths=lengths)
    alone = mha.scaled_dot_product_attention(q[1:], k[1:, :, :kept], v[1:, :, :kept])
    np.testing.assert_array_equal(output[1:], alone)


@pytest.mark.parametrize("window", [(20, 5), (37, 0), (33, 11), (299, 5), None])
def test_the_same_bits_for_any_number_of_threads(window: tuple[int, int] | None, level: str) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 2, 300, 64)).astype(optional.bfloat16) for _ in range(3))
    found = set()
    for threads in (1, 2, 3, 8):
        mha.set_num_threads(threads)
        output, lse = mha.scaled_dot_product_attention(q, k, v, window=window, return_lse=True)
        found.add((output.tobytes(), lse.tobytes()))
    mha.set_num_threads(None)
    assert len(found) == 1


def test_a_signal_handler_may_use_the_tiles_too(level: str) -> None:
    rng = np.random.default_rng(0)
    left, right = (rows_of(rng.standard_normal(shape).astype(optional.bfloat16)) for shape in ((1024, 512), (512, 512)))
    q = rng.standard_normal((1, 4, 1000, 64)).astype(optional.bfloat16)

    small = rows_of(np.ones((32, 512), optional.bfloat16))

    def product(left: Matrix = left) -> bytes:
        out = np.empty((left.shape[0], 512), optional.bfloat16)
        cpu.product(left, right, rows_of(out))
        return out.tobytes()

    def attention() -> bytes:
        return mha.scaled_dot_product_attention(q, q, q).tobytes()

    called: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda *_: called.append(len(product(small))))
    mha.set_num_threads(1)
    try:
        for call in (product, attention):
            expected = call()
            called.clear()
            # A call looks for signals every fifty milliseconds; with emulated tiles it takes longer than that.
            signal.setitimer(signal.ITIMER_REAL, 0.02)
            found = call()
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert found == expected
            assert called or level != "amx emulated"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        mha.set_num_threads(None)


def test_the_levels_that_have_the_instruction() -> None:
    paired = {level for level in load.runnable_levels() if load.kernels(level).PAIRED}
    assert paired == {"amx", "avx512bf16"} & set(load.runnable_levels())
