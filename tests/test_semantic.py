"""Semantic softmax: against the authors' numbers, against a slow copy of their definition, and as a recipe."""

import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.scale import SCALE
from vitrail.config.preprocessing import Preprocessing
from vitrail.config.run import AugmentConfig, OptimConfig
from vitrail.config.semantic import SemanticConfig
from vitrail.config.vit import ViTConfig
from vitrail.data.augment import Augment
from vitrail.data.base import Batch
from vitrail.data.class_tree import CIFAR100_SUPERCLASSES, ClassTree, cifar100_tree, read_class_tree
from vitrail.errors import UserError
from vitrail.losses import SemanticSoftmaxLoss
from vitrail.models import build
from vitrail.models.base import ImageModel
from vitrail.recipes.semantic import SemanticLearner

GOLDEN = json.loads((Path(__file__).parent / "golden" / "semantic_softmax.json").read_text())
PARENTS: dict[str, str | None] = {"oak": "tree", "pine": "tree", "carp": "fish", "ray": "fish", "manta": "ray"}
CPU = torch.device("cpu")


def golden(name: str) -> Tensor:
    return torch.tensor(GOLDEN[name])


def golden_loss() -> SemanticSoftmaxLoss:
    return SemanticSoftmaxLoss(GOLDEN["class_tree"], GOLDEN["label_smoothing"])


# The loss


def test_levels_weights_and_targets_are_the_authors() -> None:
    loss = golden_loss()
    assert [level.tolist() for level in loss.columns.split(loss.sizes)] == GOLDEN["levels"]
    assert loss.weights == pytest.approx(GOLDEN["weights"][: len(loss.weights)], rel=1e-6)
    assert loss.level_targets(golden("labels")).T.tolist() == GOLDEN["targets"]


def test_loss_is_the_authors() -> None:
    torch.testing.assert_close(golden_loss()(golden("logits"), golden("labels")), golden("loss"), rtol=1e-6, atol=0.0)


def test_distillation_is_the_authors() -> None:
    ours = golden_loss().distill(golden("logits"), golden("teacher_logits"))
    torch.testing.assert_close(ours, golden("kd_loss"), rtol=1e-6, atol=0.0)


def random_tree(seed: int, size: int) -> list[list[int]]:
    """Chains of a random forest whose classes are numbered in any order; wide ones exceed the cap on weights."""
    rng = random.Random(seed)
    steepness = rng.choice([0.02, 0.3, 1.0])
    chains: list[list[int]] = [[0], [1]]
    while len(chains) < size:
        root = rng.random() > steepness
        chains.append([len(chains), *([] if root else rng.choice(chains))])
    order = list(range(size))
    rng.shuffle(order)
    renumbered = [[order[link] for link in chain] for chain in chains]
    return sorted(renumbered)


def slow_levels(tree: Sequence[Sequence[int]], deepest: bool) -> list[tuple[int, list[int]]]:
    last = max(len(chain) for chain in tree) - (not deepest)
    levels = [(i, [c for c in range(len(tree)) if len(tree[c]) == i + 1]) for i in range(last)]
    return [(i, level) for i, level in levels if len(level) > 1]


def slow_loss(tree: Sequence[Sequence[int]], logits: Tensor, labels: Tensor, smoothing: float, deepest: bool) -> Tensor:
    """The definition, word by word: picture by picture, level by level, class by class."""
    total = torch.zeros((), dtype=logits.dtype)
    for depth, level in slow_levels(tree, deepest):
        weight = min(20.0, len(tree) / sum(len(chain) > depth for chain in tree))
        for row, label in zip(logits, labels.tolist(), strict=True):
            ancestors = [c for c in tree[label] if c in level]
            if not ancestors:
                continue
            normaliser = sum(row[c].exp() for c in level)
            for c in level:
                wanted = smoothing / len(level) + (1 - smoothing) * (c == ancestors[0])
                total = total - weight * wanted * (row[c].exp() / normaliser).log() / len(labels)
    return total


