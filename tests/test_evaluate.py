"""Answers to a set of pictures: in order, complete, the same by every path, and honest about what is broken."""

import gzip
import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from vitrail.config.preprocessing import Preprocessing
from vitrail.config.vit import ViTConfig
from vitrail.data.arrays import ArraySource
from vitrail.data.base import BoxChooser, Picture, Source, Subset
from vitrail.data.view import evaluation_view
from vitrail.errors import BrokenPicture, UserError
from vitrail.evaluation import ask, evaluate, match_classes, predict_logits
from vitrail.models import ViT

CLASSES = ("cat", "dog", "owl")


class Loose(Source):
    """Pictures that do not lie in one array; some may be broken."""

    def __init__(self, images: list[np.ndarray], targets: np.ndarray, broken: tuple[int, ...] = ()) -> None:
        self.images, self.targets, self.classes, self.broken = images, targets, CLASSES, broken

    def load(self, index: int) -> Picture:
        if index in self.broken:
            raise BrokenPicture("torn in two")
        return self.images[index]

    def load_crop(self, index: int, choose_box: BoxChooser, size: tuple[int, int], interpolation: str) -> Picture:
        raise AssertionError("evaluation takes no random crop")

    def name(self, index: int) -> str:
        return f"photo {index}.jpg"

    def fingerprint(self) -> str:
        return "loose"


def tiny_model(labels: tuple[str, ...] = CLASSES, **changes: Any) -> ViT:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"image_size": (8, 8), "patch_size": (4, 4), "channels": 3, "num_classes": len(labels)}
    model = ViT(ViTConfig(**sizes, width=16, depth=2, mlp_dim=32, heads=2, dropout=0.3))
    model.init_weights()
    assert model.head is not None
    torch.nn.init.normal_(model.head.weight)
    model.labels = labels
    model.preprocessing = replace(Preprocessing(image_size=(8, 8), fit="squash"), **changes)
    return model


def random_pictures(n: int, height: int = 8, width: int = 8) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (n, height, width, 3), np.uint8), rng.integers(0, 3, n)


def array_source(n: int = 50) -> ArraySource:
    return ArraySource(*random_pictures(n), CLASSES)


def loose_source(n: int = 50, broken: tuple[int, ...] = ()) -> Loose:
    images, targets = random_pictures(n)
    return Loose(list(images), targets, broken)


@pytest.mark.parametrize("workers", [0, 3])
def test_logits_are_those_of_each_picture_alone_in_the_order_of_the_source(workers: int) -> None:
    model = tiny_model(fit="crop", crop_fraction=0.875)
    rng = np.random.default_rng(1)
    images = [rng.integers(0, 256, (rng.integers(5, 40), rng.integers(5, 40), 3), np.uint8) for _ in range(23)]
    source = Loose(images, rng.integers(0, 3, 23))
    got = predict_logits(model, source, batch_size=4, workers=workers)
    model.eval()
    with torch.no_grad():
        alone = [model(evaluation_view(image, model.preprocessing)[None])[0].numpy() for image in images]
    np.testing.assert_allclose(got.logits, alone, atol=1e-5)
    np.testing.assert_array_equal(got.targets, source.targets)
    assert got.names == [f"photo {i}.jpg" for i in range(23)]
    assert got.labels == CLASSES


@pytest.mark.parametrize(("fit", "fraction"), [("squash", 0.875), ("pad", 0.875), ("crop", 1.0), ("crop", 0.875)])
def test_pictures_from_memory_give_the_same_numbers_as_from_files(fit: Any, fraction: float) -> None:
    model = tiny_model(fit=fit, crop_fraction=fraction)
    from_files = predict_logits(model, loose_source(), batch_size=16)
    from_memory = predict_logits(model, array_source(), batch_size=16)
    np.testing.assert_array_equal(from_memory.logits, from_files.logits)


def test_pictures_of_a_subset_are_the_ones_asked_for() -> None:
    model, source = tiny_model(), array_source()
    indices = [7, 3, 44, 3]
    whole = predict_logits(model, source)
    part = predict_logits(model, Subset(source, indices), batch_size=3)
    np.testing.assert_allclose(part.logits, whole.logits[indices], atol=1e-5)
    assert part.names == [f"picture#{i}" for i in indices]


