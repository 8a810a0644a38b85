"""The runner of real results: every experiment in a few steps, killed and gone on with; what it makes of figures."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitrail.checkpoints.packages import packaged_weights
from vitrail.data.class_tree import read_class_tree

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import gpu  # noqa: E402
import recipes  # noqa: E402
import two_moons  # noqa: E402


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise in CIFAR-100's official layout, four training pictures and one to test per class, by their true names."""
    folder, rng = tmp_path_factory.mktemp("data") / "cifar-100-binary", np.random.default_rng(0)
    folder.mkdir()
    tree = read_class_tree("cifar100")
    names = [name for name, chain in zip(tree.names, tree, strict=True) if len(chain) == 2]
    (folder / "fine_label_names.txt").write_text("\n".join(names))
    for part, count in (("train", 400), ("test", 100)):
        records = rng.integers(0, 256, (count, 2 + 3 * 32 * 32), dtype=np.uint8)
        records[:, 1] = np.arange(count) % 100
        (folder / f"{part}.bin").write_bytes(records.tobytes())
    return folder


def rows_of(work: Path) -> dict[tuple, dict]:
    lines = [json.loads(line) for line in (work / "tiny" / "rows.jsonl").read_text().splitlines()]
    return {(row["experiment"], row["arm"], row["seed"]): row for row in lines}


def run(cifar: Path, work: Path, *arguments: str) -> int:
    return recipes.main([str(cifar), str(work), *arguments, "--tiny", "--threads", "1"])


def test_every_experiment_runs_once_and_has_its_part_of_the_page(cifar: Path, tmp_path: Path, monkeypatch) -> None:
    assert run(cifar, tmp_path, "--seeds", "1") == 0
    page, rows = (tmp_path / "tiny" / "recipes.md").read_text(), rows_of(tmp_path)
    for name in recipes.EXPERIMENTS.keys() - recipes.NEEDS.keys():
        experiment = recipes.EXPERIMENTS[name]()
        _, part = page.split(f"\n## {name}: {experiment.question}\n")
        part = part.split("\n## ")[0]
        for arm in experiment.arms:
            assert rows[name, arm, 0]["figures"]
            assert f"\n- {arm}: `" in part
        for arm, other in experiment.pairs:
            assert f"| {arm} over {other} | top-1" in part
        assert f"`python benchmarks/recipes.py CIFAR-100-BINARY WORK {name} --threads 1 --seeds 1`" in part
    assert rows["masked", "fine-tuned", 0]["settings"]["init"] == "pre-trained"
    assert set(rows["masked", "pre-trained", 0]["figures"]) == {"top-1, 5 shots", "top-1, 10 shots"}
    monkeypatch.setattr(recipes, "run_training", lambda config: pytest.fail("a known run was made again"))
    before = (tmp_path / "tiny" / "rows.jsonl").read_bytes()
    assert run(cifar, tmp_path, "--seeds", "1") == 0
    assert (tmp_path / "tiny" / "rows.jsonl").read_bytes() == before


