"""What the two processes tell each other: plain values, so that the one that faces the network needs no torch."""

from abc import ABC, abstractmethod
from typing import Any, Literal, NamedTuple

from vitrail.engines import EngineName

Kind = Literal["predict", "explain"]


class Setup(NamedTuple):
    """What a worker begins with."""

    sources: dict[str, str]
    """Name of each model -> what `load_model` takes."""
    engine: EngineName
    pixels: int
    """Largest picture that is decoded."""


class ModelFacts(NamedTuple):
    """What there is to know of a model without having it."""

    name: str
    kind: str
    """Name of its class, as ViT."""
    labels: tuple[str, ...]
    """Its classes; their numbers where they have no names."""
    multi_label: bool
    image_size: tuple[int, int]
    """Height and width of what it sees."""
    channels: int
    parameters: int
    batch: int
    """Pictures at a time that it is fast with."""

    def to_json(self) -> dict[str, Any]:
        """Return what clients are told of it, without the labels, which may be thousands."""
        return {
            "name": self.name,
            "kind": self.kind,
            "classes": len(self.labels),
            "multi_label": self.multi_label,
            "image_size": list(self.image_size),
            "channels": self.channels,
            "parameters": self.parameters,
        }


class Ready(NamedTuple):
    """A worker that has loaded its models."""

    models: dict[str, ModelFacts]
    ahead: int
    """Jobs that it wants to have at a time: where the model has a device of its own, the next are decoded meanwhile."""


class Failed(NamedTuple):
    """A worker that could not begin, or a job that could not be done."""

    reason: str


class Unfit(NamedTuple):
    """A job that cannot be done with this model, and why."""

    reason: str


class Job(NamedTuple):
    """Pictures for one model."""

    kind: Kind
    model: str
    pictures: list[bytes]
    top: int
    """Classes to tell of each."""


class Answer(NamedTuple):
    """What the model says of one picture."""

    labels: tuple[tuple[str, float], ...]
    """Likeliest classes with their probability, best first."""
    explanation: dict[str, str] | None = None
    """Of an `explain` job: `explained`, `title`, `caption`, and the PNG data URIs `seen` and `map`."""


class Unreadable(NamedTuple):
    """One picture without an answer."""

    reason: str


Answers = list[Answer | Unreadable]


class Compute(ABC):
    """What does jobs: in a server, `Supervisor`."""

    models: dict[str, ModelFacts]
    ahead: int
    """Jobs that it wants to have at a time."""

    @property
    @abstractmethod
    def ready(self) -> bool:
        """Whether it takes jobs now."""

    @property
    @abstractmethod
    def healthy(self) -> bool:
        """Whether it takes jobs, or may again."""

    @abstractmethod
    async def ask(self, job: Job) -> Answers:
        """Return one answer per picture, in order; waits while it is not ready.

        Raises:
            WorkerLost: When whoever had the job is gone.
            JobFailed: When it could not be done.
            JobUnfit: When it cannot be done with this model.
        """


class WorkerLost(Exception):
    """The worker went away while it had a job."""


class JobFailed(Exception):
    """The worker could not do a job, and goes on."""


class JobUnfit(Exception):
    """The job cannot be done with this model; the words say why."""