def slow_distillation(tree: Sequence[Sequence[int]], logits: Tensor, teacher: Tensor, deepest: bool) -> Tensor:
    total = torch.zeros((), dtype=logits.dtype)
    for _, level in slow_levels(tree, deepest):
        for row, taught in zip(logits, teacher, strict=True):
            ours, theirs = (
                torch.stack([r[c].exp() / sum(r[k].exp() for k in level) for c in level]) for r in (row, taught)
            )
            sure = sum(sorted(theirs.tolist(), reverse=True)[: -(-len(level) // 20)])
            total = total + sure * sum((a - b) ** 2 for a, b in zip(ours, theirs, strict=True))
    return total


@settings(max_examples=25 * SCALE, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    size=st.integers(2, 45),
    batch=st.integers(1, 5),
    smoothing=st.sampled_from([0.0, 0.2]),
    deepest=st.booleans(),
)
def test_random_trees_equal_the_slow_definition(
    seed: int, size: int, batch: int, smoothing: float, deepest: bool
) -> None:
    tree = random_tree(seed, size)
    if not slow_levels(tree, deepest):
        with pytest.raises(UserError, match="no level"):
            SemanticSoftmaxLoss(tree, smoothing, deepest=deepest)
        return
    torch.manual_seed(seed % 2**31)
    logits, teacher = torch.randn(2, batch, size, dtype=torch.float64) * 3
    labels = torch.randint(size, (batch,))
    loss = SemanticSoftmaxLoss(tree, smoothing, deepest=deepest)
    for ours, slow in (
        (lambda x: loss(x, labels), lambda x: slow_loss(tree, x, labels, smoothing, deepest)),
        (lambda x: loss.distill(x, teacher), lambda x: slow_distillation(tree, x, teacher, deepest)),
    ):
        a, b = (logits.clone().requires_grad_() for _ in range(2))
        ours(a).backward()
        slow(b).backward()
        torch.testing.assert_close(ours(logits), slow(logits), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)


@settings(max_examples=20 * SCALE, deadline=None)
@given(seed=st.integers(0, 2**32), size=st.integers(3, 40))
def test_semantic_top1_counts_pairs_of_picture_and_level(seed: int, size: int) -> None:
    tree = random_tree(seed, size)
    torch.manual_seed(seed % 2**31)
    logits, labels = torch.randn(6, size), torch.randint(size, (6,))
    right = pairs = 0
    for _, level in slow_levels(tree, deepest=True):
        for row, label in zip(logits, labels.tolist(), strict=True):
            for own in set(tree[label]) & set(level):
                pairs += 1
                right += own == max(level, key=lambda c: row[c].item())
    counted = SemanticSoftmaxLoss(tree).count_right(logits, labels)
    assert [int(n) for n in counted] == [right, pairs]


def test_a_level_of_one_class_is_left_out_and_the_others_keep_the_weight_of_their_depth() -> None:
    loss = SemanticSoftmaxLoss([[0], [1, 0], [2, 0], [3, 1, 0], [4, 1, 0]])
    assert loss.depths == (1, 2)
    assert loss.weights == pytest.approx([5 / 4, 5 / 2])
    assert loss.level_targets(torch.tensor([0, 4])).T.tolist() == [[-1, -1], [0, 1]]


def test_weights_are_at_most_twenty() -> None:
    tree = [[c] for c in range(98)] + [[98, 0], [99, 0]]
    assert SemanticSoftmaxLoss(tree).weights == (1.0, 20.0)


def test_the_deepest_level_may_be_left_out_as_in_the_authors_code() -> None:
    tree = cifar100_tree()
    assert SemanticSoftmaxLoss(tree).sizes == [20, 100]
    assert SemanticSoftmaxLoss(tree, deepest=False).sizes == [20]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_summed_in_fp32_under_autocast_too(dtype: torch.dtype) -> None:
    logits, labels = golden("logits").to(dtype), golden("labels")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, taught = golden_loss()(logits, labels), golden_loss().distill(logits, golden("teacher_logits").to(dtype))
    assert loss.dtype == taught.dtype == torch.float32
    torch.testing.assert_close(loss, golden_loss()(logits.float(), labels))


def test_the_loss_follows_its_arguments_to_another_device() -> None:
    logits = torch.empty(5, 8, device="meta", requires_grad=True)
    loss = golden_loss()(logits, torch.empty(5, dtype=torch.int64, device="meta"))
    loss.backward()
    assert loss.device.type == "meta"
    assert logits.grad is not None


def test_no_gradient_reaches_the_teacher() -> None:
    teacher = golden("teacher_logits").requires_grad_()
    golden_loss().distill(golden("logits").requires_grad_(), teacher).backward()
    assert teacher.grad is None


def test_infinite_logits_of_a_level_without_target_do_not_spoil_the_loss() -> None:
    logits = torch.zeros(1, 8)
    logits[0, 5] = -torch.inf  # label 1 is a root; class 5 lies two levels below
    assert golden_loss()(logits, torch.tensor([1])).isfinite()


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ([[0], [0, 1]], "must begin with 1"),
        ([[0], [1], []], "must begin with 2"),
        ([[0], [1], [2, 7]], "ancestors"),
        ([[0], [1, 0], [2, 1]], "ancestors"),  # 1 is no root
        ([[0], [1, 0]], "no level"),
    ],
)
def test_lists_that_are_no_tree_are_refused(tree: list[list[int]], words: str) -> None:
    with pytest.raises(UserError, match=words):
        SemanticSoftmaxLoss(tree)


def test_other_outputs_than_the_tree_has_classes_are_refused() -> None:
    with pytest.raises(UserError, match="8 classes, but the model 7 outputs"):
        golden_loss()(torch.zeros(2, 7), torch.tensor([0, 1]))


# The tree


def named(tree: ClassTree) -> dict[str, list[str]]:
    """Each class with its ancestors, by name."""
    return {name: [tree.names[link] for link in chain[1:]] for name, chain in zip(tree.names, tree, strict=True)}


SAME = {
    "oak": ["tree"],
    "pine": ["tree"],
    "carp": ["fish"],
    "ray": ["fish"],
    "manta": ["ray", "fish"],
    "tree": [],
    "fish": [],
}


def test_a_tree_of_parents_has_each_class_before_its_ancestors() -> None:
    tree = ClassTree.from_parents(PARENTS)
    assert named(tree) == SAME
    assert [chain[0] for chain in tree] == list(range(len(tree)))


@pytest.mark.parametrize(
    "document",
    [
        {"oak": "tree", "pine": "tree", "carp": "fish", "ray": "fish", "manta": "ray", "tree": None},
        {"tree": ["oak", "pine"], "fish": {"carp": None, "ray": ["manta"]}},
        [{"tree": ["oak", "pine"]}, {"fish": ["carp", {"ray": "manta"}]}],
    ],
    ids=["parents", "groups", "list"],
)
def test_json_is_read_in_both_forms(tmp_path: Path, document: object) -> None:
    file = tmp_path / "tree.json"
    file.write_text(json.dumps(document))
    assert named(read_class_tree(file)) == SAME


def test_names_are_matched_whatever_system_wrote_their_accents(tmp_path: Path) -> None:
    file = tmp_path / "tree.json"
    file.write_text(json.dumps({"cha\u0302taigne": "fruit", "figue": "fruit"}))
    assert read_class_tree(file).for_classes(["figue", "ch\u00e2taigne"]).names == ("figue", "ch\u00e2taigne", "fruit")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "JSON"),
        ('{"oak": "tree", "oak": "fish"}', "equal names"),
        ('{"tree": ["oak"], "fish": ["oak"]}', "'oak' is there twice"),
        ('{"tree": [1]}', "1 is neither"),
        ('{"oak": "tree", "pine": ["tree"]}', "parent of 'pine'"),
        ('{"oak": "tree", "tree": "oak"}', "circle: oak < tree < oak"),
        ("[" * 100_000, "JSON"),
        ("{}", "no classes"),
    ],
)
def test_json_that_is_no_tree_is_refused(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "tree.json"
    file.write_text(text)
    with pytest.raises(UserError, match=words):
        read_class_tree(file)


def test_nested_folders_with_pictures_are_a_tree(tmp_path: Path) -> None:
    for place in ("tree/oak", "tree/pine", "fish/carp", "fish/ray", "fish/ray/manta", ".hidden/x"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "1.jpg").touch()
    (tmp_path / "notes").mkdir()
    assert named(read_class_tree(tmp_path)) == SAME
    (tmp_path / "tree" / "carp").mkdir()
    (tmp_path / "tree" / "carp" / "1.png").touch()
    with pytest.raises(UserError, match="have one name"):
        read_class_tree(tmp_path)


@pytest.mark.parametrize("kind", ["lists", "numpy"])
def test_the_file_of_imagenet21k_p_is_read(tmp_path: Path, kind: str) -> None:
    ids = [f"n{i:08d}" for i in range(8)]
    chains: list[list[int]] = GOLDEN["class_tree"]
    torch.save(
        {
            "class_list": ids if kind == "lists" else np.array(ids),
            "class_description": {name: name.upper() for name in ids},
            "class_tree_list": chains if kind == "lists" else [[np.int64(link) for link in chain] for chain in chains],
        },
        tmp_path / "tree.pth",
    )
    tree = read_class_tree(tmp_path / "tree.pth")
    assert tree.names == tuple(ids)
    assert [list(chain) for chain in tree] == chains


class Evil:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("run"),))


