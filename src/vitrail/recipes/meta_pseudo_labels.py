"""Meta Pseudo Labels (Pham et al., 2021, arXiv 2003.10580), with UDA (Xie et al., 2020, arXiv 1904.12848).

One update, with T the teacher, S the student, l a labelled batch, u one without labels in a weak and a strong view:

    1. T answers to [l, u weak, u strong] in one forward pass; of u strong it names the pseudo labels y.
    2. S learns CE(y, S(u strong)) in one step, and never from labels.
    3. h = CE(S(l)) before that step minus CE(S(l)) after it: positive where the pseudo labels helped with l.
    4. T learns CE(T(l)) + w(t) UDA + (h - baseline) * sum of CE(y, T(u strong)).

At the end of the run S is fine-tuned on labelled pictures alone. Against what was released (google-research,
meta_pseudo_labels/training_utils.py) h has the sign that the derivation gives it, y is hard, and both losses on l are
measured alike; `feedback="released"` does as the release does.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from enum import IntEnum
from functools import partial
from typing import Any, NamedTuple, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vitrail.config.meta_pseudo_labels import MetaPseudoLabelsConfig
from vitrail.config.run import OptimConfig
from vitrail.data.augment import Augment, shift
from vitrail.data.base import Batch
from vitrail.data.random import sample_keys, uniform
from vitrail.errors import UserError
from vitrail.losses import classification_loss
from vitrail.models import build
from vitrail.models.base import ImageModel, WithLoss
from vitrail.models.blocks import recompute_contexts
from vitrail.optim import AveragedWeights, build_optimizer, learning_rate, prepare, set_learning_rate
from vitrail.parallel import (
    Precision,
    accumulating,
    autocast,
    average_over_processes,
    mean_over_processes,
    world_size,
)
from vitrail.recipes.base import Learner, Place, move
from vitrail.sharding import is_sharded

BASELINE_DECAY = 0.99
"""Of the average of h that is taken off h, so that a label is judged by what it does beyond the usual."""


class ViewDraw(IntEnum):
    """Streams of a picture's random numbers (`data.random`), far from those of its augmentation."""

    AGAIN = 200
    LABEL = 201


class Views(NamedTuple):
    """A micro-batch, augmented."""

    labelled: Float[Tensor, "l c h w"]
    targets: Float[Tensor, "l classes"]
    weak: Float[Tensor, "u c h w"]
    strong: Float[Tensor, "u c h w"]
    keys: Int[Tensor, " u"]
    """Of the pictures without labels."""


class Lesson(NamedTuple):
    """What the teacher says of a micro-batch, still to be learned from."""

    labelled: Float[Tensor, "l classes"]
    strong: Float[Tensor, "u classes"]
    wanted: Float[Tensor, "u classes"]
    """Its sharpened probabilities for weak views, which UDA wants of strong ones."""
    sure: Bool[Tensor, " u"]
    """Where these are sure enough to be wanted."""
    taught: Float[Tensor, "u classes"]
    """Targets of the student: one-hot pseudo labels, or probabilities with `feedback="released"`."""
    own: Tensor | float
    """The teacher's loss of its own, if it has one, times the pictures; else 0."""


