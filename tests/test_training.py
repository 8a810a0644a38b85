"""Training: it learns, it resumes bit for bit, it stops when asked, and it says plainly what went wrong."""

import json
import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import vitrail.training.loop as loop_module
from vitrail.checkpoints import load_model, save_model
from vitrail.checkpoints.tensors import read_tensors
from vitrail.config.efficientnet import EfficientNetConfig
from vitrail.config.run import RunConfig
from vitrail.errors import Interrupted, UserError
from vitrail.models import build, create_model
from vitrail.training import Callback, run_training

SMALL_CONVOLUTIONS = EfficientNetConfig(
    image_size=(16, 16), widths=(8,) * 7, depths=(1,) * 7, stem_width=8, head_width=16, num_classes=5, lite=True
)
FILES = ("metrics.jsonl", "last/model.safetensors", "best/model.safetensors")


class StopAt(Callback):
    """Send this process a signal at the start of the run, or after a training step."""

    def __init__(self, step: int, number: int = signal.SIGTERM) -> None:
        self.step_to_stop, self.number = step, number

    def start(self, folder: Path, step: int, steps: int) -> None:
        if self.step_to_stop == 0:
            os.kill(os.getpid(), self.number)

    def metrics(self, row: dict) -> None:
        if row["step"] == self.step_to_stop and "val" not in row:
            os.kill(os.getpid(), self.number)


def result(config: RunConfig) -> dict[str, bytes]:
    assert config.out is not None
    return {name: (Path(config.out) / name).read_bytes() for name in FILES}


@pytest.fixture(scope="module")
def straight() -> dict[tuple[int, float], dict[str, bytes]]:
    """Results of runs that were never stopped, by accumulation and EMA; filled by the first test that needs one."""
    return {}


@pytest.mark.parametrize("stop", ["start", "mid-epoch", "evaluation"])
@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stopped_run_goes_on_bit_for_bit(tiny_run, straight, monkeypatch, workers, accumulation, ema, stop) -> None:
    # The log's window of five updates is open at the evaluation, after six.
    settings = {"loop__accumulation": accumulation, "optim__ema": ema, "loop__log_every": 5}
    if (accumulation, ema) not in straight:
        config = tiny_run("straight", **settings)
        run_training(config)
        straight[accumulation, ema] = result(config)
    config = tiny_run("stopped", **settings, input__workers=workers)
    callbacks: list[Callback] = []
    with monkeypatch.context() as patch:
        if stop == "evaluation":
            measure = loop_module.predict_logits

            def interrupted(*args, stop, **keywords):
                os.kill(os.getpid(), signal.SIGTERM)
                return measure(*args, stop=stop, **keywords)

            patch.setattr(loop_module, "predict_logits", interrupted)
        else:
            callbacks = [StopAt(0 if stop == "start" else 5)]
        with pytest.raises(Interrupted) as caught:
            run_training(config, callbacks)
    assert caught.value.signal == signal.SIGTERM
    run_training(replace(config, resume=True))
    assert result(config) == straight[accumulation, ema]


def test_two_runs_of_one_seed_are_equal_and_of_two_seeds_are_not(tiny_run) -> None:
    first, second, other = tiny_run("a"), tiny_run("b"), tiny_run("c", seed=1)
    for config in (first, second, other):
        run_training(config)
    assert result(first) == result(second)
    assert result(first) != result(other)


def test_training_learns_colours(tiny_run) -> None:
    config = tiny_run(loop__steps=60, loop__eval_every=30, augment__mixup=0.0, augment__policy="none")
    outcome = run_training(config)
    assert outcome.val is not None
    assert outcome.val["top1"] >= 0.9


def test_accumulation_equals_one_large_batch(tiny_run) -> None:
    """Dropout and mixup differ between micro-batches; a key's bias has no gradient but noise, which Adam blows up."""
    settings = {"model__dropout": 0.0, "augment__mixup": 0.0, "model__qkv_bias": False}
    one, four = tiny_run("one", **settings), tiny_run("four", **settings, loop__accumulation=4)
    for config in (one, four):
        run_training(config)
    a, b = (load_model(Path(config.out) / "last").state_dict() for config in (one, four))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5)


