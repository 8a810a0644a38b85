"""An update on any machine: it never waits for the device, and what saves memory or time changes no number."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compiled_blocks import COMPILED
from families import TINY
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from updates import CPU, RECIPES, StopAt, after_updates, learner_of, micro_batches, recomputed

from vitrail.config.recipes import SupervisedConfig
from vitrail.config.run import LoopConfig, OptimConfig, RunConfig
from vitrail.data import augment
from vitrail.errors import Interrupted, UserError
from vitrail.models import ImageModel, build
from vitrail.models.blocks import compile_blocks, recompute_blocks
from vitrail.parallel import matrix_products
from vitrail.training import run_training, speed
from vitrail.training.setup import Parts, assemble, open_run_data
from vitrail.training.speed import Trial, advise_bf16, settle_compiling

# No waiting for the device

aten = torch.ops.aten
WAITING = {
    aten._local_scalar_dense,  # .item(), float(), bool(), if
    aten.nonzero,
    aten.masked_select,
    aten.equal,
    aten.is_nonzero,
    aten.unique_consecutive,
    aten.unique_dim,
    aten._unique2,
    aten.bincount,
    aten.repeat_interleave,
}
"""Operations whose result the host must have before it can go on."""


class NoWaiting(TorchDispatchMode):
    """Fails where an operation makes the host wait for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        by_mask = packet in (aten.index, aten.index_put, aten.index_put_) and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if packet in WAITING or by_mask:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "waiting",
    [
        lambda x: x.sum().item(),
        lambda x: float(x[0]),
        lambda x: bool((x > 0).all()),
        lambda x: x[x > 0],
        lambda x: x.index_put_((x > 0,), torch.zeros(())),
        lambda x: (x > 0).nonzero(),
        lambda x: nn.utils.clip_grad_norm_([nn.Parameter(x)], 1.0, error_if_nonfinite=True),
    ],
)
def test_what_waits_is_noticed(waiting: Callable[[Tensor], object]) -> None:
    values = torch.tensor([1.0, -1.0])
    if "clip_grad_norm_" in waiting.__code__.co_names:
        parameter = nn.Parameter(values)
        parameter.grad = values.clone()
        waiting = lambda x: nn.utils.clip_grad_norm_([parameter], 1.0, error_if_nonfinite=True)  # noqa: E731
    with pytest.raises(AssertionError, match="waits for the device"), NoWaiting():
        waiting(values)


@pytest.fixture
def as_on_gpu(monkeypatch) -> None:
    """What asks for values on a CPU, where that costs nothing, does without them on a GPU."""

    def one_hot(labels: Tensor, classes: int) -> Tensor:
        return (labels[..., None] == torch.arange(classes)).long()

    def flip(images: Tensor, chosen: Tensor) -> None:
        torch.where(chosen.view(-1, 1, 1, 1), images.flip(-1), images, out=images)

    monkeypatch.setattr(functional, "one_hot", one_hot)
    monkeypatch.setattr(augment, "flip", flip, raising=False)


@pytest.mark.usefixtures("as_on_gpu")
@pytest.mark.parametrize("recipe", RECIPES)
def test_an_update_of_any_recipe_never_waits_for_the_device(recipe: str) -> None:
    learner, batches = learner_of(RECIPES[recipe]), micro_batches()
    with NoWaiting():
        scalars = learner.step(batches)
    assert all(isinstance(value, Tensor) for value in scalars.values())


@pytest.mark.usefixtures("as_on_gpu")
@pytest.mark.parametrize("family", TINY)
def test_an_update_of_any_family_never_waits_for_the_device(family: str) -> None:
    config = replace(TINY[family], drop_path=0.1, dropout=0.1)
    learner, batches = learner_of(SupervisedConfig(), config), micro_batches(config)
    with NoWaiting():
        learner.step(batches)


# Activations that are computed again


