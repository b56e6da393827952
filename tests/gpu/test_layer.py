"""Whole layers on the device, forward and backward, against the same call with NumPy arrays and the same seed."""

from __future__ import annotations

import copy
import pickle
import sys
from typing import Any

import devices
import emulator
import numpy as np
import pytest
from tolerance import DTYPES

import mha
from mha.compat import ivy, paddle, rtorch, torch

BATCH, QUERIES, KEYS, WIDTH, HEADS = 2, 9, 13, 24, 3

#: Relative to the largest value: some roundings of each dtype.
TOLERANCES = {"float32": 1e-5, "float64": 1e-13, "float16": 6e-3, "bfloat16": 5e-2}


def normal(*shape: int, dtype: Any = np.float64, salt: int = 0) -> Any:
    return np.random.default_rng([salt, *shape]).standard_normal(shape).astype(dtype)


def flags(*shape: int, p: float = 0.3) -> Any:
    return np.random.default_rng(shape).random(shape) < p


BIASES = dict.fromkeys(("qbias", "kbias", "vbias", "obias"), True)
APPENDED = {"bias_k": normal(1, 1, WIDTH, salt=1), "bias_v": normal(1, 1, WIDTH, salt=2), "add_zero_attn": True}
RANGES = np.sort(np.random.default_rng(0).integers(0, KEYS + 1, (2, QUERIES)), axis=0)
LENGTHS = np.array([[QUERIES, 4], [7, 0]])
DROPS = {"attn_drop": 0.3, "out_drop": 0.4}

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "biases": BIASES | DROPS,
    "appended": APPENDED | BIASES | {"attn_drop": 0.3},
    "weights": {"need_weights": True, "attn_drop": 0.5},
    "averaged": APPENDED | {"need_weights": True, "average_attn_weights": True, "is_causal": True},
    "boolean masks": {"attn_mask": flags(QUERIES, KEYS), "key_padding_mask": flags(BATCH, KEYS)},
    "float masks": {"attn_mask": normal(BATCH * HEADS, QUERIES, KEYS), "key_padding_mask": normal(BATCH, KEYS)},
    "float mask of four axes": {"attn_mask": normal(1, HEADS, 1, KEYS), "window": (4, 2), "causal_offset": 2},
    "cudnn masks": {"attn_mask": RANGES, "key_padding_mask": LENGTHS, "maybe_cudnn_style_mask": True} | DROPS,
    "causal": {"is_causal": True, "causal_offset": np.array([1, -3])} | BIASES,
    "reslink": {"reslink": True} | DROPS,
    "grouped": {"num_kv_heads": 1, "window": 3, "softcap": 2.0},
    "no projections": {"qproj_size": 0, "kproj_size": 0, "vproj_size": 0, "oproj_size": 0, "attn_drop": 0.2},
    "no keys": {"need_weights": True} | BIASES,
}


def call(name: str, dtype: str, batched: bool = True) -> dict[str, Any]:
    """The arguments of `multi_head_attention`, float arrays in this dtype."""
    options = {"embed_dim": WIDTH, "num_heads": HEADS, "attn_drop": 0.0, "out_drop": 0.0} | OPTIONS[name]
    keys = 0 if name == "no keys" else KEYS
    arrays = {"query": normal(BATCH, QUERIES, WIDTH), "key": normal(BATCH, keys, WIDTH, salt=3),
              "value": normal(BATCH, keys, WIDTH, salt=4)}  # fmt: skip
    if not batched:
        arrays = {part: x[0] for part, x in arrays.items()}
    fields = {x: options.get(x) for x in ("num_kv_heads", *(f"{letter}proj_size" for letter in "qkvo"))}
    fields |= {f"{letter}bias": options.get(f"{letter}bias", False) for letter in "qkvo"}
    layout = mha.PackedLayout(WIDTH, HEADS, **fields)
    given = options | arrays | {"io_weight_bias": normal(layout.length) * 0.3}
    kind = DTYPES[dtype]
    return {
        part: x.astype(kind) if isinstance(x, np.ndarray) and x.dtype == np.float64 else x for part, x in given.items()
    }


