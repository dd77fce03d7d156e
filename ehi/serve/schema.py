"""Requests and answers. OpenAPI is written from the types that validate them."""

import re
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from ehi.index import Index
from ehi.index.contents import StringIds
from ehi.serve.limits import Limits

# Products of such numbers stay finite in float32.
_LARGEST = 1e12
_ASKED = ("text", "texts", "vector", "vectors")
_VECTOR = re.compile(r"vector|vectors\[\d+\]")
_PLAIN = (
    ("`", ""), (r"float that's a multiple of 1\.0", "whole number"),
    (r"\bfloat\b", "number"), (r"(?<=\d)\.0\b", ""), (r"int \| number", "number"),
)  # fmt: skip
_AT = re.compile(r"(.*?)(?: - at `\$\.?(.*)`)?", re.DOTALL)


class Hit(Struct):
    """A document that was found."""

    rank: int
    id: str | int
    score: float
    document: Any = UNSET
    metadata: dict[str, Any] | UnsetType = UNSET
    leaf: int | UnsetType = UNSET
    path: list[int] | UnsetType = UNSET


class Visited(Struct):
    """A leaf that a query visited, and the child numbers from the root to it."""

    leaf: int
    path: list[int]


class Result(Struct):
    """What was found for one text or vector, best first."""

    hits: list[Hit]
    visited: int  # copies of documents that were scored
    leaves: list[Visited] | UnsetType = UNSET


class Answer(Struct):
    """One result for each text or vector, and the state of the index they came from."""

    results: list[Result]
    documents: int
    generation: int


class Member(Struct):
    """A document in a leaf."""

    id: str | int
    document: Any = UNSET


class Leaf(Struct):
    """The documents in a leaf: `size` in all, some of them here."""

    leaf: int
    path: list[int]
    size: int
    members: list[Member]


class Health(Struct):
    """What is served. `stale` means that the folder can't be read again right now."""

    status: str  # ok or stale
    documents: int
    leaves: int
    width: int
    text: bool
    generation: int
    fields: dict[str, str] | UnsetType = UNSET  # of metadata, and their kinds


class Error(Struct):
    """Why a request was refused, in one sentence."""

    error: str


def request_type(index: Index, limits: Limits) -> type[Struct]:
    """The type of a search of this index.

    Args:
        index: gives the width, the number of leaves, the kind of ids, and whether there
            are metadata for `where` and vectors for `rerank`.
        limits: of one request.
    """
    one_text = Annotated[str, Meta(min_length=1, max_length=limits.characters)]
    number = Annotated[float, Meta(ge=-_LARGEST, le=_LARGEST)]
    width = Meta(min_length=index.width, max_length=index.width)
    one_vector = Annotated[list[number], width]
    several = Meta(min_length=1, max_length=limits.queries)
    strings = isinstance(index.segments[0].ids, StringIds)
    number_id = Annotated[int, Meta(ge=0, le=2**63 - 1)] | _whole(0, 2.0**63 - 1024)
    document_id = str if strings else number_id
    ids = Annotated[list[document_id], Meta(max_length=limits.ids)]
    stored = index.segments[0].rerank_vectors is not None
    most_rerank = limits.rerank if stored else 0

    class SearchRequest(Struct, forbid_unknown_fields=True):
        """One of text, texts, vector and vectors, and how to search for it."""

        text: one_text | UnsetType = UNSET
        texts: Annotated[list[one_text], several] | UnsetType = UNSET
        vector: one_vector | UnsetType = UNSET
        vectors: Annotated[list[one_vector], several] | UnsetType = UNSET
        k: _whole(1, limits.k) = 10
        beam: _whole(1, index.num_leaves) | UnsetType = UNSET
        min_prob: Annotated[float, Meta(ge=0, le=1)] | UnsetType = UNSET
        rerank: _whole(0, most_rerank) | UnsetType = UNSET
        allow: ids | UnsetType = UNSET
        deny: ids | UnsetType = UNSET
        if index.fields:
            where: one_text | UnsetType = UNSET
        documents: bool = True
        paths: bool = False

        def __post_init__(self):
            given = [name for name in _ASKED if getattr(self, name) is not UNSET]
            if len(given) != 1:
                got = f"got {' and '.join(given)}" if given else "got none"
                raise ValueError(f"give one of {', '.join(_ASKED)}; {got}")

        def asked(self) -> tuple[bool, list]:
            """Whether texts were given; and the texts or vectors."""
            single = self.text if self.vector is UNSET else self.vector
            if single is not UNSET:
                return self.vector is UNSET, [single]
            words = self.vectors is UNSET
            return words, self.texts if words else self.vectors

    return SearchRequest


