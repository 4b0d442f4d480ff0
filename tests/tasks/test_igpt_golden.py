"""iGPT against numbers of the released code: loss, gradients, and both layouts of its weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_fixtures import Golden, looks_at

from sslvit.checkpoint import load_encoder
from sslvit.layouts import to_sslvit
from sslvit.models.igpt import IGPTModel, pixel_nll
from sslvit.settings.palette import read_palette
from sslvit.tasks.released import igpt_from_state, load_igpt


def model_of(golden: Golden) -> IGPTModel:
    return igpt_from_state(golden.under("param/"), heads=golden.config["n_head"])


def images_of(golden: Golden, model: IGPTModel) -> torch.Tensor:
    return model.encoder.patch_embed.images_of(golden["input/pixels"], model.encoder.settings.grid)


@looks_at(
    ["igpt_model", "igpt_model_nobias"], "grad/*", "info/*", "output/logits", "output/loss", "output/official_tf/*",
    "output/hf_internal_loss",
)  # fmt: skip
def test_loss_logits_and_gradients(golden: Golden) -> None:
    model = model_of(golden)
    images, pixels = images_of(golden, model), golden["input/pixels"]
    logits = model.head(model.encoder(images))
    golden.check("output/logits", logits)
    loss = model.loss(images).loss
    golden.check("output/loss", loss.detach())
    # transformers' own loss shifts once more: the output that predicts pixel i + 1 against pixel i
    golden.check("output/hf_internal_loss", pixel_nll(logits[:, :-1], pixels[:, :-1]).detach())
    if golden.name == "igpt_model_nobias":
        golden.check("output/official_tf/logits", logits)
        golden.check("output/official_tf/loss", loss.detach())
        apart = (golden["output/logits"] - golden["output/official_tf/logits"]).abs().max()
        assert float(apart) == pytest.approx(golden.info["hf_vs_official_tf_max_abs_logit_diff"])
        apart = (golden["output/loss"] - golden["output/official_tf/loss"]).abs()
        assert float(apart) == pytest.approx(golden.info["hf_vs_official_tf_abs_loss_diff"])
    loss.backward()
    encoder = model.encoder
    pixels = encoder.patch_embed
    ours = {
        "wpe.weight": encoder.pos_embed.grad[0],
        "wte.weight": torch.cat([pixels.embed.weight.grad, pixels.start_token.grad[0]]),
        "ln_f.weight": encoder.norm.weight.grad, "lm_head.weight": model.head.weight.grad,
    }  # fmt: skip
    for number, block in enumerate(encoder.blocks):
        parts = {"attn.c_attn": block.attn.qkv, "attn.c_proj": block.attn.proj, "mlp.c_fc": block.mlp.fc1,
                 "mlp.c_proj": block.mlp.fc2, "ln_1": block.norm1, "ln_2": block.norm2}  # fmt: skip
        for theirs, part in parts.items():
            ours[f"h.{number}.{theirs}.weight"] = part.weight.grad.T if part.weight.ndim == 2 else part.weight.grad
            if getattr(part, "bias", None) is not None:
                ours[f"h.{number}.{theirs}.bias"] = part.bias.grad
    stored = golden.keys_under("grad/")
    assert stored
    for key in stored:
        golden.check(f"grad/{key}", ours[key.removeprefix("transformer.")])


def tensorflow_names(golden: Golden) -> dict[str, np.ndarray]:
    """The fixture's weights as the released TensorFlow variables hold them (the fixture's "conventions")."""
    heads = golden.config["n_head"]
    state = {key.removeprefix("transformer."): value.numpy() for key, value in golden.under("param/").items()}
    width = state["wte.weight"].shape[1]
    found = {
        "model/wte": state["wte.weight"][:-1], "model/sos": state["wte.weight"][-1], "model/wpe": state["wpe.weight"],
        "model/wtet": state["lm_head.weight"], "model/ln_f/g": state["ln_f.weight"],
        "model/clf": np.zeros((width, 10), np.float32), "global_step": np.array(1),
        "model/wte/Adam": np.zeros_like(state["wte.weight"][:-1]),
    }  # fmt: skip
    split = (heads, width // heads, width)
    for number in range(golden.config["n_layer"]):
        ours, theirs = f"h.{number}.", f"model/h{number}/"
        parts = np.split(state[f"{ours}attn.c_attn.weight"].T, 3)  # each (out, in)
        found |= {f"{theirs}attn/{p}_proj": part.reshape(split) for p, part in zip("qkv", parts, strict=True)}
        found[f"{theirs}attn/c_proj"] = state[f"{ours}attn.c_proj.weight"].reshape(split)
        for norm in ("ln_1", "ln_2"):
            found[f"{theirs}{norm}/g"] = state[f"{ours}{norm}.weight"]
        for linear in ("c_fc", "c_proj"):
            found[f"{theirs}mlp/{linear}/w"] = state[f"{ours}mlp.{linear}.weight"][None]
    return found


@pytest.mark.parametrize("prefix", ["model/", ""])
def test_tensorflow_variables_exported_as_arrays(tmp_path: Path, prefix: str) -> None:
    golden = Golden("igpt_model_nobias")
    variables = {name.replace("model/", prefix, 1): value for name, value in tensorflow_names(golden).items()}
    np.savez(tmp_path / "model.npz", **variables)
    model = load_igpt(tmp_path / "model.npz", palette="uniform")  # the heads are in the shapes
    assert not model.encoder.settings.bias
    golden.check("output/official_tf/logits", model.head(model.encoder(images_of(golden, model))))
    encoder = load_encoder(tmp_path / "model.npz")
    golden.check("output/ln_f", encoder(images_of(golden, model)))


class Trap:
    """An object that makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_an_array_file_with_objects_is_refused_before_anything_in_it_runs(tmp_path: Path) -> None:
    np.savez(tmp_path / "model.npz", wte=np.array([Trap(tmp_path / "trace")], dtype=object))
    for load in (load_igpt, load_encoder):
        with pytest.raises(ValueError, match=r"model.npz: not a readable checkpoint \(.*allow_pickle"):
            load(tmp_path / "model.npz")
    assert not (tmp_path / "trace").exists()
    with np.load(tmp_path / "model.npz", allow_pickle=True) as arrays:
        arrays["wte"]
    assert (tmp_path / "trace").exists()  # it would have


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("model/wpe", "not iGPT's weights"),
        ("model/h0/attn/q_proj", "'h0/attn/q_proj' is missing"),
        ("model/h1/mlp/c_fc/w", r"missing: blocks.1.mlp.fc1.weight\)"),
        ("model/ln_f/g", "'ln_f.weight' is missing"),
    ],
)
def test_a_file_with_missing_weights_is_refused(tmp_path: Path, missing: str, said: str) -> None:
    variables = tensorflow_names(Golden("igpt_model_nobias"))
    variables.pop(missing)
    np.savez(tmp_path / "model.npz", **variables)
    with pytest.raises(ValueError, match=said):
        load_igpt(tmp_path / "model.npz", palette="uniform")
    torch.save(Golden("mae_model").under("param/"), tmp_path / "mae.pth")
    with pytest.raises(ValueError, match="not iGPT's weights"):
        load_igpt(tmp_path / "mae.pth")