def run(arguments: dict[str, Any], place: devices.Device) -> tuple[Any, Any, Any]:
    """Output, weights and gradients, mask gradients included, as NumPy arrays."""
    mha.seed(11)
    result = mha.multi_head_attention(**place.put(arguments))
    assert isinstance(result.attn_output, place.library.ndarray)
    kind = arguments["query"].dtype
    output, weights = result.attn_output, result.attn_output_weights
    ups = [None if x is None else place.put(normal(*x.shape, dtype=kind, salt=9)) for x in (output, weights)]
    gradients = mha.multi_head_attention_backward(ups[0], result, ups[1], mask_gradients=True)
    return place.get((output, weights, gradients._asdict()))


def assert_alike(found: Any, right: Any, dtype: str, name: str) -> None:
    if right is None:
        assert found is None, name
        return
    assert (found.shape, found.dtype) == (right.shape, right.dtype), name
    scale = np.abs(right.astype(float)).max(initial=0.01)
    error = np.abs(found.astype(float) - right.astype(float)).max(initial=0)
    assert error <= TOLERANCES[dtype] * scale, (name, error, scale)


def check(arguments: dict[str, Any], dtype: str, device: devices.Device) -> None:
    found, right = run(arguments, device), run(arguments, devices.HOST)
    for i, name in enumerate(("output", "weights")):
        assert_alike(found[i], right[i], dtype, name)
        if right[i] is not None:
            assert (found[i][right[i] == 0] == 0).all(), f"{name}: not 0 where dropped or hidden"
    assert sum(x is not None for x in found[2].values()) >= 4
    for name, gradient in right[2].items():
        assert_alike(found[2][name], gradient, dtype, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_a_layer(name: str, dtype: str, device: devices.Device) -> None:
    check(call(name, dtype), dtype, device)


@pytest.mark.parametrize("name", ["biases", "weights", "averaged", "reslink"])
def test_an_unbatched_layer(name: str, device: devices.Device) -> None:
    check(call(name, "float32", batched=False), "float32", device)


def test_a_hidden_position_that_is_not_finite_reaches_no_weight(device: devices.Device) -> None:
    arguments = call("boolean masks", "float32")
    arguments["attn_mask"] = None
    clean = run(arguments, device)
    padded = np.nonzero(arguments["key_padding_mask"])
    assert len(padded[0])
    for part in ("key", "value"):
        arguments[part][padded] = np.nan
    for name, gradient in run(arguments, device)[2].items():
        if gradient is not None:
            np.testing.assert_array_equal(gradient, clean[2][name], err_msg=name)


def test_lengths_and_ranges_out_of_bounds_are_clamped(device: devices.Device) -> None:
    """Looking at them would wait for the device, so they are not refused there."""
    arguments = call("cudnn masks", "float32") | {"bias_k": None, "add_zero_attn": True}
    wild = {"attn_mask": RANGES * 3 - 5, "key_padding_mask": np.array([[QUERIES + 5, -3], [-7, KEYS + 100]])}
    tame = {
        "attn_mask": np.clip(wild["attn_mask"], 0, KEYS),
        "key_padding_mask": np.clip(wild["key_padding_mask"], 0, [[QUERIES], [KEYS]]),
    }
    with pytest.raises(ValueError, match="0 <= first"):
        run(arguments | wild, devices.HOST)
    found, right = run(arguments | wild, device), run(arguments | tame, device)
    np.testing.assert_array_equal(found[0], right[0])
    for name, gradient in right[2].items():
        np.testing.assert_array_equal(found[2][name], gradient, err_msg=name)


@pytest.mark.parametrize("name", OPTIONS)
def test_nothing_waits_for_the_device(
    name: str, emulated: emulator.runtime.Emulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No value comes back to the host, so that a call can be captured in a graph."""
    place = devices.get("emulated")
    arguments = place.put(call(name, "float32"))

    def refuse(_: Any) -> Any:
        raise RuntimeError("the host waits for a value")

    for method in ("__bool__", "__int__", "__float__", "__index__", "tolist"):
        monkeypatch.setattr(emulator.Array, method, refuse, raising=False)
    result = mha.multi_head_attention(**arguments)
    up = place.put(normal(*result.attn_output.shape, dtype=np.float32))
    mha.multi_head_attention_backward(up, result, mask_gradients=True)
    assert emulated.launched
    with pytest.raises(RuntimeError, match="waits"):
        bool(up.any())


def test_a_module(device: devices.Device) -> None:
    """Trained, frozen, copied and pickled, it gives what the module with NumPy's arrays gives."""
    made = {}
    x, up = normal(2, 5, WIDTH, dtype=np.float32), normal(2, 5, WIDTH, dtype=np.float32, salt=1)
    for place in (device, devices.HOST):
        mha.seed(3)
        module = mha.MultiHeadAttention(WIDTH, HEADS, 0.2, 0.1, add_bias_kv=True, xp=place.library)
        inputs = [place.put(x)] * 3
        outputs = [module(*inputs)[0]]
        gradients = module.backward(place.put(up))._asdict()
        module.freeze()
        for each in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module)), module.train()):
            mha.seed(4)
            outputs.append(each(*inputs)[0])
        state = {name: place.get(value) for name, value in module.state_dict().items()}
        other = mha.MultiHeadAttention(WIDTH, HEADS, add_bias_kv=True, xp=place.library)
        other.load_state_dict(state)
        outputs.append(other.eval()(*inputs)[0])
        made[place.name] = place.get([*outputs, *(g for g in gradients.values() if g is not None)])
    assert len(made["host"]) == 12
    for i, (found, right) in enumerate(zip(made[device.name], made["host"], strict=True)):
        assert_alike(found, right, "float32", str(i))


