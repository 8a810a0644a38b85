"""Official weights load with no name given, answer as the official code did, and go back bit for bit."""

import io
import logging
import re
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from vitrail import npz
from vitrail.checkpoints import export_names, load_model
from vitrail.checkpoints.assemble import assemble
from vitrail.checkpoints.foreign import to_arrays
from vitrail.checkpoints.vit_names import BIG_VISION, VIT, VIT_PUBLISHED, official_table
from vitrail.config.vit import ViTConfig
from vitrail.errors import UserError
from vitrail.models import ImageModel, build

GOLDEN = Path(__file__).parent / "golden"
OFFICIAL = {
    "vit_token": "vit",
    "vit_gap": "vit",
    "vit_token_published_prelogits": "vit-published",
    "bigvision_tok": "big-vision",
    "bigvision_gap_sincos_rep": "big-vision",
    "bigvision_map": "big-vision",
}
NAMES = ("vit", "vit-published", "big-vision")
TINY = ViTConfig(image_size=(12, 12), patch_size=(4, 4), num_classes=5, width=16, depth=2, mlp_dim=24, heads=4)


def read_npz(path: Path) -> dict[str, np.ndarray]:
    return npz.read_npz(path, limit=10**8, advice="it is not read.")


def weights(name: str) -> Path:
    return GOLDEN / f"{name}.weights.npz"


def pictures(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array).permute(0, 3, 1, 2)


def assert_close(ours: Tensor, official: np.ndarray) -> None:
    bound = 1e-5 * max(1.0, float(np.abs(official).max()))
    assert ours.shape == official.shape
    assert float((ours - torch.from_numpy(official)).abs().max()) <= bound