@pytest.mark.parametrize(
    "document",
    [
        {"class_tree_list": [[0]], "class_description": Evil()},
        {"weights": 1},
        {"class_tree_list": [[7]], "class_list": ["a"]},
    ],
    ids=["code", "weights", "places"],
)
def test_a_file_that_is_no_tree_is_refused_and_not_run(tmp_path: Path, monkeypatch, document: object) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(document, tmp_path / "tree.pth")
    with pytest.raises(UserError, match="damaged"):
        read_class_tree(tmp_path / "tree.pth")
    assert not (tmp_path / "run").exists()


def test_what_is_no_tree_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no class tree cifar10"):
        read_class_tree("cifar10")
    with pytest.raises(UserError, match="No such file"):
        read_class_tree(tmp_path / "tree.json")


def test_classes_come_first_and_superclasses_after_them() -> None:
    tree = ClassTree.from_parents(PARENTS).for_classes(["ray", "oak", "manta"])
    assert tree.names[:3] == ("ray", "oak", "manta")
    assert named(tree) == {"ray": ["fish"], "oak": ["tree"], "manta": ["ray", "fish"], "tree": [], "fish": []}
    alone = ClassTree.from_parents(PARENTS).for_classes(["ray", "oak", "manta"], ancestors=False)
    assert named(alone) == {"ray": [], "oak": [], "manta": ["ray"]}


