"""Weights that are not finite are refused while they are written."""

import ml_dtypes
import numpy as np
import pytest
from layouts import SMALL, draw, lora_names, write_layout
from safetensors.numpy import load_file, save_file

from anchor_jax.cli.main import main
from anchor_jax.errors import UserError
from anchor_jax.porting import port
from anchor_jax.porting.finite import Watch
from anchor_jax.weights import checkpoint


def spoil(path, name, value=np.nan):
    arrays = load_file(path)
    arrays[name] = arrays[name].copy()
    arrays[name].flat[:3] = value
    save_file(arrays, path)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_generator_that_is_not_finite_is_refused(tmp_path, dtype, value):
    folder, _ = write_layout(tmp_path / "in", "wan", dtype=dtype)
    name = "blocks.1.ffn.0.weight"
    spoil(folder / "diffusion_pytorch_model.safetensors", name, value)

    with pytest.raises(UserError, match=rf"generator params: {name} has values.* 3 of"):
        port.run(port.plan(folder), tmp_path / "out")

    assert {*tmp_path.iterdir()} == {folder}


def test_adapters_that_are_not_finite_are_refused(tmp_path, caplog):
    folder, _ = write_layout(tmp_path / "in", "wan")
    arrays = {
        name.replace("base_model.model", "diffusion_model"): array
        for name, array in draw(lora_names(SMALL), np.float32, 0).items()
    }
    save_file(arrays, tmp_path / "lora.safetensors")
    name = "blocks.2.cross_attn.k.lora_B.weight"
    spoil(tmp_path / "lora.safetensors", f"diffusion_model.{name}")
    plan = port.plan(folder, lora=tmp_path / "lora.safetensors", method="wan")

    with pytest.raises(UserError, match=rf"generator lora: .*{name} has values"):
        port.run(plan, tmp_path / "out")

    # Nor does the library log the error beside the message.
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.slow
def test_they_are_ported_and_counted_on_request(tmp_path, capsys):
    folder, _ = write_layout(tmp_path / "in", "wan")
    path = folder / "diffusion_pytorch_model.safetensors"
    spoil(path, "blocks.1.ffn.0.weight")
    spoil(path, "head.head.bias", np.inf)
    watch = Watch(keeps=True)

    port.run(port.plan(folder), tmp_path / "out", watch=watch)

    assert watch.found == {"generator params": 6}
    assert "generator" in checkpoint.items(tmp_path / "out")
    flags = ["port", f"--wan={folder}", f"--out={tmp_path / 'again'}"]
    assert main(flags) == 2
    assert "are not finite" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()
    assert main([*flags, "--allow_nonfinite"]) == 0
    assert (
        "warning: generator params has 6 NaN or infinite values"
        in capsys.readouterr().out
    )
