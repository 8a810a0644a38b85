"""Plans: what they count is what real models and steps do, and what does not fit is told."""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from families import TINY
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vitrail.cli import main
from vitrail.config.distillation import DistillationConfig
from vitrail.config.masked import MaskedConfig
from vitrail.config.meta_pseudo_labels import MetaPseudoLabelsConfig
from vitrail.config.model import MODELS, ModelConfig, list_models
from vitrail.config.recipes import SamConfig
from vitrail.config.run import LoopConfig, OptimConfig, RecipeConfig, RunConfig, SupervisedConfig
from vitrail.config.semantic import SemanticConfig
from vitrail.config.wide_resnet import WIDE_RESNETS
from vitrail.errors import UserError
from vitrail.models import build
from vitrail.planner import pages, plan, words
from vitrail.planner.constants import CONSTANTS, constant
from vitrail.planner.gpus import GPUS, Gpu, gpu_named
from vitrail.planner.layouts import Layout, Workload, layouts
from vitrail.planner.memory import Timeline
from vitrail.planner.names import Run, named
from vitrail.planner.planning import PLAIN, RECOMPUTED, Plan, Planner
from vitrail.planner.recorder import Kind
from vitrail.planner.rehearsal import answer, noise, practised_learner, rehearse, simplified
from vitrail.presets import PAPERS, PRESETS
from vitrail.presets.data_sets import DATA_SETS

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import planner as benchmark  # noqa: E402

H100 = GPUS["h100"]


def gpu_of(mib: float) -> Gpu:
    """A GPU that has so much room for a run."""
    memory = (mib / 1024 + constant("reserve")) / (1 - constant("fragments"))
    return replace(H100, memory=memory)


def parameters(model: ModelConfig) -> int:
    return sum(p.numel() for p in build(model).parameters())


def run_of(config: RunConfig, steps: int | None = 1000) -> Run:
    return Run(
        name="mine",
        preset=True,
        model="mine",
        config=config,
        steps=steps,
        minutes=None,
        data=None,
        accumulation=config.loop.accumulation,
        flags="",
    )


def tiny_run(family: str = "vit", batch_size: int = 4096, **changes: object) -> RunConfig:
    config = RunConfig(model=TINY[family], optim=OptimConfig(ema=0.9), loop=LoopConfig(batch_size=batch_size))
    return replace(config, **changes)


@cache
def planner_of(config: RunConfig) -> Planner:
    return Planner(run_of(config), H100)


def planned(config: RunConfig, gpus: int = 8, gpu: Gpu = H100) -> Plan:
    return planner_of(config).on(gpu).plan(gpus, price=2.0)


# What a step takes


@pytest.mark.parametrize("family", ["vit-moe", "coatnet"])
def test_memory_and_operations_are_straight_lines_over_the_pictures(family: str) -> None:
    few, more, most = rehearse(tiny_run(family), (16, 32, 48), precision="bf16", gpu=H100)
    ours, theirs = Timeline.of(few, more, (16, 32)), Timeline.of(few, most, (16, 48))
    np.testing.assert_allclose(ours.fixed, theirs.fixed, atol=0.01)
    np.testing.assert_allclose(ours.growing, theirs.growing, atol=0.01)
    flops = [sum(each.flops for each in step.operations) for step in (few, more, most)]
    assert flops[2] - flops[1] == flops[1] - flops[0] > 0


@pytest.mark.parametrize(
    "case",
    [
        benchmark.Case(TINY["vit"], 40, OptimConfig(ema=0.9), SamConfig()),
        benchmark.Case(TINY["vit-moe"], 24, OptimConfig(name="adafactor"), precision="bf16", accumulation=2),
        benchmark.Case(TINY["coatnet"], 12, OptimConfig(moments="8bit"), recomputed=1.0),
    ],
    ids=["vit", "vit-moe", "coatnet"],
)
def test_the_peak_is_that_of_the_allocator_in_a_real_step(case: "benchmark.Case") -> None:
    assert benchmark.predicted(case) == pytest.approx(benchmark.measured(case), rel=benchmark.TARGET)


