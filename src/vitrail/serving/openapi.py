"""The OpenAPI document of the routes."""

from collections.abc import Iterable, Mapping
from typing import Any

import vitrail
from vitrail.serving.limits import Limits
from vitrail.serving.reading import FORM, RAW

PROBLEMS = {
    400: "The request cannot be understood.",
    401: "A token is needed.",
    404: "There is no such model.",
    408: "The body did not arrive in time.",
    413: "The body is larger than allowed.",
    415: "Pictures do not come in a body of this type.",
    422: "No picture of the request can be read: broken, too many pixels, or of another format; "
    "or the model cannot be explained.",
    500: "A bug of the server's.",
    503: "Overloaded, stopping, or the process that computes was lost; ask again after `Retry-After` seconds.",
}
PICTURE = {"type": "string", "format": "binary"}
LABELS = {
    "type": "array",
    "description": "Likeliest classes, best first.",
    "items": {
        "type": "object",
        "required": ["label", "probability"],
        "properties": {
            "label": {"type": "string"},
            "probability": {"type": "number", "minimum": 0, "maximum": 1},
        },
    },
}
PREDICTION = {
    "name": {"type": "string", "description": "Of the file; empty where none was told."},
    "labels": LABELS,
    "problem": {"type": ["string", "null"], "description": "Why the picture could not be read."},
}
FACTS: dict[str, Any] = {
    "name": {"type": "string"},
    "kind": {"type": "string", "description": "Family of the model."},
    "classes": {"type": "integer", "minimum": 1},
    "multi_label": {"type": "boolean", "description": "Whether probabilities are independent, not summing to 1."},
    "image_size": {"type": "array", "items": {"type": "integer"}, "description": "Height and width that it sees."},
    "channels": {"type": "integer"},
    "parameters": {"type": "integer"},
}
STATUS = {"status": {"type": "string"}}


EXPLANATION = {
    "explained": {"type": "string", "description": "The class that the map is for."},
    "title": {"type": "string", "description": "The method."},
    "caption": {"type": "string"},
    "seen": {"type": "string", "description": "PNG data URI of what the model saw."},
    "map": {"type": "string", "description": "PNG data URI: what the model saw, under the map."},
}


def document(models: Iterable[str], limits: Limits, *, tokens: bool) -> dict[str, Any]:
    """Return the document.

    Args:
        models: Names of the models.
        limits: That are granted; the document tells them.
        tokens: Whether a token must come with requests.
    """
    text = {"200": {"description": "Figures.", "content": {"text/plain": {}}}}
    guarded = _of_models(models, limits) | {
        "/metrics": {"get": {"summary": "Figures for Prometheus.", "responses": text}}
    }
    if tokens:
        for path in guarded.values():
            for operation in (path[method] for method in ("get", "post") if method in path):
                operation["security"] = [{"token": []}]
                operation["responses"]["401"] = _refusal(401)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Vitrail",
            "version": vitrail.__version__,
            "description": "Classifies pictures. JPEG, PNG, WebP, GIF, BMP and TIFF are read.",
        },
        "paths": {
            **guarded,
            "/health": {"get": _operation("Whether the server can do its work, now or soon.", STATUS, 503)},
            "/ready": {"get": _operation("Whether it takes requests now.", STATUS, 503)},
        },
        "components": {
            "schemas": {"Problem": _object({"status": {"type": "integer"}, "detail": {"type": "string"}})},
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}} if tokens else {},
        },
    }


def _of_models(models: Iterable[str], limits: Limits) -> dict[str, Any]:
    """Return the paths about models."""
    model = {"parameters": [_parameter("model", "path", {"type": "string", "enum": [*models]}, "Name of the model.")]}
    listed = {"models": {"type": "array", "items": _object(FACTS)}}
    labelled = {**FACTS, "labels": {"type": "array", "items": {"type": "string"}}}
    predicted = {"model": {"type": "string"}, "predictions": {"type": "array", "items": _object(PREDICTION)}}
    explained = {"model": {"type": "string"}, **PREDICTION, "explanation": _object(EXPLANATION)}
    what = (
        f"as the body itself or as files of a form; at most {limits.body_bytes:,} bytes in all and "
        f"{limits.pixels:,} pixels each"
    )
    classify = _asking(f"Classify 1 to {limits.pictures} pictures, {what}.", predicted, limits.pictures)
    look = _asking(f"Classify one picture and show where the model looked, {what}.", explained, 1)
    return {
        "/v1/models": {"get": _operation("List the models.", listed)},
        "/v1/models/{model}": {**model, "get": _operation("Describe a model, with its labels.", labelled, 404)},
        "/v1/models/{model}/predict": {**model, "post": classify},
        "/v1/models/{model}/explain": {**model, "post": look},
    }


def _asking(summary: str, answer: Mapping[str, Any], most: int) -> dict[str, Any]:
    """Return an operation that takes 1 to `most` pictures."""
    form = {
        "type": "object",
        "required": ["image"],
        "properties": {"image": {"type": "array", "items": PICTURE, "minItems": 1, "maxItems": most}},
        "additionalProperties": False,
    }
    content = {kind: {"schema": PICTURE} for kind in ("image/jpeg", "image/png", "image/webp", RAW[0])}
    return {
        **_operation(summary, answer, 400, 404, 408, 413, 415, 422, 500, 503),
        "parameters": [
            _parameter(
                "top",
                "query",
                {"type": "integer", "minimum": 1, "maximum": 999_999_999, "default": 5},
                "Classes to tell of each picture.",
            )
        ],
        "requestBody": {"required": True, "content": {**content, FORM: {"schema": form}}},
    }


def _operation(summary: str, answer: Mapping[str, Any], *problems: int) -> dict[str, Any]:
    found = {"description": "The answer.", "content": {"application/json": {"schema": _object(answer)}}}
    return {"summary": summary, "responses": {"200": found, **{str(status): _refusal(status) for status in problems}}}


def _refusal(status: int) -> dict[str, Any]:
    content = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    headers = {"Retry-After": {"schema": {"type": "integer"}}} if status == 503 else {}
    return {"description": PROBLEMS[status], "content": content, "headers": headers}


def _parameter(name: str, place: str, schema: Mapping[str, Any], description: str) -> dict[str, Any]:
    return {"name": name, "in": place, "required": place == "path", "schema": schema, "description": description}


def _object(properties: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema of an object that has all of these, and may have more in later versions."""
    return {"type": "object", "required": list(properties), "properties": properties}