@pytest.mark.parametrize(("size", "batch"), [((224, 224), 8), ((32, 32), 256), ((384, 384), 2), ((1024, 2048), 1)])
def test_a_processor_is_asked_about_few_pictures_at_a_time_more_of_small_ones(size: Any, batch: int) -> None:
    asked: list[int] = []
    model = tiny_model(image_size=size)
    model.preprocessing = replace(model.preprocessing, image_size=size)

    def answer(views: torch.Tensor) -> torch.Tensor:
        asked.append(len(views))
        return views.mean(dim=(2, 3))

    assert len(ask(model, array_source(batch + 1), answer=answer).rows) == batch + 1
    assert asked == [batch, 1]


def test_decoding_threads_leave_the_other_cores_to_the_model() -> None:
    before, seen = torch.get_num_threads(), list[int]()

    class Watched(Loose):
        def load(self, index: int) -> Picture:
            seen.append(torch.get_num_threads())
            return super().load(index)

    torch.set_num_threads(2)
    try:
        images, targets = random_pictures(20)
        predict_logits(tiny_model(), Watched(list(images), targets), batch_size=4, workers=2)
        assert set(seen) == {1}
        assert torch.get_num_threads() == 2
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 2
    finally:
        torch.set_num_threads(before)


def test_broken_pictures_are_named_counted_and_left_out() -> None:
    model = tiny_model()
    got = predict_logits(model, loose_source(50, broken=(0, 17, 49)), batch_size=8, max_broken=0.1)
    assert got.broken == [(f"photo {i}.jpg", "torn in two") for i in (0, 17, 49)]
    kept = [i for i in range(50) if i not in (0, 17, 49)]
    assert len(got) == 47
    assert got.indices is not None
    assert got.indices.tolist() == kept
    whole = predict_logits(model, loose_source(50), batch_size=8)
    np.testing.assert_allclose(got.logits, whole.logits[kept], atol=1e-5)
    assert {answer.name for answer in got.worst(47)} == {f"photo {answer.index}.jpg" for answer in got.worst(47)}


def test_a_whole_batch_of_broken_pictures_is_left_out() -> None:
    got = predict_logits(tiny_model(), loose_source(12, broken=(4, 5, 6, 7)), batch_size=4, max_broken=0.5)
    assert len(got) == 8


def test_too_many_broken_pictures_are_an_error_that_names_the_first() -> None:
    with pytest.raises(UserError, match=r"2 of 50 .* more than 1\.0%; the first is photo 17\.jpg: torn in two"):
        predict_logits(tiny_model(), loose_source(50, broken=(17, 18)), batch_size=25)
    with pytest.raises(UserError, match="no picture to evaluate"):
        predict_logits(tiny_model(), loose_source(2, broken=(0, 1)), max_broken=1.0)


def test_evaluation_leaves_modes_as_they_were_even_when_stopped() -> None:
    model = tiny_model().train()
    model.encoder[0].eval()  # a part that was frozen apart
    predict_logits(model, array_source())
    modes = [module.training for module in model.encoder]

    calls = []

    def stop() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict_logits(model, loose_source(), batch_size=4, stop=stop)
    assert len(calls) == 3
    assert model.training
    assert modes == [False, True] == [module.training for module in model.encoder]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode")]


def test_reduced_precision_answers_nearly_the_same_in_float32() -> None:
    model, source = tiny_model(), array_source(8)
    full, half = predict_logits(model, source), predict_logits(model, source, precision="bf16")
    assert half.logits.dtype == np.float32
    assert 0 < np.abs(full.logits - half.logits).max() < 0.1


def test_labels_are_matched_by_name_when_their_order_differs() -> None:
    model, source = tiny_model(labels=("owl", "cat", "dog", "yak")), array_source()
    got = evaluate(model, source)
    assert got.labels == ("owl", "cat", "dog", "yak")
    assert [got.labels[t] for t in got.targets] == [CLASSES[t] for t in source.targets]
    assert match_classes(source, model).fingerprint() == source.fingerprint()
    assert got.per_class()[3]["f1"] is None