def modules(place: devices.Device, dtype: str) -> dict[str, Any]:
    """Modules of the front ends, in training."""
    own = {"device": place.own_name, "dtype": dtype}
    return {
        "torch": torch.MultiheadAttention(WIDTH, HEADS, 0.2, **own),
        "ivy": ivy.MultiHeadAttention(WIDTH, num_heads=HEADS, dropout_rate=0.2, **own),
        "rtorch": rtorch.nn_multihead_attention(WIDTH, HEADS, 0.2, add_bias_kv=True, batch_first=True, **own),
        "paddle": paddle.FusedMultiHeadAttention(WIDTH, HEADS, 0.3, 0.2, **own),
        "paddle, norm before": paddle.FusedMultiHeadAttention(WIDTH, HEADS, 0.3, 0.2, normalize_before=True, **own),
    }


@pytest.mark.parametrize("dtype", DTYPES)
def test_modules_of_other_systems(dtype: str, device: devices.Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", device.library)
    made: dict[str, Any] = {}
    x, up = normal(4, 6, WIDTH, dtype=DTYPES[dtype]), normal(4, 6, WIDTH, dtype=DTYPES[dtype], salt=1)
    for place in (device, devices.HOST):
        mha.seed(5)
        results = {}
        for name, module in modules(place, dtype).items():
            query = place.put(x)
            output = module(query, query, query) if "torch" in name else module(query)
            gradients = module.backward(place.put(up))
            results[name] = place.get([output, gradients.query, *gradients.parameters.values()])
        made[place.name] = results
    for name, right in made["host"].items():
        first = right[0]
        if isinstance(first, tuple):
            assert_alike(made[device.name][name][0][1], first[1], dtype, f"weights of {name}")
            first, made[device.name][name][0] = first[0], made[device.name][name][0][0]
        for i, (one, other) in enumerate(zip(made[device.name][name], [first, *right[1:]], strict=True)):
            assert_alike(one, other, dtype, f"{name} {i}")


def test_ragged_lists(device: devices.Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", device.library)
    made = {}
    parts = [normal(n, WIDTH, dtype=np.float32) for n in (3, 7, 1)]
    for place in (device, devices.HOST):
        mha.seed(6)
        module = torch.MultiheadAttention(WIDTH, HEADS, batch_first=True, device=place.own_name)
        there = [place.put(part) for part in parts]
        output, weights = module(there, there, there)
        gradients = module.backward(there)
        made[place.name] = place.get([*output, *weights, *gradients.query, *gradients.parameters.values()])
    for i, (found, right) in enumerate(zip(made[device.name], made["host"], strict=True)):
        assert_alike(found, right, "float32", str(i))
