"""`python -m mha convert`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mha.__main__ import main
from mha.convert import FROM, TO, auto, load, load_tensors, save

from .layers import for_format
from .test_files import model
from .test_formats import same


def run(*arguments: Any) -> int:
    return main(["convert", *map(str, arguments)])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "gpt2.safetensors", tmp_path / "torch.npz"
    save(source, model())
    assert run(source, target, "--to", "torch", "--heads", 4, "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "c_attn.weight (12, 36) float32  ->  in_proj_weight (36, 12)" in printed
    assert "2 layers, 1 other tensors unchanged; nothing is written" in printed
    assert not target.exists()
    assert run(source, target, "--to", "torch", "--heads", 4) == 0
    found = load_tensors(target)
    assert (found.pop("norm.weight") == 1).all()
    for i in range(2):
        prefix = f"layers.{i}.attn."
        assert same(auto(found, 4, prefix), for_format("gpt2", i))
    assert len(found) == 8
    back = tmp_path / "back.safetensors"
    assert run(target, back, "--to", "gpt2", "--heads", 4) == 0
    for name, x in load_tensors(back).items():
        assert x.tobytes() == model()[name].tobytes()


def test_the_command_and_packed_files(tmp_path: Path) -> None:
    source, packed, back = (tmp_path / name for name in ("a.safetensors", "p.safetensors", "b.npz"))
    save(source, model())
    assert run(source, packed, "--to", "packed", "--heads", 4) == 0
    assert same(load(packed, prefix="layers.1.attn."), for_format("gpt2", 1))
    assert run(packed, back, "--to", "gpt2") == 0
    assert load_tensors(back).keys() == model().keys()
    for name, x in load_tensors(back).items():
        assert x.tobytes() == model()[name].tobytes()


def test_the_command_leaves_other_packed_layers_readable(tmp_path: Path) -> None:
    first, second = tmp_path / "a.npz", tmp_path / "b.npz"
    save(first, model() | {"logit_scale": np.array(2.5, "f4")})
    for i, source in enumerate((first, second)):
        assert run(source, second, "--to", "packed", "--heads", 4, "--prefix", f"layers.{i}.") == 0
    for i in range(2):
        assert same(load(second, prefix=f"layers.{i}.attn."), for_format("gpt2", i))
    assert load_tensors(second)["logit_scale"].shape == ()


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "m.npz", tmp_path / "t.npz"
    save(source, TO["bloom"](for_format("bloom"), "h.0."))
    for arguments, message in (
        (("--to", "torch"), "Give num_heads"),
        (("--to", "torch", "--heads", 4), "are those of gpt_neox, bloom"),
        (("--to", "t5", "--heads", 4, "--from", "bloom"), "cannot hold this layer"),
        (("--to", "torch", "--heads", 4, "--prefix", "x."), "no attention layer of a known format under 'x.'"),
    ):
        assert run(source, target, *arguments) == 1
        assert message in capsys.readouterr().err
        assert not target.exists()
    assert run(tmp_path / "absent.npz", target, "--to", "torch") == 1
    assert "No such file" in capsys.readouterr().err
    assert run(tmp_path / "absent.npz", tmp_path / "t.pt", "--to", "torch", "--dry-run") == 1
    assert "neither .safetensors nor .npz" in capsys.readouterr().err, "before the source is read"
    with pytest.raises(SystemExit):
        run(source, target, "--to", "torch", "--heads", 0)
    assert "argument --heads: invalid count value: '0'" in capsys.readouterr().err
    assert run(source, target, "--to", "torch", "--heads", 4, "--from", "bloom") == 0


def test_the_command_chooses_layers_by_their_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "m.npz", tmp_path / "t.npz"
    llama = TO["llama"](for_format("llama"), "text.") | {"text.rotary_emb.inv_freq": np.ones(2, "f4")}
    save(source, model() | llama | TO["bloom"](for_format("bloom"), "h.0."))
    assert run(source, target, "--to", "torch", "--heads", 4) == 1
    assert "layer 'h.0.': the names under prefix 'h.0.' are those of" in capsys.readouterr().err
    assert not target.exists()
    assert run(source, target, "--to", "torch", "--heads", 4, "--from", "llama") == 0
    # Two layers of GPT-2 and one of BLOOM with four tensors each, a norm, a table of positions.
    assert f"{target}: 1 layers as torch, 14 other tensors unchanged" in capsys.readouterr().out
    assert same(auto(load_tensors(target), 4, "text."), for_format("llama"))
    assert run(source, target, "--to", "torch", "--heads", 4, "--from", "t5") == 1
    assert "no attention layer of t5 under ''" in capsys.readouterr().err


def test_the_command_line_itself(tmp_path: Path) -> None:
    made = subprocess.run(
        [sys.executable, "-m", "mha", "convert", "--help"], capture_output=True, text=True, timeout=60
    )
    assert made.returncode == 0
    for name in FROM:
        assert name in made.stdout