def test_a_mixture_of_kinds_makes_up_the_peak() -> None:
    config = tiny_run("vit-moe")
    few, more = rehearse(config, (16, 32), precision="bf16", gpu=H100)
    timeline = Timeline.of(few, more, (16, 32))
    model = build(config.model)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    dense = sum(p.numel() for p in model.parameters()) - experts
    assert timeline.gradient.tolist() == [4 * dense, 4 * experts]
    held, added = timeline.peak(64, np.ones((len(Kind), 2)), np.array([0.0, 5.0, 5.0]))
    for kind, each in ((Kind.WEIGHTS, 4), (Kind.AVERAGE, 4)):
        assert held[kind].tolist() == [each * dense, each * experts]
    assert held[Kind.OPTIMIZER].sum() == pytest.approx(8 * (dense + experts), rel=1e-2)  # and numbers of steps
    assert held[Kind.ACTIVATIONS].sum() > 0 and held[Kind.COPIES].sum() > 0 and added == 5.0


def test_blocks_that_are_computed_again_keep_less_and_take_longer() -> None:
    found = planned(tiny_run(), gpus=1)
    assert found.activations[RECOMPUTED] < 0.6 * found.activations[PLAIN]
    seconds = {choice.settings: choice.seconds for choice in found.fitting}
    assert seconds[PLAIN] < seconds[RECOMPUTED] < 4 / 3 * seconds[PLAIN]


@pytest.mark.parametrize("family", TINY)
def test_operations_of_an_answer_are_those_that_torch_counts(family: str) -> None:
    config = TINY[family]
    with torch.device("meta"):
        model = build(config).eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, config.channels, *config.image_size, device="meta"))
    # fp32: a mixture's experts work on blocks, as on the meta device
    ours = sum(each.flops for each in answer(config, 1, precision="fp32", gpu=H100))
    assert ours == counter.get_total_flops()


def counted_step(config: RunConfig, pictures: int) -> int:
    """What torch counts in a real step, with attention taken apart into products."""
    config = simplified(config)
    model, batch = build(config.model), noise(config, pictures)
    learner = practised_learner(config, model, model, "fp32")
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        learner.step([batch])
    return counter.get_total_flops()


@pytest.mark.parametrize("recipe", [SupervisedConfig(), SamConfig()])
def test_operations_of_a_step_are_those_that_torch_counts(recipe: SupervisedConfig | SamConfig) -> None:
    config = tiny_run("wide-resnet", recipe=recipe, optim=OptimConfig(name="sgd"))
    (step,) = rehearse(config, (16,), precision="fp32")
    assert sum(each.flops for each in step.operations) == counted_step(config, 16)


def test_fused_attention_computes_its_scores_again_in_the_backward_pass() -> None:
    config = tiny_run()
    (step,) = rehearse(config, (16,), precision="fp32", gpu=H100)
    vit, tokens = TINY["vit"], 17
    scores = vit.depth * 16 * 2 * tokens * tokens * vit.width  # pyright: ignore[reportAttributeAccessIssue]
    assert sum(each.flops for each in step.operations) == counted_step(config, 16) + scores


def test_going_back_through_convolutions_of_groups_takes_twice_the_way_there() -> None:
    config = tiny_run("efficientnet", optim=OptimConfig(name="sgd"))
    (step,) = rehearse(config, (16,), precision="fp32")
    there = sum(each.flops for each in answer(config.model, 16, precision="fp32", gpu=H100))
    first = 2 * 16 * 16 * 16 * 8 * 27  # nothing asks for the gradient of pictures
    assert sum(each.flops for each in step.operations) == 3 * there - first


def taken(recipe: RecipeConfig, model: ModelConfig = TINY["vit"]) -> tuple[float, float]:
    """Operations for one more picture, and models that are held."""
    config = tiny_run(model=model, recipe=recipe, optim=OptimConfig(name="sgd"))
    few, more = rehearse(config, (16, 32), precision="bf16", gpu=H100)
    flops = [sum(each.flops for each in step.operations) for step in (few, more)]
    weights = Timeline.of(few, more, (16, 32)).most(Kind.WEIGHTS)[0]
    return (flops[1] - flops[0]) / 16, round(weights / (4 * parameters(model)), 1)


def test_recipes_count_all_their_passes_and_models() -> None:
    once, models = taken(SupervisedConfig())
    there = sum(each.flops for each in answer(TINY["vit"], 1, precision="bf16", gpu=H100))
    assert models == 1.0
    assert taken(SemanticConfig()) == (once, 1.0)
    assert taken(SamConfig()) == (2 * once, 1.0)
    assert taken(DistillationConfig()) == (once + there, 2.0)
    # the teacher learns from 1 + 2 x 3 pictures, the student from 3, and answers twice to one
    assert taken(MetaPseudoLabelsConfig(unlabelled_ratio=3)) == (7 * once + 3 * once + 2 * there, 2.0)


