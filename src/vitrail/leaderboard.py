"""The ten systems that led CIFAR-100 and ImageNet in 2020 and 2021: what was published, what is verified here.

`docs/leaderboard.md` is this table; `python -m vitrail.leaderboard` writes it anew.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vitrail.config.model import ALIASES
from vitrail.presets import PRESETS
from vitrail.presets.describe import command
from vitrail.zoo import describe

CHECKS = {
    "builds": "built at its published size, with the exact number of parameters",
    "equals": "the same logits as the authors' code or, where there is none to run, as a live peer",
    "imports": "the weights that people have load, and go back bit for bit",
    "trains": "a small member trains, and resumes bit for bit",
    "recipe": "what is published of its training recipe is a preset, which runs end to end when made small; its page "
    "says what was not published",
}

_BUILT, _COUNT = "test_parameters_are_as_many_as_published", "test_parameters_are_as_many_as_computed_from_the_paper"
_RUNS = "tests/test_all_presets.py::test_every_preset_runs_end_to_end"
_TRAINS = ("tests/test_families.py::test_a_stopped_run_of_any_family_goes_on_bit_for_bit",)
_VIT = {
    "builds": (f"tests/test_vit.py::{_BUILT}",),
    "equals": ("tests/test_names.py::test_official_weights_give_the_official_answer_with_no_name_given",),
    "imports": (
        "tests/test_names.py::test_official_arrays_come_back_bit_for_bit",
        "tests/peers/test_vit.py::test_timm_agrees_both_ways",
        "tests/peers/test_vit.py::test_hugging_faces_classifier_agrees_both_ways",
    ),
    "trains": _TRAINS,
}
_EFFICIENTNET = {
    "builds": (f"tests/test_efficientnet.py::{_BUILT}",),
    "equals": ("tests/peers/test_efficientnet.py::test_any_width_depth_and_picture_size_gives_timms_logits",),
    "imports": ("tests/test_efficientnet_names.py::test_foreign_arrays_come_back_bit_for_bit",),
    "trains": _TRAINS,
}
_COATNET = {
    "builds": (f"tests/test_coatnet.py::{_COUNT}",),
    "equals": (
        "tests/peers/test_coatnet.py::test_any_network_answers_as_timms",
        "tests/peers/test_coatnet.py::test_s3_of_coatnet_6_is_made_of_timms_blocks",
    ),
    "trains": _TRAINS,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class System:
    """One row of the leaderboards."""

    table: str
    """CIFAR-100 or ImageNet."""
    system: str
    """As the leaderboard names it; an alias of the model."""
    accuracy: str
    """Published top-1 in percent."""
    parameters: str
    """Published number of parameters, as printed."""
    note: str = ""
    """Why the built number is another, or what is missing."""
    tests: dict[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    """Tests that verify each check; a check without any is not done. Of `recipe` its preset says: `verified`."""

    @property
    def preset(self) -> str | None:
        """Name of the preset that is the system's recipe."""
        return next((name for name, each in PRESETS.items() if each.alias == self.system), None)

    @property
    def verified(self) -> dict[str, tuple[str, ...]]:
        """The tests behind every check."""
        recipe = () if self.preset is None else (f"{_RUNS}[{self.preset}]",)
        return {check: self.tests.get(check, ()) for check in CHECKS} | {"recipe": recipe}