def test_a_class_without_place_in_the_tree_is_named() -> None:
    with pytest.raises(UserError, match=r"no class 'oka'.*oak"):
        ClassTree.from_parents(PARENTS).for_classes(["oka", "ray"])


def test_cifar100_has_five_classes_in_each_of_twenty_superclasses() -> None:
    assert len(CIFAR100_SUPERCLASSES) == 20
    assert all(len(classes.split()) == 5 for classes in CIFAR100_SUPERCLASSES.values())
    tree = cifar100_tree()
    assert len(set(tree.names)) == len(tree) == 120
    assert named(tree)["maple_tree"] == ["trees"]


# The recipe


def tiny_model(labels: Sequence[str]) -> ImageModel:
    torch.manual_seed(0)
    model = build(
        ViTConfig(image_size=(8, 8), patch_size=(4, 4), width=16, depth=1, mlp_dim=16, heads=2, num_classes=len(labels))
    )
    torch.nn.init.normal_(head_of(model).weight, std=0.1)
    model.labels = tuple(labels)
    return model


def head_of(model: ImageModel) -> torch.nn.Linear:
    assert isinstance(model.head, torch.nn.Linear)
    return model.head


LABELS = ("oak", "pine", "carp", "ray")


@pytest.fixture
def tree_file(tmp_path: Path) -> str:
    file = tmp_path / "tree.json"
    file.write_text(json.dumps({"tree": ["oak", "pine"], "fish": ["carp", "ray"]}))
    return str(file)


def make(model: ImageModel, tree: str, *, teacher: ImageModel | None = None, ema: float = 0.0) -> SemanticLearner:
    return SemanticLearner(
        model,
        SemanticConfig(tree=tree),
        OptimConfig(lr=1e-2, ema=ema, clip_norm=0.0, name="sgd", momentum=0.0, weight_decay=0.0),
        augment=Augment(AugmentConfig(crop="none", flip=0.0), model.preprocessing),
        class_counts=np.ones(len(model.labels), np.int64),
        device=CPU,
        precision="fp32",
        teacher=teacher,
    )


def batches(parts: int = 1, seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (8, 3, 8, 8), generator=generator, dtype=torch.uint8)
    targets = torch.randint(len(LABELS), (8,), generator=generator)
    return [
        Batch(images=i, targets=t, keys=torch.arange(len(t)), cropped=True)
        for i, t in zip(images.chunk(parts), targets.chunk(parts), strict=True)
    ]


def test_superclasses_have_rows_while_training_and_none_when_shipped(tree_file: str) -> None:
    learner = make(tiny_model(LABELS), tree_file, ema=0.5)
    head = head_of(learner.model)
    assert head.weight.shape[0] == 6
    assert not head.weight[4:].any()
    learner.step(batches())
    assert head.weight[4:].any()
    assert learner.average is not None
    averaged = learner.average.average["head.weight"][:4].clone()
    with learner.shipped_weights():
        assert torch.equal(head_of(learner.model).weight, averaged)
        assert learner.model(torch.zeros(1, 3, 8, 8)).shape == (1, learner.model.config.num_classes)
    assert learner.model.head is head


def test_shipping_that_fails_gives_the_rows_back(tree_file: str) -> None:
    learner = make(tiny_model(LABELS), tree_file)
    head = learner.model.head
    with pytest.raises(KeyboardInterrupt), learner.shipped_weights():
        raise KeyboardInterrupt
    assert learner.model.head is head