def test_masked_pictures_cost_less_than_whole_ones() -> None:
    recipe = MaskedConfig(decoder_width=8, decoder_depth=1, decoder_heads=2)
    model = replace(TINY["vit"], image_size=(64, 64))
    there = sum(each.flops for each in answer(model, 1, precision="bf16", gpu=H100))
    assert taken(recipe, model)[0] < 0.7 * 3 * there


def test_rehearsals_leave_no_trace() -> None:
    before = (nn.Module.to, Tensor.backward, F.layer_norm)
    config = tiny_run(optim=OptimConfig(moments="8bit"), recipe=DistillationConfig())
    rehearse(config, (16,), precision="bf16", gpu=H100)
    with pytest.raises(UserError):  # of the recipe: it is no plain ViT
        rehearse(replace(config, recipe=MaskedConfig(), model=TINY["cvt"]), (16,), precision="bf16", gpu=H100)
    assert (nn.Module.to, Tensor.backward, F.layer_norm) == before
    config = simplified(config)
    learner = practised_learner(config, build(config.model), build(config.model), "fp32")
    row = learner.step([noise(config, 4)])
    assert type(row["loss"]) is Tensor and row["loss"].isfinite()


# Layouts


def workload(**changes: object) -> Workload:
    parts: dict[str, object] = {
        "dense": 1000.0, "experts": 0.0, "blocks": 4, "block": 200.0, "block_experts": 0.0, "rest": 200.0, "wide": 2,
        "forwards": 1.0, "backwards": 1.0, "at_once": False, "dispatched": 0.0, "mixtures": 0,
    }  # fmt: skip
    return Workload(**{**parts, **changes})  # pyright: ignore[reportArgumentType]


def sent(layout: Layout, work: Workload, pictures: int = 4, micro_batches: int = 1) -> dict[str, float]:
    return {each.what: each.sent for each in layout.exchanges(work, pictures, micro_batches)}


def test_what_is_sent_follows_the_formulas() -> None:
    ddp, fsdp, hybrid = layouts(H100, 16, TINY["vit"])
    assert (ddp.name, fsdp.name, hybrid.name) == ("DDP", "FSDP", "hybrid")
    assert sent(ddp, workload(), micro_batches=3) == {"gradient averaged": 2 * 15 / 16 * 4000}
    gathered = 2 * (2 * 800 + 4 * 200)  # outside of blocks in fp32
    assert sent(fsdp, workload()) == {"weights gathered": 15 / 16 * gathered, "gradient scattered": 15 / 16 * 4000}
    assert sent(fsdp, workload(wide=4), micro_batches=3)["weights gathered"] == 15 / 16 * 3 * 8000
    between = {"gradient averaged between machines": 2 * 1 / 2 * 4 * 1000 / 8}
    assert sent(hybrid, workload()) == {
        "weights gathered": 7 / 8 * gathered,
        "gradient scattered": 7 / 8 * 4000,
        **between,
    }
    of_sam = sent(hybrid, workload(forwards=2.0, backwards=2.0), micro_batches=3)  # asks for the mean of every pass
    assert of_sam["gradient averaged between machines"] == 6 * 2 * 1 / 2 * 4 * 1000 / 8
    (alone,) = layouts(H100, 1, TINY["vit"])
    assert sent(alone, workload()) == {} and not alone.added(workload(), 4).any()


def test_experts_get_their_tokens_and_average_over_their_copies() -> None:
    work = workload(experts=8000.0, block_experts=2000.0, dispatched=100.0, mixtures=4)
    found = {each.name: each for each in layouts(H100, 16, replace(TINY["vit-moe"], experts=32))}
    assert list(found) == ["DDP", "FSDP", "hybrid", "experts over 8", "experts over 16"]
    over8, over16 = (sent(found[f"experts over {spread}"], work, 5, 2) for spread in (8, 16))
    assert over8["tokens to experts and back"] == 7 / 8 * 4 * 4 * 2 * 5 * 100
    assert over8["experts' gradient averaged"] == 2 * 1 / 2 * 4 * 8000 / 8
    assert over16["tokens to experts and back"] == 15 / 16 * 4 * 4 * 2 * 5 * 100
    assert "experts' gradient averaged" not in over16
    assert over8["weights gathered"] == 15 / 16 * 2 * 2 * (2 * 800 + 4 * 200)  # of the dense weights alone
    shares = found["experts over 8"].held()
    assert shares[Kind.WEIGHTS].tolist() == [1 / 16, 1 / 8] and shares[Kind.ACTIVATIONS].tolist() == [1, 1]