def test_sigint_stops_too_and_says_so(tiny_run) -> None:
    with pytest.raises(Interrupted, match="step 3 of 12") as caught:
        run_training(tiny_run(), [StopAt(3, signal.SIGINT)])
    assert caught.value.signal == signal.SIGINT


def test_a_second_run_in_the_same_folder_is_refused(tiny_run) -> None:
    run_training(tiny_run())
    with pytest.raises(UserError, match="--resume"):
        run_training(tiny_run())


def test_resuming_with_other_settings_is_refused_and_names_them(tiny_run) -> None:
    run_training(tiny_run())
    with pytest.raises(UserError, match=r"optim\.lr was 0\.003, now 0\.5"):
        run_training(replace(tiny_run(optim__lr=0.5), resume=True))


def test_resuming_with_other_pictures_is_refused(tiny_run, tmp_path: Path, photos: Path) -> None:
    copy = tmp_path / "copy"
    for file in photos.rglob("*.png"):
        (copy / file.parent.name).mkdir(parents=True, exist_ok=True)
        (copy / file.parent.name / file.name).write_bytes(file.read_bytes())
    run_training(tiny_run(data=str(copy)))
    (copy / "sky" / "00.png").unlink()
    with pytest.raises(UserError, match="pictures have changed"):
        run_training(replace(tiny_run(data=str(copy)), resume=True))


def test_resuming_where_nothing_lies_begins_and_resuming_a_finished_run_changes_nothing(tiny_run) -> None:
    config = replace(tiny_run(), resume=True)
    run_training(config)
    before = result(config)
    run_training(config)
    assert result(config) == before


@pytest.mark.parametrize("log_every", [1, 12])
def test_a_loss_that_is_not_a_number_ends_the_run_and_no_checkpoint_holds_it(tiny_run, log_every: int) -> None:
    settings = {"optim__lr": 1e30, "optim__name": "sgd", "optim__clip_norm": 0.0, "optim__warmup_steps": 0}
    config = tiny_run(**settings, loop__log_every=log_every)
    with pytest.raises(UserError, match=r"lower --optim\.lr"):
        run_training(config)
    checkpoints = list((Path(config.out) / "checkpoints").iterdir())
    assert checkpoints
    for checkpoint in checkpoints:
        assert all(tensor.isfinite().all() for tensor in read_tensors(checkpoint / "state.safetensors").values())


def test_early_stopping_ends_the_run_and_keeps_the_best(tiny_run) -> None:
    config = tiny_run(loop__patience=2, loop__steps=200, loop__eval_every=2, optim__lr=1e-30)
    assert run_training(config).step == 6
    assert (Path(config.out) / "best" / "model.safetensors").exists()


def test_the_best_model_is_the_one_of_the_best_evaluation(tiny_run) -> None:
    config = tiny_run(loop__steps=30, loop__eval_every=3)
    outcome = run_training(config)
    rows = [json.loads(line) for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]
    scores = [(row["val"]["top1"], -row["val"]["nll"]) for row in rows if "val" in row]
    assert (outcome.val["top1"], -outcome.val["nll"]) == max(scores)
    stored = json.loads((Path(config.out) / "best" / "config.json").read_text())["metrics"]
    assert stored["nll"] == outcome.val["nll"]


def test_class_names_and_preprocessing_travel_with_the_model(tiny_run) -> None:
    config = tiny_run(input__crop_fraction=0.9, input__mean=(0.4,))
    run_training(config)
    model = load_model(Path(config.out) / "best")
    assert model.labels == ("apple", "leaf", "sky")
    assert model.preprocessing.crop_fraction == 0.9
    assert model.preprocessing.mean == (0.4,)


