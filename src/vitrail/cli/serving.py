"""The verb that answers over HTTP: `serve`."""

import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import Positional

from vitrail.cli.console import Console, print_json
from vitrail.engines import EngineName
from vitrail.errors import UserError

if TYPE_CHECKING:
    from vitrail.serving.jobs import ModelFacts


def serve(
    models: Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="MODEL ...")]],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    engine: EngineName = "auto",
    tokens: Path | None = None,
    allow_host: tuple[str, ...] = (),
    max_megabytes: float = 20.0,
    max_megapixels: float = 25.0,
    max_pictures: int = 32,
    queue: int = 128,
    timeout: float = 30.0,
    json: bool = False,
) -> int:
    """Answer over HTTP: an API, a web page to drop pictures on, health and metrics.

    Ends by SIGTERM or Ctrl-C, after what has been asked is answered. The API is described at /openapi.json.

    Args:
        models: Model folders or weight files; NAME=MODEL gives one another name.
        host: Address to listen at; 0.0.0.0 lets other machines ask. There is no TLS: put a proxy before it.
        port: Port; 0 for any that is free.
        engine: What computes the answers; auto measures at the start and takes the fastest that is installed.
        tokens: File with a token on each line; requests must bring one of them.
        allow_host: Names under which browsers may ask, beside localhost; for a proxy on this machine.
        max_megabytes: Of a request.
        max_megapixels: Of a picture.
        max_pictures: In a request.
        queue: Pictures that may wait; further requests are answered 503.
        timeout: Seconds until a request is answered 503.
        json: Print one JSON document on stdout once requests are taken: address and models.
    """
    from vitrail.serving import require_packages

    require_packages()
    from vitrail.serving.limits import Limits
    from vitrail.serving.server import model_names
    from vitrail.serving.server import serve as run

    if not models:
        raise UserError("name a model to serve: a model folder or a weight file.")
    for name, value in (("megabytes", max_megabytes), ("megapixels", max_megapixels), ("pictures", max_pictures)):
        if value <= 0:
            raise UserError(f"--max-{name} must be above 0, not {value}.")
    if queue < max_pictures or timeout <= 0:
        raise UserError("--queue must be at least --max-pictures, and --timeout above 0.")
    limits = Limits(
        body_bytes=round(max_megabytes * 1e6),
        pixels=round(max_megapixels * 1e6),
        pictures=max_pictures,
        queue=queue,
        seconds=timeout,
    )

    def tell(url: str, served: Mapping[str, "ModelFacts"]) -> None:
        if json:
            print_json({"url": url, "models": [facts.to_json() for facts in served.values()]})
            sys.stdout.flush()
            return
        named = ", ".join(f"{name} ({facts.kind}, {len(facts.labels):,} classes)" for name, facts in served.items())
        Console(soft_wrap=True).print(f"{url} answers for {named}. Ctrl-C stops it.", markup=False, highlight=False)

    if host not in ("127.0.0.1", "localhost", "::1") and tokens is None:
        logging.getLogger("vitrail").warning("other machines can ask at %s without a token; see --tokens.", host)
    run(
        model_names(models),
        host=host,
        port=port,
        engine=engine,
        limits=limits,
        tokens=() if tokens is None else read_tokens(tokens),
        allow_hosts=allow_host,
        on_ready=tell,
    )
    return 0


def read_tokens(path: Path) -> list[str]:
    """Return the tokens in a file, one on each line.

    Raises:
        UserError: When it has none, or one that cannot stand in a header.
    """
    found = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not found or not all(token.isascii() and token.isprintable() and " " not in token for token in found):
        raise UserError(f"{path} must hold a token on each line, of ASCII characters without spaces.")
    return found