def test_the_released_sizes_have_their_heads() -> None:
    from sslvit.layouts.openai_igpt import released_heads

    assert [released_heads(*shape) for shape in ((512, 24), (1024, 36), (1536, 48), (512, 3))] == [8, 8, 16, None]
    with torch.device("meta"):  # iGPT-M, whose heads are 128 wide, without its 2 GB
        state = {
            "wte.weight": torch.empty(513, 1024), "wpe.weight": torch.empty(1024, 1024),
            "ln_f.weight": torch.empty(1024),
        }  # fmt: skip
        for number in range(36):
            state[f"h.{number}.mlp.c_fc.weight"] = torch.empty(1024, 4096)
        assert to_sslvit(state).settings.heads == 8


def test_a_released_file_takes_the_released_palette(tmp_path: Path) -> None:
    golden, colors = Golden("igpt_model"), Golden("palette")["input/palette"]
    np.save(tmp_path / "kmeans_centers.npy", colors.numpy())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"clusters": colors.tolist(), "size": 32}))
    torch.save(golden.under("param/"), tmp_path / "pytorch_model.bin")
    palettes = [read_palette(tmp_path / name) for name in ("kmeans_centers.npy", "preprocessor_config.json")]
    for palette in palettes:
        model = load_igpt(tmp_path / "pytorch_model.bin", golden.config["n_head"], palette=palette)
        assert torch.equal(model.encoder.patch_embed.palette, colors)
        assert torch.equal(model.encoder.patch_embed.quantize(images_of(golden, model)), golden["input/pixels"])
        golden.check("output/logits", model.head(model.encoder(images_of(golden, model))))
    by_file = load_igpt(tmp_path / "pytorch_model.bin", heads=4, palette=tmp_path / "kmeans_centers.npy")
    assert torch.equal(by_file.encoder.patch_embed.palette, colors)
    with pytest.raises(ValueError, match="does not hold its colors. Give --palette FILE"):
        load_igpt(tmp_path / "pytorch_model.bin", heads=4)
    with pytest.raises(ValueError, match="2 colors for a model of 512"):
        load_igpt(tmp_path / "pytorch_model.bin", heads=4, palette=[[0.0] * 3, [1.0] * 3])


def test_a_model_without_its_output_matrix_is_no_igpt() -> None:
    state = Golden("igpt_model").under("param/")
    state.pop("lm_head.weight")
    with pytest.raises(ValueError, match="no output matrix"):
        igpt_from_state(state, heads=4)
