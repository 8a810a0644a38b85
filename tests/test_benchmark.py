"""`vitrail benchmark`: turns are taken and compared fairly, and the words say what the numbers say."""

import json
from dataclasses import replace
from io import BytesIO

import pytest
import torch
from PIL import Image

from vitrail.benchmark import Speed, benchmark
from vitrail.benchmark.limits import Limits, photo
from vitrail.benchmark.timing import Timing, take_turns
from vitrail.cli import main
from vitrail.errors import UserError


def steady(rate: float) -> Timing:
    return Timing((1 / rate,) * 3)


def speed(
    training: float = 10.0, loading: float = 100.0, bf16: float | None = None, timm: float | None = None
) -> Speed:
    matmul = {"fp32": steady(1e11)} | ({"bf16": steady(bf16)} if bf16 else {})
    rates = {"training": training, "answers": 3 * training, "one at a time": training, "loading": loading}
    return Speed(
        model="vit-s16",
        device="a processor",
        threads=2,
        batch_size=8,
        precision="fp32",
        operations={"training": 3e9, "answers": 1e9, "one at a time": 1e9},
        limits=Limits(matmul=matmul, copy=steady(1e10), decode=steady(300.0)),
        rates={name: steady(rate) for name, rate in rates.items()},
        peers={"training": steady(timm)} if timm else {},
    )


def test_works_take_turns_after_one_untimed_round() -> None:
    calls: list[str] = []

    def work(name: str) -> int:
        calls.append(name)
        return 4

    timings = take_turns({name: lambda name=name: work(name) for name in "ab"}, turns=2, seconds=0.0)
    assert calls == ["a", "b", "a", "b", "a", "b"]
    assert {name: len(timing.seconds) for name, timing in timings.items()} == {"a": 2, "b": 2}


def test_a_turn_lasts_as_long_as_asked_and_counts_all_its_items(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def work() -> int:
        clock[0] += 0.4
        return 10

    monkeypatch.setattr("vitrail.benchmark.timing.time.perf_counter", lambda: clock[0])
    timing = take_turns({"a": work}, turns=2, seconds=1.0)["a"]
    assert timing.seconds == pytest.approx((0.04, 0.04))  # three calls of 0.4 s, 30 items, a turn
    assert timing.rate == pytest.approx(25.0)


def test_a_comparison_is_of_neighbours_so_that_a_slow_minute_falls_on_both() -> None:
    ours, theirs = Timing((1.0, 4.0, 1.0)), Timing((2.0, 8.0, 2.0))
    assert ours.times(theirs) == 2.0
    assert Timing((1.0, 1.0, 100.0)).times(Timing((3.0, 3.0, 3.0))) == 3.0
    assert steady(7.0).spread == 0.0
    assert Timing((1.0, 0.5, 0.25)).spread > 0.5


def test_the_words_name_what_limits() -> None:
    assert "The model is the limit: loading is 10.0 times" in " ".join(speed().words())
    assert "Loading limits training" in " ".join(speed(training=10.0, loading=5.0).words())
    assert "may wait for pictures" in " ".join(speed(training=10.0, loading=15.0).words())
    assert speed().share("training") == pytest.approx(10 * 3e9 / 1e11)
    assert speed().share("loading") is None
    assert speed().words()[0] == "Training vit-s16 reaches 30% of what matrix products reach here."


def test_bf16_is_advised_where_the_machine_multiplies_it_faster_and_timm_and_noise_are_told() -> None:
    assert "bf16" not in " ".join(speed(bf16=1.5e11).words())
    assert "in bf16 are 6.0 times as fast" in " ".join(speed(bf16=6e11).words())
    assert "bf16" not in " ".join(replace(speed(bf16=6e11), precision="bf16").words())
    assert "timm beside it: 1.25 times timm's rate in training." in speed(training=10.0, timm=8.0).words()
    quiet = speed()
    noisy = replace(quiet, rates=quiet.rates | {"loading": Timing((0.001, 0.01, 0.02))})
    assert "noisy" in " ".join(noisy.words())
    assert "noisy" not in " ".join(quiet.words())


def test_a_photo_for_measuring_is_the_same_every_time_and_as_heavy_as_a_photo() -> None:
    data = photo()
    assert data == photo()
    assert Image.open(BytesIO(data)).size == (500, 375)
    assert 0.1 < len(data) / (500 * 375) < 0.8  # bytes per pixel, at quality 90


def test_a_small_model_is_measured_from_end_to_end() -> None:
    found = benchmark("vit-ti16", batch_size=1, turns=2, seconds=0.0)
    assert found.rates.keys() == {"training", "answers", "one at a time", "loading"}
    assert all((found.share(name) or 0) > 0 for name in ("training", "answers", "one at a time"))
    document = json.loads(json.dumps(found.to_json()))
    assert document["pictures_per_second"]["training"]["rate"] == pytest.approx(found.rates["training"].rate)
    assert document["threads"] == torch.get_num_threads()


def test_the_verb_prints_tables_and_words(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitrail.benchmark.benchmark", lambda *_, **__: speed(training=8.0, timm=4.0))
    assert main(["benchmark", "vit-s16"]) == 0
    out = capsys.readouterr().out
    assert "a processor, 2 threads, fp32, 8 pictures at a time" in out
    assert "100 GFLOP" in out
    assert "2.00 times timm's rate in training" in out
    assert main(["benchmark", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["peers"]["timm"]["training"]["rate"] == 4.0


def test_an_unknown_model_is_a_plain_error() -> None:
    with pytest.raises(UserError, match="no model named 'vit-s17x'"):
        benchmark("vit-s17x")