SYSTEMS = (
    System(
        table="CIFAR-100", system="EffNet-L2 (SAM)", accuracy="96.08", parameters="480M",
        note="its Noisy Student weights load under timm's names; those after SAM were not released in PyTorch",
        tests=_EFFICIENTNET,
    ),
    System(table="CIFAR-100", system="ViT-H/14", accuracy="94.55", parameters="632M", tests=_VIT),
    System(
        table="CIFAR-100", system="ViT-B-16 (ImageNet-21K-P pretrain)", accuracy="94.2", parameters="86M",
        note="94.4M with its 11,221 classes",
        tests=_VIT | {"equals": ("tests/peers/test_vit.py::test_timm_agrees_both_ways",)},
    ),
    System(
        table="CIFAR-100", system="CvT-W24", accuracy="94.09", parameters="277M",
        tests={
            "builds": (f"tests/test_cvt.py::{_BUILT}",),
            "equals": (
                "tests/test_cvt.py::test_official_weights_give_the_official_answer",
                "tests/peers/test_cvt.py::test_their_weights_give_their_answer_here_and_come_back_bit_for_bit",
            ),
            "imports": ("tests/test_cvt.py::test_official_arrays_come_back_bit_for_bit",),
            "trains": _TRAINS,
        },
    ),
    System(table="CIFAR-100", system="ViT-L/16", accuracy="93.90", parameters="307M", tests=_VIT),
    System(
        table="ImageNet", system="CoAtNet-7", accuracy="90.88", parameters="2440M",
        note="its weights and code were never released: the peer is timm, its blocks put together as the paper says; "
        "recipe not published in full",
        tests=_COATNET,
    ),
    System(
        table="ImageNet", system="ViT-G/14", accuracy="90.45", parameters="1843M",
        note="1843M is the encoder alone (1,842,772,352); its weights were never released, "
        "those of big_vision's smaller models of this kind load",
        tests=_VIT,
    ),
    System(
        table="ImageNet", system="CoAtNet-6", accuracy="90.45", parameters="1470M",
        note="last stage at width 3072; the printed 2048 would make 1348M. Weights as CoAtNet-7; "
        "recipe not published in full",
        tests=_COATNET,
    ),
    System(
        table="ImageNet", system="ViT-MoE-15B (Every-2)", accuracy="90.35", parameters="14700M",
        note="14,705,071,769 with the 29,593 classes of its pre-training; only weights of smaller sizes were "
        "released; recipe not published in full",
        tests={
            "builds": ("tests/test_vmoe.py::test_the_15b_model_has_every_one_of_its_parameters",),
            "equals": ("tests/test_vmoe.py::test_official_weights_give_the_official_answer_and_losses",),
            "imports": ("tests/test_partitioned.py::test_an_official_checkpoint_gives_the_official_answer",),
            "trains": _TRAINS,
        },
    ),
    System(
        table="ImageNet", system="Meta Pseudo Labels (EfficientNet-L2)", accuracy="90.2", parameters="480M",
        note="no weights were released: `imports` is of Noisy Student's weights, the same network; "
        "recipe not published in full",
        tests=_EFFICIENTNET,
    ),
)  # fmt: skip


def rows() -> list[dict[str, Any]]:
    """Return the table: published figures, the parameters built here, and the tests behind each check."""
    return [
        {
            "table": each.table,
            "system": each.system,
            "model": ALIASES[each.system],
            "published": each.accuracy,
            "published_parameters": each.parameters,
            "parameters": describe(each.system)["parameters"],
            "note": each.note,
            "preset": each.preset,
            "verified": {check: list(tests) for check, tests in each.verified.items()},
        }
        for each in SYSTEMS
    ]


def markdown() -> str:
    """Return the table as a page."""
    lines = [
        "# The leaderboard",
        "",
        "Ten systems led CIFAR-100 and ImageNet in 2020 and 2021. Accuracies are their authors': we have not retrained",
        "them. `vitrail models --leaderboard` prints this table, with `--json` the tests behind every mark.",
        "",
        *(f"- **{check}**: {meaning}." for check, meaning in CHECKS.items()),
        "",
        f"| leaderboard | system | top-1 | parameters published | built here | {' | '.join(CHECKS)} | train |",
        "|---|---|---|---|---|" + "---|" * len(CHECKS) + "---|",
    ]
    for row in rows():
        marks = " | ".join("yes" if tests else "not yet" for tests in row["verified"].values())
        name, size = f"{row['system']}: `{row['model']}`", f"{row['parameters']:,}"
        train = f"`{command(row['preset'], PRESETS[row['preset']])}`" if row["preset"] else ""
        cells = [row["table"], name, row["published"], row["published_parameters"], size, marks, train]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Parameters are counted with 1,000 classes, `vit-b16-21kp` with its 11,221. Every system's preset but Meta",
        "Pseudo Labels' is its fine-tuning, from pretrained weights. Words in capitals are yours to fill in.",
        "`vitrail train` takes the name of a system, too; [recipes](recipes/README.md) say where they differ from what",
        "was published.",
        "",
    ]
    lines += [f"- {row['system']}: {row['note']}." for row in rows() if row["note"]]
    lines += ["", "## Tests behind the marks", ""]
    tests = sorted({test for each in SYSTEMS for names in each.verified.values() for test in names})
    return "\n".join([*lines, *(f"- `{test}`" for test in tests), ""])


if __name__ == "__main__":
    Path("docs/leaderboard.md").write_text(markdown(), encoding="utf-8")