def random_model(config: ViTConfig) -> ImageModel:
    model = build(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def assert_same_arrays(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        assert ours[name].dtype == array.dtype
        assert ours[name].shape == array.shape
        assert ours[name].tobytes() == array.tobytes(), name


@torch.no_grad()
@pytest.mark.parametrize("name", OFFICIAL)
def test_official_weights_give_the_official_answer_with_no_name_given(name: str) -> None:
    answers = read_npz(GOLDEN / f"{name}.io.npz")
    model = load_model(weights(name))
    images = pictures(answers["images_nhwc"])
    assert_close(model(images), answers["logits"])
    assert not model.training
    if "pre_logits" in answers:
        assert_close(model.features(images), answers["pre_logits"])


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit_token", "vit_gap"])
def test_official_weights_at_another_resolution_give_the_official_answer(name: str) -> None:
    answers = read_npz(GOLDEN / f"{name}.io.npz")
    images = pictures(answers["resized_images_nhwc"])
    model = load_model(weights(name), image_size=images.shape[-1])
    assert model.config.image_size == model.preprocessing.image_size == images.shape[-2:]
    assert_close(model.state_dict()["positions"], answers["resized_pos_embedding"])
    assert_close(model(images), answers["resized_logits"])
    assert_close(load_model(weights(name))(images), answers["resized_logits"])  # resized on the way


def test_the_configuration_is_read_off_the_arrays() -> None:
    expected = {
        "vit_token": ViTConfig(width=32, heads=4, depth=3, mlp_dim=64, num_classes=10),
        "vit_gap": ViTConfig(width=32, heads=2, depth=2, mlp_dim=64, num_classes=10, pool="gap", image_size=(40, 40)),
        "vit_token_published_prelogits": ViTConfig(
            width=48, heads=3, depth=2, mlp_dim=96, num_classes=21, pre_logits=48
        ),
        "bigvision_tok": ViTConfig(width=32, heads=4, depth=3, mlp_dim=64, num_classes=10, positions="learned-patches"),
        "bigvision_gap_sincos_rep": ViTConfig(
            width=32, heads=4, depth=2, mlp_dim=64, num_classes=10, pool="gap", positions="sincos", pre_logits=32
        ),
        "bigvision_map": ViTConfig(
            width=32, heads=4, depth=2, mlp_dim=64, num_classes=10, pool="map", patch_size=(7, 7), image_size=(28, 28)
        ),
    }
    sizes = {"bigvision_gap_sincos_rep": (224, 224), "vit_gap": (40, 40), "bigvision_map": (28, 28)}
    for name, config in expected.items():
        patch = config.patch_size if name == "bigvision_map" else (8, 8)
        assert load_model(weights(name)).config == replace(
            config, patch_size=patch, image_size=sizes.get(name, (32, 32))
        )


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_arrays_come_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    export_names(load_model(weights(name)), tmp_path / "back.npz", OFFICIAL[name])
    assert_same_arrays(read_npz(tmp_path / "back.npz"), read_npz(weights(name)))
    assert official_table(read_npz(weights(name))).name == OFFICIAL[name]


@pytest.mark.parametrize(
    ("names", "changes"),
    [
        *[(names, {}) for names in NAMES],
        *[(names, {"pool": "gap", "num_classes": 0}) for names in NAMES],
        *[(names, {"qkv_bias": False, "pre_logits": 8}) for names in NAMES],
        ("big-vision", {"pool": "map", "channels": 1}),
        ("big-vision", {"pool": "map", "positions": "sincos", "image_size": (224, 224)}),
        ("big-vision", {"positions": "learned-patches", "patch_size": (2, 3)}),
        ("big-vision", {"positions": "sincos", "image_size": (224, 224), "depth": 11}),
    ],
)
def test_our_weights_there_and_back_are_the_same_bits(names: str, changes: dict, tmp_path: Path) -> None:
    config = replace(TINY, **changes)
    model = random_model(config)
    export_names(model, tmp_path / "weights.npz", names)
    back = load_model(tmp_path / "weights.npz", image_size=config.image_size)
    assert back.config == config
    state = model.state_dict()
    assert back.state_dict().keys() == state.keys()
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_a_not_square_table_needs_to_be_told_its_picture_size(tmp_path: Path) -> None:
    model = random_model(replace(TINY, image_size=(8, 20)))
    export_names(model, tmp_path / "wide.npz")
    with pytest.raises(UserError, match=r"wide\.npz has positions of the shape \(1, 11, 16\).*image_size="):
        load_model(tmp_path / "wide.npz")
    assert load_model(tmp_path / "wide.npz", image_size=(8, 20)).config == model.config
    with pytest.raises(UserError, match="image_size must be a list"):
        load_model(weights("vit_token"), image_size="large")


def test_names_refuse_a_model_that_the_official_code_cannot_build() -> None:
    for names, changes in [
        ("vit", {"pool": "map"}),
        ("vit-published", {"pool": "gap", "positions": "sincos"}),
        ("vit", {"positions": "learned-patches"}),
    ]:
        with pytest.raises(UserError, match=r"have no place for pool .* use names='big-vision'"):
            to_arrays(build(replace(TINY, **changes)), names)
    with pytest.raises(UserError, match="there are no names 'keras'; choose one of vit, vit-published, big-vision, "):
        export_names(build(TINY), "x.npz", "keras")


def test_what_arrays_cannot_say_is_said_in_a_warning(tmp_path: Path, caplog) -> None:
    export_names(build(TINY), tmp_path / "a.npz")
    assert not caplog.records
    export_names(build(replace(TINY, gelu="erf")), tmp_path / "a.npz", "vit")
    with caplog.at_level(logging.WARNING):
        assert "gelu='erf'" in caplog.text
    assert load_model(tmp_path / "a.npz", gelu="erf").config.gelu == "erf"


# Forms that big_vision's files have had over the years, made from its present one.


def stacked(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """As big_vision's scan writes blocks: one array per kind, with a leading axis."""
    block = re.compile(r"(.*Transformer/encoderblock)_\d+(/.*)")
    kinds: dict[str, list[np.ndarray]] = {}
    for name, array in arrays.items():
        if match := block.fullmatch(name):
            kinds.setdefault(match[1] + match[2], []).append(array)
    rest = {name: array for name, array in arrays.items() if not block.fullmatch(name)}
    return rest | {name: np.stack(parts) for name, parts in kinds.items()}


def moved(arrays: dict[str, np.ndarray], old: str, new: str) -> dict[str, np.ndarray]:
    assert any(name.startswith(old) for name in arrays)
    return {new + name.removeprefix(old) if name.startswith(old) else name: array for name, array in arrays.items()}


def variants(name: str) -> dict[str, dict[str, np.ndarray]]:
    arrays = read_npz(weights(name))
    plain = moved(arrays, "params/", "")
    found = {
        "scan": stacked(arrays),
        "no prefix": plain,
        "optimizer dump": moved(arrays, "params/", "opt/target/")
        | {
            "opt/state/step": np.array(7),
            "opt/state/param_states/cls/grad_ema": np.zeros(3),
            "extra/time": np.zeros(1),
        },
        "image tower": moved(arrays, "params/", "params/img/")
        | {"params/txt/head/kernel": np.zeros((3, 3)), "params/t": np.zeros(1), "params/b": np.zeros(1)},
        "training state": arrays | {"opt/0/mu": np.zeros(3)},
    }
    if "params/pos_embedding" in arrays:
        found["positions in the encoder"] = moved(arrays, "params/pos_embedding", "params/Transformer/pos_embedding")
        found["positions in a module"] = moved(
            arrays, "params/pos_embedding", "params/Transformer/posembed_input/pos_embedding"
        )
    if "params/MAPHead_0/probe" in arrays:
        found["pool inlined"] = moved(arrays, "params/MAPHead_0/", "params/")
        found["pool inlined, scan, dump"] = stacked(moved(plain, "MAPHead_0/", ""))
    return found


@pytest.mark.parametrize("name", ["bigvision_tok", "bigvision_gap_sincos_rep", "bigvision_map"])
def test_every_form_of_the_official_files_gives_the_same_weights(name: str) -> None:
    config, expected = BIG_VISION.to_ours(read_npz(weights(name)))
    for form, arrays in variants(name).items():
        found, state = official_table(arrays).to_ours(arrays)
        assert found == config, form
        assert state.keys() == expected.keys(), form
        assert all(torch.equal(state[key], expected[key]) for key in expected), form


def test_half_precision_and_bfloat16_arrays_are_read_exactly() -> None:
    arrays = read_npz(weights("vit_token"))
    short = {name: torch.from_numpy(array).bfloat16() for name, array in arrays.items()}
    # numpy stores what it does not know as raw bytes: that is how JAX's bfloat16 arrives
    raw = {name: tensor.view(torch.int16).numpy().view("V2") for name, tensor in short.items()}
    _, state = VIT.to_ours(raw)
    _, expected = VIT.to_ours({name: tensor.float().numpy() for name, tensor in short.items()})
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    _, state = VIT.to_ours({name: array.astype(np.float16) for name, array in arrays.items()})
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    with pytest.raises(UserError, match="head/bias has numbers of type int64"):
        VIT.to_ours(arrays | {"head/bias": np.zeros(10, dtype=np.int64)})


def test_read_only_and_big_endian_arrays_are_read() -> None:
    arrays = read_npz(weights("vit_token"))
    _, expected = VIT.to_ours(arrays)
    foreign = {name: array.astype(">f4") for name, array in arrays.items()}
    for array in arrays.values():
        array.flags.writeable = False
    for given in (arrays, foreign):
        _, state = VIT.to_ours(given)
        assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_missing_and_unknown_arrays_are_named() -> None:
    arrays = read_npz(weights("vit_token"))
    lacking = {name: array for name, array in arrays.items() if name != "Transformer/encoderblock_1/LayerNorm_1/scale"}
    with pytest.raises(UserError, match=r"weights\.npz lacks the array 'Transformer/encoderblock_1/LayerNorm_1/scale'"):
        VIT.to_ours(lacking, source="weights.npz")
    hole = {name: array for name, array in arrays.items() if "encoderblock_1/" not in name}
    with pytest.raises(UserError, match="encoderblock_1"):
        VIT.to_ours(hole)
    with pytest.raises(UserError, match="no place for: lora/a, lora/b"):
        VIT.to_ours(arrays | {"lora/a": np.zeros(3), "lora/b": np.zeros(3)})
    for number in ("2_", "1" * 5000):  # no number, and one that Python would refuse to read
        with pytest.raises(UserError, match="holds 1 arrays that this model has no place for"):
            VIT.to_ours(arrays | {f"Transformer/encoderblock_{number}/a": np.zeros(3)})
    with pytest.raises(UserError, match=r"no array 'embedding/kernel'.*official ViT files"):
        VIT.to_ours({"layer.weight": np.zeros(3)})
    with pytest.raises(UserError, match="same array under two"):
        VIT.to_ours(arrays | {"pos_embedding": arrays["Transformer/posembed_input/pos_embedding"]})


def test_arrays_of_the_wrong_shape_are_named() -> None:
    arrays = read_npz(weights("vit_token"))
    for name, array in arrays.items():
        for wrong in (array[..., None], np.zeros((0,) * array.ndim, np.float32), np.ones((), np.float32)):
            with pytest.raises(UserError):
                config, state = VIT.to_ours(arrays | {name: wrong})
                assemble(config, state, "weights.npz")


def test_pooling_with_other_heads_than_the_blocks_is_refused() -> None:
    arrays = read_npz(weights("bigvision_map"))
    name = "params/MAPHead_0/MultiHeadDotProductAttention_0/query/kernel"
    with pytest.raises(UserError, match=r"query/kernel cannot have the shape \(32, 2, 16\)"):
        BIG_VISION.to_ours(arrays | {name: arrays[name].reshape(32, 2, 16)})


def test_preprocessing_is_that_of_the_source() -> None:
    assert load_model(weights("vit_token")).preprocessing.fit == "squash"
    assert load_model(weights("bigvision_tok")).preprocessing.fit == "crop"
    assert VIT_PUBLISHED.preprocessing(TINY).mean == (0.5, 0.5, 0.5)


# Hostile and damaged files


def test_an_npz_with_python_objects_is_refused_and_nothing_runs(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "canary",))

    np.savez(tmp_path / "a.npz", weights=np.array([Hostile()], dtype=object))
    with pytest.raises(UserError, match=r"a\.npz: weights\.npy holds Python objects"):
        read_npz(tmp_path / "a.npz")
    assert not (tmp_path / "canary").exists()


def test_a_zip_bomb_is_refused_before_it_unpacks(tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (100_000_000,)})
    with (
        zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("a.npy", "w") as file,
    ):
        file.write(header.getvalue())
        for _ in range(100):
            file.write(bytes(1_000_000))
    assert (tmp_path / "bomb.npz").stat().st_size < 200_000
    with pytest.raises(UserError, match=r"bomb\.npz would unpack to 100,000,000 bytes"):
        load_model(tmp_path / "bomb.npz")


def test_a_header_that_promises_another_size_is_refused(tmp_path: Path) -> None:
    for shape in ((3,), (10**15,), (-1, -2), (2**63, 2**63)):
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
            archive.writestr("a.npy", header.getvalue() + bytes(8))
        with pytest.raises(UserError, match=r"a\.npz is damaged"):
            read_npz(tmp_path / "a.npz")


def test_two_arrays_of_one_name_and_too_many_arrays_are_refused(tmp_path: Path, monkeypatch) -> None:
    data = io.BytesIO()
    np.save(data, np.zeros(1, dtype=np.float32))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("a.npy", data.getvalue())
        archive.writestr("a", data.getvalue())
    with pytest.raises(UserError, match="two arrays of the same name"):
        read_npz(tmp_path / "a.npz")
    monkeypatch.setattr("vitrail.npz.MAX_ARRAYS", 1)
    with pytest.raises(UserError, match="holds 2 arrays"):
        read_npz(tmp_path / "a.npz")


def test_a_damaged_npz_is_refused_or_read_but_never_crashes(tmp_path: Path) -> None:
    data = weights("vit_token").read_bytes()
    random = np.random.default_rng(0)
    path = tmp_path / "damaged.npz"
    refused = 0
    for trial in range(150):
        damaged = bytearray(data)
        if trial % 3 == 0:
            damaged = damaged[: random.integers(len(data))]
        elif trial % 3 == 1:
            damaged[random.integers(len(data))] ^= 1 << random.integers(8)
        else:  # headers of the first array and the list of contents are where a parser breaks
            where = random.integers(200) if trial % 2 else len(data) - 1 - random.integers(4000)
            damaged[where] = random.integers(256)
        path.write_bytes(damaged)
        try:
            load_model(path)
        except UserError as error:
            refused += 1
            assert "damaged.npz" in str(error)
    assert refused > 100