def test_sharding_divides_what_weights_take_and_nothing_else() -> None:
    found = planned(tiny_run())
    ddp, fsdp = (next(c for c in found.fitting if (c.layout, c.settings) == (name, PLAIN)) for name in ("DDP", "FSDP"))
    for part in ("weights", "averaged weights", "optimizer"):
        assert fsdp.memory[part] == pytest.approx(ddp.memory[part] / 8)
    assert ddp.memory["activations"] == pytest.approx(fsdp.memory["activations"], rel=0.2)
    assert fsdp.memory["half-precision copies"] == 0 < fsdp.memory["gathered, sent"]


def test_a_gpu_with_little_memory_takes_fewer_pictures_at_a_time() -> None:
    config = tiny_run()
    large, small = (planned(config, gpus=1, gpu=gpu) for gpu in (H100, gpu_of(10)))
    assert {choice.accumulation for choice in large.fitting} == {1}
    plain = next(choice for choice in small.fitting if choice.settings == PLAIN)
    assert plain.accumulation > 1 and plain.micro_batch * plain.accumulation == 4096
    assert plain.total <= small.room < next(c for c in large.fitting if c.settings == PLAIN).total
    assert f"--loop.accumulation {plain.accumulation}" in plain.flags


HEAVY = tiny_run(model=replace(TINY["vit"], width=128, mlp_dim=512, depth=4), batch_size=8)


def test_what_does_not_fit_is_told_with_its_largest_parts_and_a_number_of_gpus_that_would() -> None:
    planner = planner_of(HEAVY).on(gpu_of(9))
    found = replace(planner.plan(1, 1.0), fewest=planner.fewest())
    assert not found.fitting and found.others[0].total > found.room
    told = " ".join(words.reasons(found))
    assert "one GPU does not fit" in told and "of which weights" in told
    assert found.fewest is not None and f"--gpus {found.fewest}" in told
    assert planner.plan(found.fewest, 1.0).fitting and not planner.plan(found.fewest // 2, 1.0).fitting


def test_settings_that_save_memory_are_tried_where_it_is_short() -> None:
    tried: list[str] = []
    for mib in np.arange(40, 2, -0.25):
        found = planned(HEAVY, gpus=1, gpu=gpu_of(float(mib)))
        tried += [found.fitting[-1].settings if found.fitting else "none"]
        assert found.fitting or found.others[0].total > found.room
    assert list(dict.fromkeys(tried)) == [
        RECOMPUTED,
        f"{RECOMPUTED}, moments in 8 bits",
        f"{RECOMPUTED}, moments in 8 bits, updates in the backward pass, no clipping",
        "none",
    ]


def test_time_and_cost_follow_from_steps_and_price() -> None:
    found = planned(tiny_run())
    for choice in found.fitting:
        assert choice.hours == pytest.approx(1000 * choice.seconds / 3600)
        assert choice.cost == pytest.approx(choice.hours * 8 * 2.0)
        assert choice.pictures_per_second == pytest.approx(4096 / choice.seconds)
        assert 0 < choice.utilisation < 1
    times = [choice.seconds for choice in found.fitting]
    assert all(later > 0.97 * before for before, later in pairwise(times))


@pytest.mark.parametrize("name", GPUS)
def test_no_gpu_computes_faster_than_its_products(name: str) -> None:
    for config in (tiny_run(), HEAVY):
        assert 0 < planned(config, 1, GPUS[name]).fitting[0].utilisation < CONSTANTS["products"].value


# Names


def test_every_preset_and_model_has_a_run() -> None:
    for name in [*PRESETS, *list_models(), "ViT-G/14", "vit-s7", "vitrail-mini"]:
        run = named(name)
        assert run.config.loop.batch_size > 0
        assert run.preset == (name in PRESETS and name not in ("vitrail-mini",))
    lengths = {name: named(name) for name in PRESETS}
    unknown = {name for name, run in lengths.items() if run.steps is None and run.minutes is None}
    assert unknown <= PAPERS["starters"].keys() | PAPERS["small"].keys()


def test_epochs_become_updates_by_the_data_set_in_the_name() -> None:
    run = named("vmoe-b16-every2-imagenet21k")
    pictures = DATA_SETS["imagenet21k"].pictures * (1 - DATA_SETS["imagenet21k"].held_out)
    assert run.data == "imagenet21k" and run.steps == math.floor(300 * pictures / 4096)
    assert named("vmoe-b16-every2-imagenet21k", batch_size=512).steps == math.floor(300 * pictures / 512)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"name": "vit-x61"}, "no model and no preset named 'vit-x61'"),
        ({"name": "vit-s16", "gpu": "h1000"}, "Did you mean 'h100'"),
        ({"name": "vit-s16", "gpus": 0}, "--gpus must be at least 1"),
        ({"name": "wide-resnet-28-2", "gpus": 512}, "has 128 pictures"),
        ({"name": "vit-s16", "batch_size": 0}, "--batch-size must be at least 1"),
        ({"name": "vit-s16", "image_size": -1}, "--image-size must be at least 1"),
        ({"name": "vit-s16", "price": -1.0}, "--price must not be negative"),
    ],
)
def test_mistakes_are_told(arguments: dict, told: str) -> None:
    with pytest.raises(UserError, match=told):
        plan(**arguments)