def test_starting_from_weights_replaces_head_and_resizes_positions(tiny_run, tmp_path: Path) -> None:
    sizes = {"patch_size": 8, "width": 16, "depth": 2, "mlp_dim": 32, "heads": 2}
    trained = create_model("vit-ti16", image_size=32, num_classes=7, **sizes)
    save_model(trained, tmp_path / "weights")
    config = tiny_run(init=str(tmp_path / "weights"), loop__steps=1, optim__lr=1e-12)
    run_training(config)
    model = load_model(Path(config.out) / "last")
    assert model.config.num_classes == 3
    assert model.config.grid == (2, 2)
    torch.testing.assert_close(model.encoder[1].mlp.up.weight, trained.encoder[1].mlp.up.weight)


def test_starting_from_weights_keeps_their_sizes_and_normalisation_and_records_them(tiny_run, tmp_path: Path) -> None:
    trained = create_model(
        "vit-ti16", image_size=32, patch_size=8, width=24, depth=1, mlp_dim=32, heads=3, num_classes=3
    )
    trained.preprocessing = replace(trained.preprocessing, mean=(0.1, 0.2, 0.3))
    save_model(trained, tmp_path / "weights")
    config = tiny_run(init=str(tmp_path / "weights"), loop__steps=1)
    run_training(config)
    stored = json.loads((Path(config.out) / "config.json").read_text())["resolved"]["model"]
    assert (stored["width"], stored["depth"], stored["image_size"]) == (24, 1, [16, 16])
    assert load_model(Path(config.out) / "last").preprocessing.mean == (0.1, 0.2, 0.3)


def test_what_a_run_says_of_dropout_and_statistics_holds_for_weights_too(tiny_run, tmp_path: Path) -> None:
    save_model(build(SMALL_CONVOLUTIONS), tmp_path / "weights")
    wanted = replace(SMALL_CONVOLUTIONS, dropout=0.4, drop_path=0.1, frozen_norm=True)
    config = tiny_run(init=str(tmp_path / "weights"), loop__steps=1, model=wanted)
    run_training(config)
    assert load_model(Path(config.out) / "last").config == replace(wanted, num_classes=3)


@pytest.mark.parametrize("train", ["all", "head"])
def test_fine_tuning_changes_what_is_to_learn_and_nothing_else(tiny_run, tmp_path: Path, train: str) -> None:
    before = build(SMALL_CONVOLUTIONS)
    save_model(before, tmp_path / "weights")
    config = tiny_run(
        init=str(tmp_path / "weights"), model=SMALL_CONVOLUTIONS, loop__steps=2, optim__train=train, optim__ema=0.9
    )
    run_training(config)
    after = load_model(Path(config.out) / "last")
    changed = {name for name, tensor in after.state_dict().items() if not _same(tensor, before.state_dict().get(name))}
    head = {"head.weight", "head.bias"}
    assert changed == (head if train == "head" else set(after.state_dict()))


def _same(tensor: torch.Tensor, other: torch.Tensor | None) -> bool:
    return other is not None and tensor.shape == other.shape and torch.equal(tensor, other)


@pytest.mark.parametrize("train", ["all", "head"])
def test_a_stopped_fine_tuning_of_convolutions_goes_on_bit_for_bit(tiny_run, tmp_path: Path, train: str) -> None:
    """Kernels lie channels last in memory, and in a file they do not."""
    save_model(build(SMALL_CONVOLUTIONS), tmp_path / "weights")
    settings = {"init": str(tmp_path / "weights"), "model": SMALL_CONVOLUTIONS, "loop__steps": 6}
    settings |= {"optim__train": train, "optim__ema": 0.9}
    straight, stopped = tiny_run("straight", **settings), tiny_run("stopped", **settings)
    run_training(straight)
    with pytest.raises(Interrupted):
        run_training(stopped, [StopAt(3)])
    run_training(replace(stopped, resume=True))
    assert result(stopped) == result(straight)


def test_minutes_become_steps_once(tiny_run) -> None:
    config = tiny_run(minutes=0.05, loop__eval_every=0)
    with pytest.raises(Interrupted):
        run_training(config, [StopAt(2)])
    stored = json.loads((Path(config.out) / "config.json").read_text())["resolved"]["loop"]["steps"]
    assert stored > 2
    assert run_training(replace(config, resume=True)).step == stored


