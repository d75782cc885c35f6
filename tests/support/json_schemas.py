"""Random JSON schemas that can be satisfied in few tokens."""

from typing import Any

from hypothesis import strategies as st

Schema = dict[str, Any]

_NAMES = st.sampled_from(["a", "b", "id", "name", "ünïcode", "with space", 'quote"d', "emoji 🎉"])
_JSON_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-1000, 1000),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    st.lists(st.integers(0, 9), max_size=3),
    st.dictionaries(st.sampled_from("xyz"), st.integers(0, 9), max_size=2),
)
_PATTERNS = (r"^[a-z]{1,5}$", r"^\d{3}-\d{4}$", r"^(yes|no)$", r"^[^\"\\]{0,4}$", r"^a*b+$", r"^\w{2,4}\s?$")
_FORMATS = ("date", "time", "date-time", "uuid", "ipv4")


@st.composite
def _integers(draw: st.DrawFn) -> Schema:
    low, size = draw(st.integers(-(10**6), 10**6)), draw(st.integers(0, 10**6))
    lower = draw(st.sampled_from([{"minimum": low}, {"exclusiveMinimum": low - 1}]))
    upper = draw(st.sampled_from([{"maximum": low + size}, {"exclusiveMaximum": low + size + 1}]))
    return {"type": "integer", **lower, **upper}


@st.composite
def _numbers(draw: st.DrawFn) -> Schema:
    low, size = draw(st.integers(-1000, 1000)), draw(st.integers(1, 1000))
    scale = draw(st.sampled_from([1, 4, 10]))
    return {"type": "number", "minimum": low / scale, "maximum": (low + size) / scale}


@st.composite
def _strings(draw: st.DrawFn) -> Schema:
    match draw(st.sampled_from(["length", "pattern", "format"])):
        case "pattern":
            return {"type": "string", "pattern": draw(st.sampled_from(_PATTERNS))}
        case "format":
            return {"type": "string", "format": draw(st.sampled_from(_FORMATS))}
    shortest = draw(st.integers(0, 6))
    return {"type": "string", "minLength": shortest, "maxLength": shortest + draw(st.integers(0, 6))}


def _leaves(num_definitions: int) -> st.SearchStrategy[Schema]:
    leaves: list[st.SearchStrategy[Schema]] = [
        st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": ["boolean", "null"]}]),
        st.builds(lambda values: {"enum": values}, st.lists(_JSON_VALUES, min_size=1, max_size=5)),
        st.builds(lambda value: {"const": value}, _JSON_VALUES),
        _integers(),
        _numbers(),
        _strings(),
    ]
    if num_definitions:
        references = [{"$ref": f"#/$defs/d{index}"} for index in range(num_definitions)]
        leaves.append(st.sampled_from(references))
    return st.one_of(leaves)


@st.composite
def _objects(draw: st.DrawFn, inner: st.SearchStrategy[Schema]) -> Schema:
    properties = draw(st.dictionaries(_NAMES, inner, max_size=4))
    required = [name for name in properties if draw(st.booleans())]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


@st.composite
def _arrays(draw: st.DrawFn, inner: st.SearchStrategy[Schema]) -> Schema:
    if draw(st.booleans()):
        items = draw(st.lists(inner, min_size=1, max_size=3))
        return {
            "type": "array",
            "prefixItems": items,
            "items": False,
            "minItems": draw(st.integers(0, len(items))),
        }
    fewest = draw(st.integers(0, 2))
    most = fewest + draw(st.integers(0, 2))
    return {"type": "array", "items": draw(inner), "minItems": fewest, "maxItems": most}


@st.composite
def _disjoint(draw: st.DrawFn) -> Schema:
    """Alternatives of which exactly one is satisfied, whatever the value."""
    kinds = draw(st.lists(st.sampled_from([_integers(), _strings()]), min_size=1, max_size=2, unique_by=id))
    return {"oneOf": [*map(draw, kinds), {"type": "null"}]}


def _larger(inner: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    any_of = st.builds(lambda schemas: {"anyOf": schemas}, st.lists(inner, min_size=1, max_size=3))
    return st.one_of(_objects(inner), _arrays(inner), any_of, _disjoint())


def _schemas(num_definitions: int) -> st.SearchStrategy[Schema]:
    return st.recursive(_leaves(num_definitions), _larger, max_leaves=6)


@st.composite
def json_schemas(draw: st.DrawFn) -> Schema:
    """Nested objects and arrays, enumerations, bounded numbers and strings, patterns and formats, alternatives, and
    references, of which some go round in circles."""
    definitions: Schema = {}
    for index in range(draw(st.integers(0, 2))):
        definitions[f"d{index}"] = draw(_schemas(index))
    if draw(st.booleans()):
        link = {"type": "array", "items": {"$ref": "#/$defs/circle"}, "maxItems": 1}
        definitions["circle"] = {
            "type": "object",
            "properties": {"next": link},
            "required": draw(st.sampled_from([[], ["next"]])),
            "additionalProperties": False,
        }
        schema = {"type": "array", "prefixItems": [draw(_schemas(0)), {"$ref": "#/$defs/circle"}], "items": False}
    else:
        schema = draw(_schemas(len([name for name in definitions if name != "circle"])))
    return {**schema, "$defs": definitions}