def _whole(least: float, most: float):
    """A whole number; JSON may write 7 as 7.0, which msgspec's `int` refuses."""
    return Annotated[float, Meta(ge=least, le=most, multiple_of=1)]


def sentence(error: msgspec.ValidationError, request: type[Struct], width: int) -> str:
    """What does not fit, as one sentence that names the field."""
    words, where = _AT.fullmatch(str(error)).groups()
    for technical, plain in _PLAIN:
        words = re.sub(technical, plain, words)
    if words.startswith("Object contains unknown field"):
        unknown = words.removeprefix("Object contains unknown field").strip()
        known = ", ".join(request.__struct_fields__)
        return f"{unknown} is no field of a search: there are {known}"
    if not where:
        return words
    if _VECTOR.fullmatch(where) and "array of length" in words:
        return f"{where} needs {width} numbers, the width of this index"
    return f"{where}: {words[:1].lower()}{words[1:]}"


_REFERENCE = "#/components/schemas/{name}"


def openapi(
    request: type[Struct], num_leaves: int, most_members: int, token: bool
) -> dict:
    """The OpenAPI 3.1 description of the service, as JSON values.

    Args:
        request: of `request_type`.
        num_leaves: leaves of the index.
        most_members: documents of a leaf that one request may ask for.
        token: whether a token is needed.
    """
    types = (request, Answer, Leaf, Health, Error)
    _, parts = msgspec.json.schema_components(types, ref_template=_REFERENCE)
    for field in parts["SearchRequest"]["properties"].values():
        if field.get("multipleOf") == 1:
            field["type"] = "integer"  # means the same, and is what readers look for
            del field["multipleOf"]
    parts["SearchRequest"]["oneOf"] = [{"required": [name]} for name in _ASKED]

    described = {
        "openapi": "3.1.0",
        "info": {"title": "ehi.serve", "version": "1"},
        "paths": _paths(num_leaves, most_members, token),
        "components": {"schemas": parts},
    }
    if token:
        bearer = {"type": "http", "scheme": "bearer"}
        described["components"]["securitySchemes"] = {"token": bearer}
        described["security"] = [{"token": []}]
    return described


_WORDS = {
    400: "The body is not JSON",
    401: "The token is missing or wrong",
    404: "There is no such leaf",
    408: "The body did not arrive in time",
    409: "The index has no text encoder",
    413: "The body is too large",
    415: "The body does not say that it is JSON",
    421: "Without a token, only names of this machine are answered",
    422: "A field is missing, unknown or does not fit",
    503: "Too many requests are waiting",
}


def _paths(num_leaves, most_members, token):
    """What each address takes and answers."""

    def answer(name, words):
        schema = {"$ref": _REFERENCE.format(name=name)}
        return {
            "description": words,
            "content": {"application/json": {"schema": schema}},
        }

    def errors(*codes):
        return {str(code): answer("Error", _WORDS[code]) for code in codes}

    def text(kind, words):
        schema = {"schema": {"type": "string"}}
        return {"200": {"description": words, "content": {kind: schema}}}

    always = (421, 503, *((401,) if token else ()))
    leaf = {"type": "integer", "minimum": 0, "maximum": num_leaves - 1}
    limit = {"type": "integer", "minimum": 1, "maximum": most_members, "default": 20}
    body = answer("SearchRequest", "")["content"]
    return {
        "/search": {
            "post": {
                "summary": "The best documents for texts or vectors",
                "requestBody": {"required": True, "content": body},
                "responses": {"200": answer("Answer", "What was found")}
                | errors(400, 408, 409, 413, 415, 422, *always),
            }
        },
        "/leaves/{leaf}": {
            "get": {
                "summary": "The documents in a leaf",
                "parameters": [
                    {"name": "leaf", "in": "path", "required": True, "schema": leaf},
                    {"name": "limit", "in": "query", "schema": limit},
                ],
                "responses": {"200": answer("Leaf", "Its documents")}
                | errors(404, 422, *always),
            }
        },
        "/health": {
            "get": {
                "summary": "What is served",
                "security": [],
                "responses": {"200": answer("Health", "It answers")} | errors(421),
            }
        },
        "/metrics": {
            "get": {
                "summary": "Counters for Prometheus",
                "responses": text("text/plain", "In its format") | errors(*always),
            }
        },
    }