@pytest.mark.slow
def test_killed_it_goes_on_to_the_same_figures(cifar: Path, tmp_path: Path) -> None:
    script = [sys.executable, str(BENCHMARKS / "recipes.py"), str(cifar), str(tmp_path / "killed"), "semantic"]
    killed = subprocess.Popen(
        [*script, "--tiny", "--threads", "1", "--seeds", "1"], env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    second = tmp_path / "killed" / "tiny" / "semantic" / "semantic-0" / "config.json"
    while not second.exists():
        assert killed.poll() is None, "it ended before it could be killed"
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    known = rows_of(tmp_path / "killed")
    assert len(known) == 1
    for work, seeds in (("killed", "2"), ("straight", "1")):
        assert run(cifar, tmp_path / work, "semantic", "--seeds", seeds) == 0
    done, straight = rows_of(tmp_path / "killed"), rows_of(tmp_path / "straight")
    assert len(done) == 4 and len(straight) == 2
    assert all(done[key]["figures"] == row["figures"] for key, row in straight.items())
    weights = [tmp_path / work / "tiny/semantic/semantic-0/last/model.safetensors" for work in ("killed", "straight")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert done["semantic", "flat", 0] == known["semantic", "flat", 0]
    assert done["semantic", "semantic", 0]["resumed"] and not straight["semantic", "semantic", 0]["resumed"]
    assert "Of 4 runs 1 were interrupted" in (tmp_path / "killed" / "tiny" / "recipes.md").read_text()


def test_other_settings_are_another_run_and_take_along_what_started_from_it(cifar: Path, tmp_path, monkeypatch) -> None:
    assert run(cifar, tmp_path, "masked", "--seeds", "1") == 0
    before, made = rows_of(tmp_path), []
    few = recipes.Runner.config

    def larger(self: recipes.Runner, arm: recipes.Arm, seed: int) -> recipes.RunConfig:
        config = few(self, arm, seed)
        return (
            recipes.replace(config, augment=recipes.replace(config.augment, flip=0.1))
            if arm.preset == "masked"
            else config
        )

    def noted(config: recipes.RunConfig) -> object:
        made.append(Path(str(config.out)).name)
        return training(config)

    training = recipes.run_training
    monkeypatch.setattr(recipes.Runner, "config", larger)
    monkeypatch.setattr(recipes, "run_training", noted)
    assert run(cifar, tmp_path, "masked", "--seeds", "1") == 0
    assert made == ["pre-trained-0", "fine-tuned-0"]
    after = rows_of(tmp_path)
    assert after.keys() == before.keys()
    assert after["masked", "from scratch", 0] == before["masked", "from scratch", 0]
    assert after["masked", "pre-trained", 0]["settings"]["augment"]["flip"] == 0.1


def test_a_budget_takes_the_place_of_the_experiments_own(cifar: Path, tmp_path: Path) -> None:
    places = recipes.prepare(cifar, None, tmp_path)
    wanted = recipes.chosen(["sam=7", "masked"], places)
    epochs = {name: arm.config(0).loop.epochs for name, arm in wanted["sam=7"].arms.items()}
    assert epochs == {"base": 7, "base, twice the epochs": 14, "SAM": 7, "ASAM": 7}
    assert wanted["masked"] == recipes.EXPERIMENTS["masked"]()


def test_few_pictures_are_the_first_of_every_class_and_the_next_is_set_apart(cifar: Path, tmp_path: Path) -> None:
    small = recipes.prepare(cifar, None, tmp_path)[recipes.SMALL]
    whole, arrays = recipes.read_cifar(cifar).train, np.load(small)
    np.testing.assert_array_equal(arrays["x_train"], whole.pixels()[:300])
    np.testing.assert_array_equal(arrays["x_val"], whole.pixels()[300:])
    np.testing.assert_array_equal(arrays["y_train"], np.arange(300) % 100)


@pytest.mark.parametrize(
    ("ours", "expected"),
    [
        # By hand: mean 2, deviation 1, t of 2 degrees of freedom 4.3027, so 2 -+ 4.3027 / sqrt(3).
        ([0.51, 0.62, 0.73], ("+2.00", "-0.48 to +4.48", "no effect")),
        ([0.53, 0.63, 0.73], ("+3.00", "+3.00 to +3.00", "helps")),
        ([0.47, 0.572, 0.668], ("-3.00", "-3.50 to -2.50", "hurts")),
    ],
)
def test_pairs_are_compared_by_students_t(ours: list[float], expected: tuple[str, str, str]) -> None:
    assert recipes.compared(ours, [0.5, 0.6, 0.7]) == expected


def test_one_seed_says_nothing() -> None:
    assert recipes.compared([0.6], [0.5]) == ("+10.00", "", "one seed says nothing")


def test_a_plan_makes_no_run(cifar: Path, tmp_path: Path, capsys) -> None:
    assert run(cifar, tmp_path, "semantic", "--plan") == 0
    assert "semantic, flat: 3 runs of 5 updates" in capsys.readouterr().out
    assert not (tmp_path / "tiny" / "rows.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(["samm"], "no experiment 'samm'"), (["sam=many"], "number of epochs"), (["finetune"], "--photos")],
)
def test_what_cannot_be_run_is_told(cifar: Path, tmp_path: Path, capsys, arguments: list[str], told: str) -> None:
    assert run(cifar, tmp_path, *arguments) == 2
    assert told in capsys.readouterr().err


def test_an_experiment_that_fails_does_not_stop_the_others(cifar: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    def fails(config: recipes.RunConfig) -> object:
        if "semantic" in str(config.out):
            raise recipes.UserError("the loss is nan")
        return training(config)

    training = recipes.run_training
    monkeypatch.setattr(recipes, "run_training", fails)
    assert run(cifar, tmp_path, "semantic", "ten-minutes", "--seeds", "1") == 2
    assert "semantic: the loss is nan" in capsys.readouterr().err
    assert {experiment for experiment, _, _ in rows_of(tmp_path)} == {"ten-minutes"}


@pytest.mark.slow
@pytest.mark.skipif(packaged_weights("efficientnet-lite0") is None, reason="the weights are not installed")
def test_fine_tuning_photos(cifar: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    for number in range(24):
        place = tmp_path / "photos" / ("train", "validation", "test")[number % 3] / ("hat", "shoe")[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 44, 3), dtype=np.uint8)).save(place / f"{number}.png")
    assert run(cifar, tmp_path, "finetune", "--seeds", "1", "--photos", str(tmp_path / "photos")) == 0
    assert len(rows_of(tmp_path)) == 4


def test_two_moons_are_three_labels_each_and_students_of_a_seed_start_alike(capsys) -> None:
    two_moons.main(["--seeds", "1", "--steps", "2"])
    out = capsys.readouterr().out
    assert all(name in out for name in two_moons.ARMS)
    points = two_moons.Points.draw(np.random.default_rng(0))
    assert points.moons[: 2 * two_moons.LABELS].bincount().tolist() == [3, 3]
    assert points.inputs.abs().max() <= 1
    first = [two_moons.learner_of(recipe, 3).model.state_dict() for recipe in two_moons.ARMS.values()]
    assert all((state["net.0.weight"] == first[0]["net.0.weight"]).all() for state in first)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's own, when it first compiles
def test_what_a_gpu_is_to_measure_is_rehearsed_on_any_machine(cifar: Path, tmp_path: Path, capsys) -> None:
    """Two calls: the first finds its time over after its first stages, the second goes on with the rest."""
    data = ["--cifar100", str(cifar), "--seeds", "1", "--tiny"]
    assert gpu.main([str(tmp_path), *gpu.STAGES[:1], *data]) == 0
    first = json.loads((tmp_path / "gpu.json").read_text())
    assert gpu.main([str(tmp_path), *data, "--minutes", "0"]) == 3
    assert json.loads((tmp_path / "gpu.json").read_text()) == first
    assert gpu.main([str(tmp_path), *data]) == 0
    rows = json.loads((tmp_path / "gpu.json").read_text())
    assert {name.partition("/")[0] for name in rows} == set(gpu.STAGES)
    assert rows.items() >= first.items()
    out = capsys.readouterr().out
    assert all(f"| {name.partition(', seed')[0]} |" in out for name in rows)
    assert {name for name in gpu.GOALS if "cifar10-" not in name} <= {name.partition(", seed")[0] for name in rows}