def test_accumulation_changes_neither_step_nor_what_is_logged(tree_file: str) -> None:
    one, four = (make(tiny_model(LABELS), tree_file) for _ in range(2))
    scalars = [one.step(batches()), four.step(batches(4))]
    for name in ("loss", "semantic_top1"):
        torch.testing.assert_close(scalars[0][name], scalars[1][name])
    for a, b in zip(one.model.parameters(), four.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_the_loss_logged_is_the_loss_of_the_tree(tree_file: str) -> None:
    learner, plain = make(tiny_model(LABELS), tree_file), tiny_model(LABELS)
    (batch,) = batches()
    images, _ = Augment(AugmentConfig(crop="none", flip=0.0), plain.preprocessing)(batch, classes=4)
    logits = torch.cat([plain(images), torch.zeros(8, 2)], dim=1)
    expected = SemanticSoftmaxLoss([[0, 4], [1, 4], [2, 5], [3, 5], [4], [5]])
    scalars = learner.step([batch])
    torch.testing.assert_close(scalars["loss"], expected(logits, batch.targets).detach())
    right, pairs = expected.count_right(logits, batch.targets)
    assert scalars["semantic_top1"] == right / pairs


def test_a_stopped_learner_goes_on_bit_for_bit(tree_file: str) -> None:
    straight, stopped, resumed = (make(tiny_model(LABELS), tree_file, ema=0.9) for _ in range(3))
    for learner in (straight, stopped):
        learner.step(batches(2, seed=1))
    resumed.load_state_dict(stopped.state_dict())
    for learner in (straight, resumed):
        learner.step(batches(2, seed=2))
    for name, tensor in straight.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


def test_a_model_whose_head_was_widened_is_taken_as_it_is(tree_file: str) -> None:
    """As when the length of a run is measured on a copy."""
    model = make(tiny_model(LABELS), tree_file).model
    head = model.head
    assert make(model, tree_file).model.head is head


def test_the_teacher_adds_its_distance_over_the_classes_of_the_data(tree_file: str) -> None:
    teacher = tiny_model(LABELS)
    torch.nn.init.normal_(head_of(teacher).weight)
    teacher.preprocessing = Preprocessing(image_size=(8, 8), mean=(0.4,), std=(0.25,))
    plain, taught = make(tiny_model(LABELS), tree_file), make(tiny_model(LABELS), tree_file, teacher=teacher)
    (batch,) = batches()
    with torch.no_grad():
        flat = SemanticSoftmaxLoss([[c] for c in range(4)])
        student = plain.model(batch.images / 127.5 - 1)[:, :4]
        distance = flat.distill(student, teacher((batch.images / 255 - 0.4) / 0.25)) / 8
    losses = [learner.step([batch])["loss"] for learner in (plain, taught)]
    assert distance > 1e-3
    torch.testing.assert_close(losses[1] - losses[0], distance, rtol=1e-4, atol=1e-6)
    assert not taught.model._forward_pre_hooks
    assert set(taught.state_dict()["models"]) == {"model"}


def test_learning_goes_down(tree_file: str) -> None:
    learner = make(tiny_model(LABELS), tree_file, teacher=tiny_model(LABELS))
    losses = [float(learner.step(batches())["loss"]) for _ in range(60)]
    assert losses[-1] < losses[0]
    assert math.isfinite(losses[-1])


def test_what_does_not_fit_is_refused(tree_file: str, tmp_path: Path) -> None:
    model = tiny_model(LABELS)
    with pytest.raises(UserError, match="teacher answers"):
        make(model, tree_file, teacher=tiny_model(LABELS[:3]))
    flat = tmp_path / "flat.json"
    flat.write_text(json.dumps(list(LABELS)))
    with pytest.raises(UserError, match="nothing semantic"):
        make(tiny_model(LABELS), str(flat))
    mixing = Augment(AugmentConfig(mixup=0.2), model.preprocessing)
    keywords = {"class_counts": np.ones(4, np.int64), "device": CPU, "precision": "fp32"}
    with pytest.raises(UserError, match=r"--augment\.mixup 0"):
        SemanticLearner(tiny_model(LABELS), SemanticConfig(tree=tree_file), OptimConfig(), augment=mixing, **keywords)
    several = tiny_model(LABELS)
    several.multi_label = True
    with pytest.raises(UserError, match="one label per picture"):
        make(several, tree_file)
    with pytest.raises(UserError, match=r"--recipe\.label-smoothing must lie in \[0, 1\)"):
        replace(SemanticConfig(), label_smoothing=1.0)