def test_gpus_have_names_that_people_type() -> None:
    assert gpu_named("RTX 4090") is GPUS["rtx-4090"] and gpu_named("A100_80") is GPUS["a100-80"]
    assert all(gpu.source for gpu in GPUS.values())


# What is shown


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """What `vitrail plan` prints; it knows a model and a preset that are small."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setitem(MODELS, "tiny-vit", TINY["vit"])
    monkeypatch.setitem(PRESETS, "tiny-cifar10", replace(PRESETS["cifar100-vit"], config=tiny_run(batch_size=64)))

    def say(*arguments: str) -> str:
        assert main(["plan", *arguments]) == 0
        return capsys.readouterr().out

    return say


def test_the_verb_tells_what_fits_first_and_what_is_assumed(said: Callable[..., str], tmp_path: Path) -> None:
    text = said("tiny-vit", "--gpus", "2", "--price", "7.5", "--out", str(tmp_path / "a.svg"))
    assert "tiny-vit on 2 x H100" in text and "Predicted: none of these figures" in text
    assert text.index("DDP") < text.index("Assumed")
    assert "1M pictures" in text and "$7.50" in text
    svg = ElementTree.fromstring((tmp_path / "a.svg").read_text())
    bars = [float(bar.get("width", "0")) for bar in svg.iter("{http://www.w3.org/2000/svg}rect")]
    assert len(bars) > 8 and all(width >= 0 for width in bars)


def test_json_holds_all_and_says_that_it_is_predicted() -> None:
    found = json.loads(json.dumps(words.to_json(planned(tiny_run(), gpus=16))))
    assert found["predicted"] is True and found["parameters"] == parameters(TINY["vit"])
    assert {choice["layout"] for choice in found["fits"]} == {"DDP", "FSDP", "hybrid"}
    for choice in found["fits"]:
        parts = dict(choice["memory"])
        total = parts.pop("total")
        assert total == pytest.approx(sum(parts.values())) and total <= found["room"]
        assert choice["exchanges"] and choice["hours"] > 0
    assert all(each["how"] == "predicted" for each in found["constants"].values())


def test_a_preset_has_a_length_and_names_the_flags_of_the_best(said: Callable[..., str]) -> None:
    text = said("tiny-cifar10", "--gpu", "l4", "--batch-size", "2000000", "--image-size", "16")
    told = "vitrail train tiny-cifar10 --model.image-size 16 16 --loop.batch-size 2000000 --loop.accumulation"
    assert f"\n{told}" in text
    assert "10 epochs of cifar10" in text and "at 16 px" in text


def test_several_gpus_are_started_by_torchrun_with_their_sharding(said: Callable[..., str]) -> None:
    text = said("tiny-cifar10", "--gpus", "16")
    line = next(line for line in text.splitlines() if line.startswith("torchrun"))
    assert "--nnodes 2" in line and "--nproc-per-node 8 -m vitrail train tiny-cifar10" in line
    best = text.splitlines()[text.splitlines().index(line) - 1]
    assert ("--loop.sharding full" in line) == ("FSDP" in best)


def test_pictures_that_sam_perturbs_together_stay_as_many_as_the_recipe_says() -> None:
    config = RunConfig(
        model=WIDE_RESNETS["wide-resnet-28-2"], recipe=SamConfig(), loop=LoopConfig(batch_size=256, accumulation=8)
    )
    for gpus, accumulation in ((1, 8), (4, 2), (16, 1)):
        choice = planned(config, gpus).fitting[0]
        assert choice.accumulation == accumulation
        assert choice.micro_batch <= 32


def test_pictures_are_svg(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "wide-resnet-28-2", "--out", "a.png"]) == 2
    assert ".svg" in capsys.readouterr().err


@pytest.mark.slow
def test_the_page_of_plans_is_up_to_date() -> None:
    assert (ROOT / "docs" / "plans.md").read_text(encoding="utf-8") == pages.page(), "python -m vitrail.planner.pages"