def test_rows_of_several_labels_are_matched_by_name() -> None:
    rows = np.array([[1, 0, 1], [0, 0, 0], [0, 1, 0]], np.float32)
    source = ArraySource(random_pictures(3)[0], rows, CLASSES)
    model = tiny_model(labels=("yak", "owl", "dog", "cat"))
    model.multi_label = True
    assert evaluate(model, source).targets.tolist() == [[0, 1, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0]]


def test_classes_that_do_not_fit_are_refused_by_name() -> None:
    with pytest.raises(UserError, match="1 classes that the model does not know: 'owl'"):
        evaluate(tiny_model(labels=("cat", "dog", "yak")), array_source())
    with pytest.raises(UserError, match=r"several classes of one name.*'cat'"):
        evaluate(tiny_model(labels=("cat", "dog", "owl", "cat")), array_source())
    unnamed = tiny_model(labels=("a", "b"))
    unnamed.labels = ()
    with pytest.raises(UserError, match="3 classes, but the model 2 outputs"):
        evaluate(unnamed, array_source())
    several = tiny_model()
    several.multi_label = True
    with pytest.raises(UserError, match="exactly one label, the model several labels"):
        evaluate(several, array_source())


def test_a_model_without_names_takes_those_of_the_data() -> None:
    model = tiny_model()
    model.labels = ()
    assert evaluate(model, array_source()).labels == CLASSES


def test_data_is_opened_from_a_path_and_its_test_part_taken(tmp_path: Path) -> None:
    images = random_pictures(30)[0][..., :1]
    for part, count in (("train", 30), ("t10k", 15)):
        labels = np.arange(count) % 10
        for kind, values in (("images-idx3", images[:count, ..., 0]), ("labels-idx1", labels)):
            head = bytes([0, 0, 8, values.ndim]) + b"".join(side.to_bytes(4, "big") for side in values.shape)
            with gzip.open(tmp_path / f"{part}-{kind}-ubyte.gz", "wb") as file:
                file.write(head + values.astype(np.uint8).tobytes())
    torch.manual_seed(0)
    model = ViT(ViTConfig(image_size=(8, 8), patch_size=(4, 4), channels=1, num_classes=10, width=8, depth=1, heads=1))
    model.init_weights()
    assert len(evaluate(model, tmp_path)) == 15
    assert len(evaluate(model, str(tmp_path), split="train")) == 30  # all of it: nothing is set aside


def test_torchruns_number_without_its_group_leaves_no_picture_out(monkeypatch) -> None:
    monkeypatch.setenv("RANK", "1")
    got = predict_logits(tiny_model(), loose_source(4), workers=0)
    assert got.indices is not None
    assert got.indices.tolist() == [0, 1, 2, 3]


def _one_of_two(rank: int, folder: Path) -> None:
    place = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    try:
        calls: list[int] = []
        source = loose_source(11, broken=(4,))
        got = predict_logits(
            tiny_model(), source, batch_size=5, workers=1, max_broken=0.2, stop=lambda: calls.append(1)
        )
        assert got.indices is not None
        arrays: dict[str, Any] = {"logits": got.logits, "indices": got.indices, "broken": np.array(got.broken)}
        np.savez(folder / f"{rank}.npz", calls=len(calls), **arrays)
        with pytest.raises(UserError, match=r"1 of 11 .* the first is photo 4\.jpg"):
            predict_logits(tiny_model(), source, batch_size=5, workers=1)
    finally:
        dist.destroy_process_group()


def test_two_processes_return_what_one_does_each_picture_once(tmp_path: Path) -> None:
    other = multiprocessing.get_context("spawn").Process(target=_one_of_two, args=(1, tmp_path))
    other.start()
    _one_of_two(0, tmp_path)
    other.join(60)
    assert other.exitcode == 0
    alone = predict_logits(tiny_model(), loose_source(11, broken=(4,)), max_broken=0.2)
    for rank in range(2):
        got = np.load(tmp_path / f"{rank}.npz")
        assert got["indices"].tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 9, 10]
        np.testing.assert_allclose(got["logits"], alone.logits, atol=1e-5)
        assert got["broken"].tolist() == [["photo 4.jpg", "torn in two"]]
        assert got["calls"] == 2  # six and five pictures in batches of five: the last round of one process is empty