@final
class MetaPseudoLabelsLearner(Learner):
    """A student that is shipped and a teacher; each has one clipped step per update, the student first.

    Micro-batches: both steps are taken over all of them together, as without accumulation. The teacher's answers to all
    are needed before the student's step, their gradients only after it: with several micro-batches, activations are
    computed again for the backward pass (`torch.utils.checkpoint`), with the same dropout, instead of being kept. Where
    BatchNorm is, a micro-batch is normalised by itself, as everywhere.

    Processes: losses are means, and the feedback a sum, over the pictures of all; h is one number for all. Gradients
    are exchanged once per step, on the bare models, and BatchNorm's statistics with them; those of weights that are
    spread over processes (`sharding`) come averaged from the backward passes.
    """

    def __init__(
        self,
        model: ImageModel,
        recipe: MetaPseudoLabelsConfig,
        optim: OptimConfig,
        *,
        augment: Augment,
        device: torch.device,
        precision: Precision,
        teacher: ImageModel | None = None,
        place: Place = move,
    ) -> None:
        """Put a teacher beside the student.

        Args:
            model: The student.
            recipe: How both learn.
            optim: Optimizer and schedule of both.
            augment: From stored pixels to strong views; weak ones have its crop and flip only.
            device: Where to compute.
            precision: Of the matrix products.
            teacher: A model of the same classes, read by the same preprocessing; by default one like the student, with
                initial weights of its own.
            place: Puts each of them onto the device.

        Raises:
            UserError: When pictures carry several labels, are mixed, or padded at a size of their own, or not all
                weights are to learn.
        """
        _require_fitting(model, optim, augment)
        if teacher is None:
            with next(model.parameters()).device:  # meta, where another process has the initial weights
                teacher = build(model.config)
            # Filters calculated from the pictures (`fit_input`) are no initial weights: both models have the same.
            teacher.load_state_dict(dict(model.named_buffers()), strict=False)
        self.models = nn.ModuleDict({"model": model, "teacher": teacher})
        self.optimizers = {}
        for name, each in (("model", model), ("teacher", teacher)):
            prepare(each, optim)
            place(each, each, device)
            self.optimizers[name] = build_optimizer(each, optim)
        self.average = AveragedWeights(model, optim.ema) if optim.ema else None
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.optim = optim
        self._recipe, self._device = recipe, device
        self._precision: Precision = precision
        plain = replace(augment.config, policy="none", color_jitter=0.0, erase=0.0, cutout=0)
        self._strong, self._weak = augment, Augment(plain, augment.preprocessing)
        self._classes = model.config.num_classes
        self._baseline = torch.zeros((), device=device)
        self._uda_weight = recipe.uda_weight
        self._finetuning_is_due = self._finetuning = False

    @property
    def teacher(self) -> ImageModel:
        """The model that labels pictures."""
        return self.models["teacher"]  # pyright: ignore[reportReturnType]

    def schedule(self, step: int, total: int) -> float:
        """Set both learning rates and UDA's factor for update `step` of `total`; return the student's rate.

        The student waits at rate 0, as in the released code: BatchNorm's statistics and its optimizer's momentum go on.
        """
        recipe = self._recipe
        main = total - min(recipe.finetune_steps, total // 5)
        self._finetuning_is_due = step >= main
        if self._finetuning_is_due:
            set_learning_rate([self.optimizers["model"]], recipe.finetune_lr)
            return recipe.finetune_lr
        wait, ramp = min(recipe.student_wait, total // 5), min(recipe.uda_steps, total // 5)
        self._uda_weight = recipe.uda_weight * min(1.0, step / ramp if ramp else 1.0)
        rate = learning_rate(self.optim, step - wait, main - wait) if step >= wait else 0.0
        set_learning_rate([self.optimizers["model"]], rate)
        set_learning_rate([self.optimizers["teacher"]], learning_rate(self.optim, step, main) * recipe.teacher_lr_ratio)
        return rate

    def step(self, micro_batches: Sequence[Batch]) -> dict[str, Tensor]:
        """Make one update of both models; in the last steps of the run, of the student alone.

        `loss` is the student's on pseudo labels, or on labels in the end; `feedback` is h; `sure` the share of pictures
        that UDA learns from; `agreement` that to which the student gives the teacher's class before it has learned it.
        """
        if self._finetuning_is_due:
            return self._finetune(micro_batches)
        views = [self._views(batch.to(self._device)) for batch in micro_batches]
        lessons = [self._ask_teacher(each, keep=len(views) == 1) for each in views]
        row = self._teach_student(views, lessons)
        self._exchange("model")
        before = self._labelled_loss(views)
        row["gradient_norm"] = self._descend("model")
        if self.average is not None:
            self.average.update(self.model)
        after = self._labelled_loss(views)
        row |= self._correct_teacher(views, lessons, before - after)
        self.scaler.update()
        return row | {"labelled_loss": after}

    def shipped_weights(self) -> AbstractContextManager[None]:
        return nullcontext() if self._finetuning else super().shipped_weights()

    @property
    def shipped_part(self) -> tuple[str, ...]:
        return ("models", "model", "") if self._finetuning else super().shipped_part

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"baseline": self._baseline, "finetuning": self._finetuning}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._baseline.copy_(state["baseline"])
        self._finetuning = state["finetuning"]

    def _views(self, batch: Batch) -> Views:
        """Return the views of a micro-batch.

        The strong view goes on from the weak one's crop and flip, and moves again at the end, as in the released code
        (data_utils.py): by a flip, and where crops are padded by a shift.
        """
        others = batch.unlabelled
        if others is None:
            raise UserError("Meta Pseudo Labels needs pictures without labels: name some with --input.unlabelled.")
        labelled, targets = self._weak(batch, classes=self._classes)
        weak, _ = self._weak(others, classes=self._classes)
        strong, _ = self._strong(others, classes=self._classes)
        config = self._strong.config
        flipped = (uniform(others.keys, ViewDraw.AGAIN) < config.flip).view(-1, 1, 1, 1)
        strong = torch.where(flipped, strong.flip(-1), strong)
        if config.crop == "padded":
            again = sample_keys(ViewDraw.AGAIN, 0, others.keys)  # other numbers than the first shift's
            strong = shift(strong, again, config.pad, torch.zeros_like(strong[0, :, :1, :1]))  # 0 is the mean colour
        return Views(labelled, targets, weak, strong, others.keys)

    def _ask_teacher(self, views: Views, *, keep: bool) -> Lesson:
        """Return the teacher's answers to a micro-batch, with their graph.

        Args:
            views: The pictures.
            keep: Whether activations stay in memory, or are computed again when they are needed.
        """
        images = torch.cat([views.labelled, views.weak, views.strong])
        with autocast(self._precision, self._device):
            if keep:
                answer = self.teacher(images)
            else:
                contexts = partial(recompute_contexts, self.teacher)
                answer = checkpoint(self.teacher, images, use_reentrant=False, context_fn=contexts)
        logits, own = _taken_apart(answer)
        labelled, weak, strong = logits.float().split([len(views.labelled), len(views.weak), len(views.strong)])
        wanted = (weak.detach() / self._recipe.uda_temperature).softmax(dim=1)
        return Lesson(
            labelled=labelled,
            strong=strong,
            wanted=wanted,
            sure=wanted.amax(dim=1) >= self._recipe.uda_threshold,
            taught=self._pseudo_labels(strong.detach(), views.keys),
            own=own * len(views.labelled),
        )

    def _pseudo_labels(self, logits: Float[Tensor, "u classes"], keys: Int[Tensor, " u"]) -> Float[Tensor, "u classes"]:
        """Return what the student is to learn of each picture."""
        if self._recipe.feedback == "released":
            return logits.softmax(dim=1)
        labels = sample_labels(logits, keys) if self._recipe.labels == "sampled" else logits.argmax(dim=1)
        return F.one_hot(labels, self._classes).float()

    def _teach_student(self, views: Sequence[Views], lessons: Sequence[Lesson]) -> dict[str, Tensor]:
        """Compute the student's gradient; return its mean loss and how often it agrees with the teacher."""
        self.optimizers["model"].zero_grad(set_to_none=True)
        pictures = sum(len(lesson.taught) for lesson in lessons)
        smoothing = self._recipe.label_smoothing if self._recipe.feedback == "released" else 0.0
        loss, agreed = torch.zeros(2, device=self._device)
        for i, (each, lesson) in enumerate(zip(views, lessons, strict=True)):
            last = i == len(views) - 1
            with accumulating(self.model, last=last), autocast(self._precision, self._device):
                answer = self.model(each.strong)
            logits, own = _taken_apart(answer)
            part = classification_loss(logits, lesson.taught, label_smoothing=smoothing).sum() + len(logits) * own
            self.scaler.scale(part / pictures).backward()
            loss += part.detach() / pictures
            agreed += (logits.argmax(dim=1) == lesson.taught.argmax(dim=1)).sum()
        return {"loss": loss, "agreement": agreed / pictures}

    @torch.no_grad()
    def _labelled_loss(self, views: Sequence[Views]) -> Tensor:
        """Return the student's mean loss on the labelled pictures of all processes, without smoothing.

        In evaluation mode, so without dropout, and by BatchNorm's running statistics, which the student's forward pass
        has moved before and its step does not: what lies between the loss before the step and the loss after it is the
        step alone. In fp32 whatever the precision, as their difference is less than half precision can tell apart.
        """
        self.model.eval()
        losses = [classification_loss(self.model(each.labelled), each.targets) for each in views]
        self.model.train()
        return mean_over_processes(torch.cat(losses).mean())

    def _correct_teacher(self, views: Sequence[Views], lessons: Sequence[Lesson], helped: Tensor) -> dict[str, Tensor]:
        """Make the teacher's step, `helped` being h, and return the parts of its loss."""
        recipe = self._recipe
        labelled = sum(len(lesson.labelled) for lesson in lessons)
        pictures = sum(len(lesson.taught) for lesson in lessons)
        factor = self._feedback_factor(helped, pictures)
        self.optimizers["teacher"].zero_grad(set_to_none=True)
        supervised, uda, sure = torch.zeros(3, device=self._device)
        for each, lesson in zip(views, lessons, strict=True):
            of_labels = classification_loss(lesson.labelled, each.targets, label_smoothing=recipe.label_smoothing).sum()
            of_views = (classification_loss(lesson.strong, lesson.wanted) * lesson.sure).sum()
            loss = (of_labels + lesson.own) / labelled + self._uda_weight * of_views / pictures
            if factor is not None:
                loss = loss + factor * classification_loss(lesson.strong, lesson.taught).sum()
            with accumulating(self.teacher, last=lesson is lessons[-1]):
                self.scaler.scale(loss).backward()
            supervised += of_labels.detach() / labelled
            uda += of_views.detach() / pictures
            sure += lesson.sure.sum()
        self._exchange("teacher")
        norm = self._descend("teacher")
        return {
            "teacher_supervised": supervised,
            "teacher_uda": uda,
            "teacher_gradient_norm": norm,
            "feedback": helped,
            "baseline": self._baseline.clone(),
            "sure": sure / pictures,
        }

    def _feedback_factor(self, helped: Tensor, pictures: int) -> Tensor | None:
        """Return what the summed CE(y, T(u strong)) of this process counts in the teacher's loss; move the baseline.

        The other terms are means over pictures, this one is a sum: the student's step depends on the labels of all B
        pictures at once, log p(y) of the whole draw is the sum over pictures, and so is the score that h multiplies
        (REINFORCE). That step is 1/B of each picture's gradient; h has this 1/B already, and a mean would apply it
        twice. For labels drawn from T, the expectation is then the gradient of the student's loss on labelled pictures
        after its step. The sum runs over the pictures of all processes, whose gradients will be averaged.

        The released code takes h with the other sign, and CE of T's own probabilities, held fixed, with T: its gradient
        by the logits is p - p, identically 0, whatever the factor. The term is here for its cost and its record.
        """
        recipe = self._recipe
        judged = -helped if recipe.feedback == "released" else helped
        beyond = judged - self._baseline
        self._baseline.lerp_(judged, 1 - BASELINE_DECAY)
        match recipe.feedback:
            case "meta":
                return beyond * world_size()
            case "released":
                return beyond / pictures
            case "none":
                return None

    def _finetune(self, micro_batches: Sequence[Batch]) -> dict[str, Tensor]:
        """Make one update of the student from labelled pictures alone; the first one starts from averaged weights."""
        if not self._finetuning:
            self._finetuning = True
            if self.average is not None:
                self.model.load_state_dict(self.average.average)
            self.optimizers["model"].state.clear()  # momentum of the other loss
            for group in self.optimizers["model"].param_groups:
                if "step" in group:  # Adafactor counts here
                    group["step"] = 0
        self.optimizers["model"].zero_grad(set_to_none=True)
        pictures = sum(len(batch) for batch in micro_batches)
        loss = torch.zeros((), device=self._device)
        for i, batch in enumerate(micro_batches):
            images, targets = self._weak(batch.to(self._device), classes=self._classes)
            last = i == len(micro_batches) - 1
            with accumulating(self.model, last=last), autocast(self._precision, self._device):
                answer = self.model(images)
            logits, own = _taken_apart(answer)
            part = (classification_loss(logits, targets).sum() + len(logits) * own) / pictures
            self.scaler.scale(part).backward()
            loss += part.detach()
        self._exchange("model")
        norm = self._descend("model")
        self.scaler.update()
        return {"loss": loss, "gradient_norm": norm}

    def _exchange(self, name: str) -> None:
        """Average a model's gradient over processes, in place and in one exchange, and BatchNorm's statistics."""
        model = self.models[name]
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        if is_sharded(model):
            gradients.clear()
        statistics = [s for where, s in model.named_buffers() if where.endswith(("running_mean", "running_var"))]
        average_over_processes([*gradients, *statistics])

    def _descend(self, name: str) -> Tensor:
        """Step by a model's gradient, clipped, and return the gradient's norm."""
        self.scaler.unscale_(self.optimizers[name])
        norm = self.clip(self.models[name].parameters())
        self.scaler.step(self.optimizers[name])
        return norm


def sample_labels(logits: Float[Tensor, "u classes"], keys: Int[Tensor, " u"]) -> Int[Tensor, " u"]:
    """Return a class per picture, drawn from its probabilities by its key: the same in any batch and process."""
    bounds = logits.softmax(dim=1).cumsum(dim=1)[:, :-1]
    return (uniform(keys, ViewDraw.LABEL)[:, None] >= bounds).sum(dim=1)


def _taken_apart(answer: Tensor | WithLoss) -> tuple[Tensor, Tensor | float]:
    """Return logits and the model's own loss, 0 where it has none."""
    return answer if isinstance(answer, WithLoss) else (answer, 0.0)


def _require_fitting(model: ImageModel, optim: OptimConfig, augment: Augment) -> None:
    if model.multi_label:
        raise UserError("Meta Pseudo Labels needs one label per picture; this data may give several.")
    if augment.config.mixup or augment.config.cutmix:
        raise UserError(
            "Meta Pseudo Labels labels whole pictures, not mixed ones: set --augment.mixup 0 --augment.cutmix 0."
        )
    if augment.config.size is not None and augment.config.crop == "padded":
        raise UserError(
            "Meta Pseudo Labels shifts padded pictures once more at the model's size: leave out --augment.size, or "
            "take another --augment.crop."
        )
    if optim.train == "head" or optim.head_first:
        raise UserError("Meta Pseudo Labels trains whole models: leave out --optim.train head and --optim.head-first.")