def test_a_large_model_on_few_pictures_is_warned_of(tiny_run, caplog) -> None:
    run_training(tiny_run(model__width=512, model__mlp_dim=2048, loop__steps=1))
    assert "--init" in caplog.text


def test_metrics_hold_no_clock_and_timing_does(tiny_run) -> None:
    config = tiny_run()
    run_training(config)
    metrics = (Path(config.out) / "metrics.jsonl").read_text()
    timing = json.loads((Path(config.out) / "timing.jsonl").read_text().splitlines()[0])
    assert "seconds" not in metrics
    assert timing.keys() >= {"seconds", "pictures_per_second", "data_wait", "clock"}


def test_a_run_without_data_or_folder_says_what_to_name(tiny_run) -> None:
    with pytest.raises(UserError, match="--data"):
        run_training(tiny_run(data=None))
    with pytest.raises(UserError, match="--out"):
        run_training(tiny_run(out=None))


def test_a_batch_larger_than_the_data_is_refused(tiny_run) -> None:
    with pytest.raises(UserError, match="larger than the 48 training pictures"):
        run_training(tiny_run(loop__batch_size=64))


def test_tensorboard_gets_the_rows_of_the_log(tiny_run) -> None:
    config = tiny_run(loop__tensorboard=True)
    run_training(config)
    events = EventAccumulator(str(Path(config.out) / "tensorboard")).Reload()
    rows = [json.loads(line) for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]
    losses = {event.step: event.value for event in events.Scalars("train/loss")}
    assert losses == pytest.approx({row["step"]: row["loss"] for row in rows if "loss" in row}, rel=1e-6)
    assert len(events.Scalars("val/top1")) == 2


def test_a_full_memory_becomes_advice(tiny_run, monkeypatch) -> None:
    def ask_for_too_much(*_: object) -> None:
        torch.empty(10**15)

    monkeypatch.setattr(loop_module.Loop, "update", ask_for_too_much)
    with pytest.raises(UserError, match=r"out of memory\. Halve --loop\.batch-size"):
        run_training(tiny_run())


def test_an_overflow_in_fp16_leaves_a_log_that_is_json(tiny_run, monkeypatch) -> None:
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**40))
    config = tiny_run(loop__precision="fp16")
    rows = []

    class Overflow(Callback):
        def metrics(self, row: dict) -> None:
            rows.append(row)

    run_training(config, [Overflow()])
    assert any(row.get("gradient_norm", 0.0) is None for row in rows), "nothing overflowed"
    for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


def test_the_rate_of_a_resumed_run_counts_what_was_done_since(tiny_run, monkeypatch) -> None:
    config = tiny_run(loop__log_every=12, loop__save_every=8, loop__eval_every=12)
    with monkeypatch.context() as patch:
        update = loop_module.Loop.update

        def stopped(loop) -> None:
            if loop.step == 10:
                raise Interrupted("enough", signal.SIGTERM)
            update(loop)

        patch.setattr(loop_module.Loop, "update", stopped)
        with pytest.raises(Interrupted):
            run_training(config)
    run_training(replace(config, resume=True))
    (timing,) = (json.loads(line) for line in (Path(config.out) / "timing.jsonl").read_text().splitlines())
    assert timing["pictures_per_second"] * timing["seconds"] == pytest.approx(2 * config.loop.batch_size, rel=0.05)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"loop__patience": 0}, r"--loop\.patience must be at least 1"),
        ({"loop__eval_every": -1}, r"--loop\.eval-every must not be negative"),
        ({"loop__save_every": -1}, r"--loop\.save-every must not be negative"),
        ({"optim__rsqrt_timescale": 0}, r"--optim\.rsqrt-timescale must be at least 1"),
        ({"optim__betas": (0.9, 1.0)}, r"--optim\.betas must lie in"),
        ({"optim__momentum": 1.0}, r"--optim\.momentum must lie in"),
    ],
)
def test_settings_that_cannot_work_are_refused(tiny_run, changes: dict, told: str) -> None:
    with pytest.raises(UserError, match=told):
        tiny_run(**changes)