def assert_same(one: Any, other: Any) -> None:
    if isinstance(one, Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            assert_same(one[name], other[name])
    elif isinstance(one, list | tuple):
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


@pytest.mark.parametrize("family", TINY)
def test_recomputing_changes_no_bit_of_an_update_of_any_family(family: str) -> None:
    """Dropout, stochastic depth and BatchNorm's statistics included."""
    config = replace(TINY[family], drop_path=0.5, dropout=0.2)
    plain = after_updates(learner_of(SupervisedConfig(), config), config)
    assert_same(plain, after_updates(recomputed(learner_of(SupervisedConfig(), config)), config))


@pytest.mark.parametrize("recipe", ["sam", "gsam", "masked pixels", "distillation", "meta pseudo labels"])
def test_recomputing_changes_no_bit_of_an_update_of_any_recipe(recipe: str) -> None:
    config = replace(TINY["vit" if "masked" in recipe else "efficientnet"], drop_path=0.5, dropout=0.2)
    plain = after_updates(learner_of(RECIPES[recipe], config), config)
    assert_same(plain, after_updates(recomputed(learner_of(RECIPES[recipe], config)), config))


def kept_bytes(model: ImageModel, images: Tensor) -> int:
    """Bytes of all tensors that a forward pass keeps for the backward pass."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    alive: list[Tensor] = []  # memory that is let go of must not be counted as that of another tensor
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (alive.append(x), note(x))[1], lambda x: x):
        model(images)
    return sum(kept.values())


def test_the_more_blocks_recompute_the_less_is_kept() -> None:
    config = replace(TINY["vit"], depth=4)
    images = torch.randn(64, 3, *config.image_size)
    kept = []
    for share in (0.0, 0.5, 1.0):
        model = build(config)
        recompute_blocks(model, share)
        kept.append(kept_bytes(model, images))
    assert kept[0] > 1.5 * kept[1] > 2 * kept[2]


def test_a_copy_of_a_model_that_recomputes_computes_with_its_own_weights() -> None:
    config = replace(TINY["efficientnet"], dropout=0.0, drop_path=0.0)
    model = build(config)
    recompute_blocks(model, 1.0)
    twin = copy.deepcopy(model)
    recompute_blocks(twin, 1.0)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    expected = build(config)
    expected.load_state_dict(twin.state_dict())
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    images = torch.randn(2, 3, 32, 32)
    for each in (twin, expected):
        each(images).sum().backward()
    for (name, ours), theirs in zip(twin.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad), name
    assert_same(dict(twin.named_buffers()), dict(expected.named_buffers()))
    assert_same(before, dict(model.named_buffers()))


def test_a_run_may_go_on_with_less_memory_to_the_same_end(tiny_run) -> None:
    straight, stopped = tiny_run("straight"), tiny_run("stopped")
    run_training(straight)
    with pytest.raises(Interrupted):
        run_training(stopped, [StopAt()])
    run_training(replace(stopped, resume=True, loop=replace(stopped.loop, activation_checkpointing=0.5)))
    for name in ("metrics.jsonl", "last/model.safetensors"):
        assert (Path(stopped.out) / name).read_bytes() == (Path(straight.out) / name).read_bytes()


def test_weights_may_be_updated_in_a_backward_pass_that_recomputes() -> None:
    """No block is computed again with weights that its gradient has moved already."""
    config, settings = replace(TINY["efficientnet"], drop_path=0.5), OptimConfig(lr=1e-2, clip_norm=0.0)
    plain, early = (
        learner_of(SupervisedConfig(), config, optim=replace(settings, in_backward=early)) for early in (False, True)
    )
    states = [after_updates(each, config, batches=1)["state"]["models"] for each in (plain, recomputed(early))]
    assert_same(*states)


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_share_of_blocks_is_a_share(share: float) -> None:
    with pytest.raises(UserError, match="activation-checkpointing is a share"):
        LoopConfig(activation_checkpointing=share)


# Compiled blocks


@pytest.fixture(scope="module")
def compiled(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `compiled_blocks.py` finds in a process of its own: shapes are not checked while torch.compile traces."""
    script, folder = Path(__file__).parent / "compiled_blocks.py", tmp_path_factory.mktemp("compiled")
    command = [sys.executable, str(script), str(photos), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("family", COMPILED)
def test_compiled_blocks_learn_the_same_under_the_same_names(family: str, compiled: dict[str, Any]) -> None:
    assert compiled["families"][family] == {"graphs": True, "names": True, "largest difference": 0.0}


def test_compiled_blocks_may_recompute(compiled: dict[str, Any]) -> None:
    """Stochastic depth draws the same, and BatchNorm counts a batch once."""
    assert compiled["recomputed"]["graphs"]
    assert compiled["recomputed"]["largest difference"] <= 1e-6


def test_a_copy_of_a_compiled_model_is_not_compiled(compiled: dict[str, Any]) -> None:
    assert compiled["copy is compiled"] is False


def test_a_compiled_run_is_the_plain_run_and_resumes_compiled(compiled: dict[str, Any]) -> None:
    """By a compiler that changes nothing; validation compiles nothing."""
    run = compiled["run"]
    assert run["resolved"] == "on"
    assert run["same bytes"] is True
    assert run["graphs"] > run["graphs when stopped"] > 0
    assert run["all for training"] is True


def test_one_block_tells_of_all(compiled: dict[str, Any]) -> None:
    """A visit of eight: four blocks, two micro-batches; with stochastic depth every block is of its own kind."""
    assert compiled["four alike"]["kinds"] == 1
    assert 0 < compiled["four alike"]["share"] < 0.5
    assert all(value > 0 for value in compiled["four alike"].values())
    assert compiled["all different"]["kinds"] == sum(TINY["efficientnet"].depths)


@pytest.fixture
def parts(tiny_run) -> Callable[..., tuple[RunConfig, Parts]]:
    def make(**changes: object) -> tuple[RunConfig, Parts]:
        config = tiny_run(**changes)
        return config, assemble(config, open_run_data(config), CPU, "fp32")

    return make


def settled(config: RunConfig, parts: Parts, monkeypatch, found: Trial | Exception) -> tuple[str, dict[str, Any]]:
    """What a GPU would settle on with updates of a second, a block telling this."""

    def told(*arguments: object) -> Trial:
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(speed, "seconds_per_step", lambda *arguments, **keywords: 1.0)
    monkeypatch.setattr(speed, "try_block", told)
    monkeypatch.setattr(speed, "compile_blocks", lambda model: compile_blocks(model, backend="eager"))
    as_on_gpu = replace(parts, device=torch.device("cuda"))
    monkeypatch.setattr(speed, "trial", lambda *arguments: nullcontext((parts.learner, parts.stream)))
    resolved, measured = settle_compiling(config, as_on_gpu)
    return resolved.loop.compile, measured


def test_blocks_are_compiled_where_that_pays_within_the_run(parts, monkeypatch, caplog) -> None:
    """Saved: 0.1 s of each update; taken: 4 kinds of 10 s."""
    caplog.set_level("INFO", "vitrail")
    half = Trial(eager=0.1, compiled=0.05, compiling=10.0, kinds=4, share=0.5)
    config, made = parts(loop__steps=700, model__depth=2)
    assert settled(config, made, monkeypatch, half)[0] == "off"
    assert "not compiling: one block became 2.00 times as fast" in caplog.text
    config, made = parts(out="longer", loop__steps=900)
    wish, measured = settled(config, made, monkeypatch, half)
    assert (wish, measured["compile"]["pays"], measured["compile"]["kinds"]) == ("on", True, 4)
    assert "compiling blocks: one block became 2.00 times as fast; of the run's 15 min, all 4 kinds" in caplog.text
    assert all(block._compiled_call_impl is not None for block in made.learner.model.blocks())


@pytest.mark.parametrize(
    ("steps", "found", "told"),
    [
        (500, Trial(eager=1.0, compiled=0.1, compiling=0.0, kinds=1, share=1.0), "a run of about 500 s"),
        (5000, Trial(eager=1.0, compiled=1.1, compiling=0.1, kinds=1, share=1.0), "not compiling: one block"),
        (5000, RuntimeError("no compiler\nat all"), "it fails here (RuntimeError: no compiler)"),
    ],
)
def test_blocks_are_left_alone_in_short_runs_and_where_it_brings_nothing(
    steps: int, found: Trial | Exception, told: str, parts, monkeypatch, caplog
) -> None:
    caplog.set_level("INFO", "vitrail")
    config, made = parts(loop__steps=steps)
    wish, measured = settled(config, made, monkeypatch, found)
    assert (wish, measured["compile"]["pays"]) == ("off", False)
    assert told in caplog.text


def test_on_a_cpu_nothing_is_tried(parts) -> None:
    config, made = parts(loop__steps=100_000)
    resolved, measured = settle_compiling(config, made)
    assert (resolved.loop.compile, measured) == ("off", {})


def test_a_machine_without_a_compiler_says_so_before_the_run(tiny_run, monkeypatch) -> None:
    def broken(*arguments: object, **options: object) -> Callable[..., Tensor]:
        def fail(*inputs: object) -> Tensor:
            raise RuntimeError("no g++")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    config = tiny_run(loop__compile="on")
    with pytest.raises(UserError, match=r"Leave out --loop\.compile on"):
        run_training(config)
    assert not (Path(config.out) / "config.json").exists()


# Precision


@pytest.fixture
def measured(monkeypatch) -> None:
    """A CPU that computes in bf16, on which an update takes 2 s, and 0.8 s in bf16."""
    monkeypatch.setattr(speed, "cpu_computes_in_bf16", lambda: True)
    monkeypatch.setattr(speed, "_second_update", lambda config, parts: {"fp32": 2.0, "bf16": 0.8}[parts.precision])


@pytest.mark.parametrize(("steps", "said"), [(500, True), (399, False)])
def test_a_long_run_on_a_cpu_that_computes_in_bf16_is_told(steps: int, said: bool, parts, measured, caplog) -> None:
    caplog.set_level("INFO", "vitrail")
    advise_bf16(*parts(loop__steps=steps))
    assert ("with --loop.precision bf16 an update is 2.5 times as fast" in caplog.text) == said


def test_a_cpu_that_emulates_bf16_is_not_advised_to_use_it(parts, measured, monkeypatch, caplog) -> None:
    caplog.set_level("INFO", "vitrail")
    monkeypatch.setattr(speed, "cpu_computes_in_bf16", lambda: False)
    advise_bf16(*parts(loop__steps=5000))
    assert not caplog.text


def test_advice_leaves_the_run_as_it_was(parts, monkeypatch) -> None:
    monkeypatch.setattr(speed, "cpu_computes_in_bf16", lambda: True)
    monkeypatch.setattr(speed, "LEAST_ADVISED", 0.0)
    config, made = parts(loop__steps=400)
    before = copy.deepcopy((made.learner.state_dict(), made.stream.state_dict(), torch.get_rng_state()))
    advise_bf16(config, made)
    assert_same(before, (made.learner.state_dict(), made.stream.state_dict(), torch.get_rng_state()))


def test_fp32_stays_fp32_and_half_precisions_let_evaluation_take_tf32() -> None:
    before = torch.get_float32_matmul_precision()
    for device, precision, expected in (("cuda", "bf16", "high"), ("cuda", "fp32", before), ("cpu", "bf16", before)):
        with matrix_products(precision, torch.device(device)):
            assert torch.get_float32_matmul_precision() == expected
        assert torch.get_float32_matmul_precision() == before
