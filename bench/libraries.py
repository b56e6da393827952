"""One table of calls per library: kind of job -> a function that makes the timed call from its arrays.

A call returns its result, or a tuple of them, as the library has them; `plain` makes arrays of those. A library that
is not installed, or has nothing for a job, is passed over with a reason. A call may have a member `before`, which runs
untimed before each call, and `checked`, which is called instead of it where its results are to be checked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from bench.cases import WINDOW, Job

Call = Callable[[], Any]
Calls = dict[str, Callable[[Job, dict[str, Any]], Call]]

#: Dropout of the weights in the training of a layer.
_DROPOUT = 0.1


class NotOffered(Exception):
    """Why a library has no row."""


def mha_calls(threads: int) -> Calls:
    """This package."""
    import mha
    from mha.cpu import pack, product
    from mha.matrix import rows_of

    def options(job: Job, a: dict[str, Any]) -> dict[str, Any]:
        mha.set_num_threads(job.threads or threads)
        given: dict[str, Any] = {"is_causal": job.causal or job.mask == "window"}
        if job.mask == "window":
            given["window"] = WINDOW
        if "attn_mask" in a:
            given["attn_mask"] = a["attn_mask"]
        return given | {"enable_gqa": job.sizes[1] != job.sizes[2]}

    def attention(job: Job, a: dict[str, Any]) -> Call:
        given = options(job, a)
        return lambda: mha.scaled_dot_product_attention(a["query"], a["key"], a["value"], **given)

    def training(job: Job, a: dict[str, Any]) -> Call:
        inputs, given = (a["query"], a["key"], a["value"]), options(job, a)

        def call() -> Any:
            output, lse = mha.scaled_dot_product_attention(*inputs, **given, return_lse=True)
            gradients = mha.scaled_dot_product_attention_backward(a["grad"], *inputs, output, lse, **given)
            return output, gradients.query

        return call

    def module_of(job: Job, a: dict[str, Any], dropout: float = 0.0) -> Any:
        mha.set_num_threads(job.threads or threads)
        module = mha.MultiHeadAttention(job.sizes[2], job.sizes[3], dropout, dtype=a["vector"].dtype)
        module.load_state_dict({"io_weight_bias": a["vector"]})
        return module

    def layer(job: Job, a: dict[str, Any]) -> Call:
        module = module_of(job, a).freeze()
        return lambda: module(a["x"], a["x"], a["x"])[0]

    def layer_weights(job: Job, a: dict[str, Any]) -> Call:
        module = module_of(job, a).freeze()
        return lambda: module(a["x"], a["x"], a["x"], need_weights=True, average_attn_weights=True)

    def layer_training(job: Job, a: dict[str, Any]) -> Call:
        def call_of(module: Any) -> Call:
            def call() -> Any:
                output, _ = module(a["x"], a["x"], a["x"])
                gradients = module.backward(a["grad"])
                return output, gradients.query + gradients.key + gradients.value

            return call

        call = call_of(module_of(job, a, _DROPOUT).train())
        call.checked = call_of(module_of(job, a).train())  # type: ignore[attr-defined]
        return call

    def products(job: Job, a: dict[str, Any]) -> Call:
        mha.set_num_threads(job.threads or threads)
        left, right = rows_of(a["left"]), rows_of(a["right"])
        left = left.T if job.transposed == "left" else left
        right = right.T if job.transposed == "right" else right
        out = np.empty((left.shape[0], right.shape[1]), np.float32)
        operand = pack(right) if job.prepacked else right

        def call() -> Any:
            product(left, operand, rows_of(out))
            return out

        return call

    def beside(job: Job, a: dict[str, Any]) -> Call:
        module, x = mha.MultiHeadAttention(256, 4).eval(), np.ones((1, 96, 256), np.float32)
        call = numpy_calls(threads)["product"](job, a)
        call.before = lambda: module(x, x, x)  # type: ignore[attr-defined]
        return call

    return {"attention": attention, "training": training, "layer": layer, "layer_weights": layer_weights,
            "layer_training": layer_training, "product": products, "beside": beside}  # fmt: skip


def numpy_calls(threads: int) -> Calls:
    """Unfused NumPy, as one writes it."""

    def attention(job: Job, a: dict[str, Any]) -> Call:
        _, heads, kv_heads, queries, keys, d = job.sizes
        if job.dtype not in ("float32", "float64") or job.mask or heads != kv_heads:
            raise NotOffered("only plain float32 and float64 attention is compared")
        hidden = ~np.tri(queries, keys, dtype=bool) if job.causal else None
        scale = a["query"].dtype.type(d**-0.5)

        def call() -> Any:
            scores = a["query"] @ a["key"].swapaxes(-1, -2) * scale
            if hidden is not None:
                scores[..., hidden] = -np.inf
            scores -= scores.max(axis=-1, keepdims=True)
            np.exp(scores, out=scores)
            scores /= scores.sum(axis=-1, keepdims=True)
            return scores @ a["value"]

        return call

    def layer(job: Job, a: dict[str, Any]) -> Call:
        if job.dtype != "float32":
            raise NotOffered("only float32 layers are compared")
        n, length, width, heads = job.sizes
        weights = a["vector"][: 4 * width * width].reshape(4, width, width)
        biases = a["vector"][4 * width * width :].reshape(4, width)

        def call() -> Any:
            q, k, v = ((a["x"] @ weights[i] + biases[i]).reshape(n, length, heads, -1).swapaxes(1, 2) for i in range(3))
            scores = q @ k.swapaxes(-1, -2) * np.float32((width // heads) ** -0.5)
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            z = (scores / scores.sum(-1, keepdims=True)) @ v
            return z.swapaxes(1, 2).reshape(n, length, width) @ weights[3] + biases[3]

        return call

    def products(job: Job, a: dict[str, Any]) -> Call:
        left = a["left"].T if job.transposed == "left" else a["left"]
        right = a["right"].T if job.transposed == "right" else a["right"]
        out = np.empty((left.shape[0], right.shape[1]), np.float32)
        return lambda: np.matmul(left, right, out=out)

    return {"attention": attention, "layer": layer, "product": products, "beside": products}


def torch_calls(threads: int) -> Calls:
    """PyTorch on the CPU."""
    import torch

    torch.set_num_threads(threads)
    core = torch.nn.functional.scaled_dot_product_attention

    def tensor(x: Any) -> Any:
        if x.dtype.name == "bfloat16":
            return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(x)

    def options(job: Job, a: dict[str, Any]) -> dict[str, Any]:
        given: dict[str, Any] = {"is_causal": job.causal, "enable_gqa": job.sizes[1] != job.sizes[2]}
        if job.mask == "window":
            row, column = torch.arange(job.sizes[3])[:, None], torch.arange(job.sizes[4])
            given["attn_mask"] = (column <= row) & (column >= row - WINDOW)
        if "attn_mask" in a:
            given["attn_mask"] = tensor(a["attn_mask"])
        return given

    def attention(job: Job, a: dict[str, Any]) -> Call:
        tensors, given = [tensor(a[name]) for name in ("query", "key", "value")], options(job, a)

        def call() -> Any:
            with torch.inference_mode():
                return core(*tensors, **given)

        return call

    def training(job: Job, a: dict[str, Any]) -> Call:
        tensors = [tensor(a[name]).requires_grad_() for name in ("query", "key", "value")]
        grad, given = tensor(a["grad"]), options(job, a)

        def call() -> Any:
            output = core(*tensors, **given)
            return output.detach(), torch.autograd.grad(output, tensors, grad)[0]

        return call

    def module_of(job: Job, a: dict[str, Any], dropout: float = 0.0) -> Any:
        width, heads = job.sizes[2:]
        from mha import PackedLayout, convert

        layout = PackedLayout(width, heads, qbias=True, kbias=True, vbias=True, obias=True)
        state = convert.to_torch(convert.PackedParameters(a["vector"], layout))
        module = torch.nn.MultiheadAttention(width, heads, dropout, batch_first=True, dtype=tensor(a["vector"]).dtype)
        module.load_state_dict({name: tensor(value) for name, value in state.items()})
        return module

    def layer(job: Job, a: dict[str, Any]) -> Call:
        module, x, wanted = module_of(job, a).eval(), tensor(a["x"]), job.kind == "layer_weights"

        def call() -> Any:
            with torch.inference_mode():
                output, weights = module(x, x, x, need_weights=wanted)
                return (output, weights) if wanted else output

        return call

    def layer_training(job: Job, a: dict[str, Any]) -> Call:
        x, grad = tensor(a["x"]).requires_grad_(), tensor(a["grad"])

        def call_of(module: Any) -> Call:
            wanted = [x, *module.parameters()]

            def call() -> Any:
                output = module(x, x, x, need_weights=False)[0]
                return output.detach(), torch.autograd.grad(output, wanted, grad)[0]

            return call

        call = call_of(module_of(job, a, _DROPOUT).train())
        call.checked = call_of(module_of(job, a).train())  # type: ignore[attr-defined]
        return call

    def products(job: Job, a: dict[str, Any]) -> Call:
        left, right = tensor(a["left"]), tensor(a["right"])
        left = left.T if job.transposed == "left" else left
        right = right.T if job.transposed == "right" else right
        out = torch.empty((left.shape[0], right.shape[1]))
        return lambda: torch.mm(left, right, out=out)

    return {"attention": attention, "training": training, "layer": layer, "layer_weights": layer,
            "layer_training": layer_training, "product": products}  # fmt: skip


def onnxruntime_calls(threads: int) -> Calls:
    """onnxruntime's MultiHeadAttention, a model of one node."""
    import onnxruntime
    from onnx import TensorProto, helper

    def attention(job: Job, a: dict[str, Any]) -> Call:
        n, heads, kv_heads, queries, _, d = job.sizes
        if job.causal or job.mask or job.dtype != "float32" or heads != kv_heads:
            raise NotOffered("only plain float32 attention is compared")
        flat = [np.ascontiguousarray(a[name].swapaxes(1, 2)).reshape(n, -1, heads * d)
                for name in ("query", "key", "value")]  # fmt: skip
        values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("q", "k", "v", "o")]
        node = helper.make_node("MultiHeadAttention", ["q", "k", "v"], ["o"], domain="com.microsoft", num_heads=heads)
        graph = helper.make_graph([node], "attention", values[:3], values[3:])
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        feed = dict(zip(("q", "k", "v"), flat, strict=True))

        def call() -> Any:
            out = session.run(None, feed)[0]
            return out.reshape(n, queries, heads, -1).swapaxes(1, 2)

        return call

    return {"attention": attention}


LIBRARIES: dict[str, Callable[[int], Calls]] = {
    "mha": mha_calls,
    "numpy": numpy_calls,
    "torch": torch_calls,
    "onnxruntime": onnxruntime_calls,
}


def plain(result: Any) -> tuple[Any, ...]:
    """NumPy arrays of any library's results."""
    results = result if isinstance(result, tuple) else (result,)
    return tuple(_array(x) for x in results)


def _array(x: Any) -> Any:
    if not hasattr(x, "numpy"):
        return np.asarray(x)
    return x.float().numpy() if str(x.dtype) == "torch.bfloat16" else x.numpy()
