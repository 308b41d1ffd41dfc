"""What a JSON schema may ask of the grammar engine. Some schemas of a few lines would keep it busy for hours, or overflow its
stack, and its own limits do not see them: they are refused before it does.

Dear is what meets at one place, that is in one value of the answer: regular expressions, whose intersection has to be searched;
numbers that must be multiples of several, with a state for each remainder of their product; optional properties, each of which may
come next. What meets is what `allOf`, `$ref` and their siblings ask for together, also by `properties` and `items` of the same name;
of `anyOf` and `oneOf` one alternative counts, the largest.
"""

import json
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple
from urllib.parse import unquote

from finback.config import InputError

MAX_TEXT = 256 * 1024
"""Bytes of all schemas of one request: so much compiles in two seconds at worst."""
MAX_MEETING_PATTERNS = 8
"""The time doubles with each: 16 of three letters take a second, 20 most of a minute."""
MAX_PATTERN_PRODUCT = 400_000
"""Of the lengths of the patterns that meet: their intersection branches for each choice of a branch of each, here in half a second."""
MAX_PATTERN_LENGTH = 256
"""What a longer pattern counts as: it branches by bytes."""
FORMAT_LENGTH = 64
"""What a `format` counts as."""
MAX_MULTIPLE = 20_000
"""Of all `multipleOf` together: a lexer with so many states is made in a fifth of a second."""
MAX_OPTIONAL = 500
MAX_ALTERNATIVES = 2000
"""Of these and of `MAX_OPTIONAL` llguidance takes no more either, and says so after seconds."""
MAX_REQUIRED = 5000
MAX_NAME_PATTERNS = 64
"""`patternProperties` of all objects: each is compared with each other one."""
MAX_DEPTH = 1000
"""Levels of JSON, those of all that a schema refers to added up; above 2000 a stack of 8 MiB overflows, which ends the process."""
_MAX_WORK = 100_000
"""Steps of the search; a schema of `MAX_TEXT` with thousands of properties takes half of them."""
_KEYWORDS = (
    "pattern", "format", "multipleOf", "properties", "patternProperties", "additionalProperties", "required", "prefixItems", "items",
    "additionalItems", "enum",
)  # fmt: skip
"""Those that are looked at below, besides `$ref`, `allOf`, `anyOf` and `oneOf`."""

# What meets at a place: schemas by their number, and for each anyOf or oneOf one of several such sets.
Place = frozenset["int | Choice"]
Name = str | int | None  # of a property, the index of an item, or None for any other of them


class Choice(NamedTuple):
    alternatives: frozenset[Place]


def check_text(what: str, text: str) -> None:
    """InputError for schemas that are too long."""
    size = len(text.encode())
    if size > MAX_TEXT:
        raise InputError(f"{what} has {size} bytes, more than {MAX_TEXT}; make it shorter")


def check_schema(what: str, source: str) -> None:
    """InputError for a schema (JSON text) that asks for too much."""
    root = json.loads(source)
    _check_depth(what, root)
    try:
        _Walk(what, root).check()
    except RecursionError:
        raise InputError(f"{what} is nested too deeply; make it flatter") from None


class _Walk:
    """Through all places of a schema, each once; recursive schemas come back to places that were seen."""

    def __init__(self, what: str, root: Any) -> None:
        self._what, self._root = what, root
        self._schemas: list[dict[str, Any]] = []
        self._numbers: dict[int, int] = {}  # id of a schema -> its place in the list
        self._places: dict[int, Place] = {}  # id of a schema -> what meets there
        self._cuts = 0  # references that were not followed, because they had led to where they stand
        self._work = 0

    def check(self) -> None:
        name_patterns = multiples = 0
        todo, seen = [self._place(self._root)], set[Place]()
        while todo:
            place = todo.pop()
            if place in seen:
                continue
            seen.add(place)
            if (alternatives := _only_choice(place)) is not None:
                todo += alternatives
                continue
            self._check_patterns(place)
            self._check_count(self._most(place, _optional, sum), MAX_OPTIONAL, "optional properties in one object")
            self._check_count(self._most(place, _required, sum), MAX_REQUIRED, "required properties in one object")
            self._check_count(
                self._most(place, _alternatives, sum), MAX_ALTERNATIVES, "alternatives (anyOf, oneOf, enum) for one value"
            )
            name_patterns += self._most(place, _name_patterns, sum)
            self._check_count(name_patterns, MAX_NAME_PATTERNS, "patternProperties")
            multiple = self._most(place, _multiple, _product)
            multiples += multiple if multiple > 1 else 0
            if multiples > MAX_MULTIPLE:
                raise InputError(
                    f"{self._what} asks for multiples of too large numbers: all multipleOf together may be {MAX_MULTIPLE}, and those of"
                    " one number count multiplied; make them smaller"
                )
            todo += [self._below(place, name) for name in self._names(place)]

    def _check_patterns(self, place: Place) -> None:
        patterns = self._most(place, lambda schema: len(_patterns(schema)), sum)
        self._check_count(patterns, MAX_MEETING_PATTERNS, "regular expressions (pattern, format) for one string")
        if self._most(place, lambda schema: _product(_patterns(schema)), _product) > MAX_PATTERN_PRODUCT:
            raise InputError(
                f"{self._what} asks for {patterns} regular expressions (pattern, format) for one string that are too long together; "
                "make one of them, or shorten them"
            )

    def _check_count(self, count: int, limit: int, things: str) -> None:
        if count > limit:
            raise InputError(f"{self._what} asks for {count} {things}, and {limit} are possible; make it simpler")

    def _place(self, schema: Any, above: frozenset[str] = frozenset()) -> Place:
        """What meets where `schema` stands; `above` are the references that have led here."""
        self._count()
        if not isinstance(schema, dict):
            return frozenset()
        if id(schema) in self._places:
            return self._places[id(schema)]
        cuts = self._cuts
        parts = set[int | Choice]()
        if any(keyword in schema for keyword in _KEYWORDS):
            parts.add(self._numbers.setdefault(id(schema), len(self._schemas)))
            if len(self._numbers) > len(self._schemas):
                self._schemas.append(schema)
        reference = self._reference(schema)
        if reference is not None and reference in above:
            self._cuts += 1
        elif reference is not None:
            parts |= self._place(resolve(self._root, reference), above | {reference})
        for part in listed(schema.get("allOf")):
            parts |= self._place(part, above)
        for name in ("anyOf", "oneOf"):
            if alternatives := listed(schema.get(name)):
                self._check_count(len(alternatives), MAX_ALTERNATIVES, "alternatives (anyOf, oneOf, enum) for one value")
                parts |= _one_of(self._place(part, above) for part in alternatives)
        place = frozenset(parts)
        if self._cuts == cuts:  # else it may be more where fewer references have led to it
            self._places[id(schema)] = place
        return place

    def _reference(self, schema: dict[str, Any]) -> str | None:
        """Where a schema refers to. InputError for names that are resolved by more than going down from the root."""
        if schema is not self._root and isinstance(schema.get("$id"), str):
            raise InputError(
                f"{self._what} has a part with the name {_short(schema['$id'])} ($id), which is not supported; leave it out"
            )
        reference = schema.get("$ref")
        if not isinstance(reference, str):
            return None
        if reference != "#" and not reference.startswith("#/"):
            raise InputError(
                f"{self._what} refers to {_short(reference)}, which is not supported; put it under $defs and refer to #/$defs/NAME"
            )
        return reference

    def _most(self, place: Place, count: Callable[[dict[str, Any]], int], together: Callable[[Iterable[int]], int]) -> int:
        """What the schemas that meet come to `together`, with the largest alternative of each choice."""
        counts = []
        for part in place:
            self._count()
            if isinstance(part, Choice):
                counts.append(max(self._most(each, count, together) for each in part.alternatives))
            else:
                counts.append(count(self._schemas[part]))
        return together(counts)

    def _names(self, place: Place) -> set[Name]:
        """Of the properties and items that a value may have."""
        names = set[Name]()
        for part in place:
            self._count()
            if isinstance(part, Choice):
                names = names.union(*(self._names(each) for each in part.alternatives))
                continue
            schema = self._schemas[part]
            names |= mapped(schema.get("properties")).keys()
            names |= set(range(len(_first_items(schema))))
            if any(name in schema for name in ("patternProperties", "additionalProperties", "items", "additionalItems")):
                names.add(None)
        return names

    def _below(self, place: Place, name: Name) -> Place:
        """What meets in one property or item of a value."""
        parts = set[int | Choice]()
        for part in place:
            self._count()
            if isinstance(part, Choice):
                parts |= _one_of(self._below(each, name) for each in part.alternatives)
            else:
                parts |= self._child(self._schemas[part], name)
        return frozenset(parts)

    def _child(self, schema: dict[str, Any], name: Name) -> Place:
        properties, first = mapped(schema.get("properties")), _first_items(schema)
        by_pattern = [self._place(part) for part in mapped(schema.get("patternProperties")).values()]
        if isinstance(name, int):
            return self._place(first[name] if name < len(first) else _other_items(schema))
        if name in properties:
            return self._place(properties[name]) | _one_of(by_pattern)
        others = [self._place(schema.get("additionalProperties"))]
        if name is None:
            others.append(self._place(_other_items(schema)))
        return _one_of([*by_pattern, *others])

    def _count(self) -> None:
        self._work += 1
        if self._work > _MAX_WORK:
            raise InputError(f"{self._what} combines too much (allOf, anyOf, $ref); make it simpler")


def _one_of(places: Iterable[Place]) -> Place:
    """A choice in its shortest form, so that equal ones are the same: a choice of choices is one, and nothing is no alternative."""
    alternatives = set[Place]()
    for place in places:
        alternatives |= set(_only_choice(place) or ([place] if place else []))
    if len(alternatives) == 1:
        return alternatives.pop()
    return frozenset({Choice(frozenset(alternatives))}) if alternatives else frozenset()


def _only_choice(place: Place) -> frozenset[Place] | None:
    """The alternatives of a place that is nothing but one choice."""
    if len(place) != 1:
        return None
    (part,) = place
    return part.alternatives if isinstance(part, Choice) else None


def _product(counts: Iterable[int]) -> int:
    """Up to a number that is too large in any case."""
    product = 1
    for count in counts:
        product = min(product * count, 10**9)
    return product


def _patterns(schema: dict[str, Any]) -> list[int]:
    """The lengths of the regular expressions for a string."""
    pattern = schema.get("pattern")
    lengths = [max(1, min(len(pattern), MAX_PATTERN_LENGTH))] if isinstance(pattern, str) else []
    return [*lengths, FORMAT_LENGTH] if "format" in schema else lengths


def _optional(schema: dict[str, Any]) -> int:
    required = {name for name in listed(schema.get("required")) if isinstance(name, str)}
    return len(mapped(schema.get("properties")).keys() - required)


def _required(schema: dict[str, Any]) -> int:
    return len(listed(schema.get("required")))


def _alternatives(schema: dict[str, Any]) -> int:
    """Values that are no strings: all strings are one."""
    return sum(not isinstance(value, str) for value in listed(schema.get("enum")))


def _name_patterns(schema: dict[str, Any]) -> int:
    return len(mapped(schema.get("patternProperties")))


def _multiple(schema: dict[str, Any]) -> int:
    """The digits of `multipleOf` as a whole number, which has so many remainders: 25 for 0.25 and 2500. 1 where there is none."""
    number = schema.get("multipleOf")
    if isinstance(number, bool) or not isinstance(number, int | float):
        return 1
    digits = repr(number).partition("e")[0].replace(".", "").strip("-0")
    return int(digits[:20]) if digits.isdecimal() else 1


def _first_items(schema: dict[str, Any]) -> list[Any]:
    return listed(schema.get("prefixItems")) or listed(schema.get("items"))


def _other_items(schema: dict[str, Any]) -> Any:
    items = schema.get("items")
    return schema.get("additionalItems") if isinstance(items, list) else items


def _check_depth(what: str, root: Any) -> None:
    """The grammar engine goes down into a schema and from there into what it refers to, each reference once: at worst through all."""
    depth, found, todo = _depth(root), set[str](), list(references(root))
    while todo:
        reference = todo.pop()
        if reference in found:
            continue
        found.add(reference)
        target = resolve(root, reference)
        depth += _depth(target)
        if depth > MAX_DEPTH:
            raise InputError(f"{what} is more than {MAX_DEPTH} levels deep, with all that it refers to; make it flatter")
        todo += references(target)


def _depth(schema: Any) -> int:
    depth, level = 0, [schema]
    while level := [part for part in level if isinstance(part, dict | list)]:
        depth += 1
        level = [inner for part in level for inner in (part.values() if isinstance(part, dict) else part)]
    return depth


def references(schema: Any) -> set[str]:
    """All references in a schema."""
    found, todo = set[str](), [schema]
    while todo:
        part = todo.pop()
        if isinstance(part, dict):
            if isinstance(part.get("$ref"), str):
                found.add(part["$ref"])
            todo += part.values()
        elif isinstance(part, list):
            todo += part
    return found


def resolve(root: Any, reference: str) -> Any:
    """What a JSON pointer refers to; `True`, anything, where it is no pointer into this schema."""
    if not reference.startswith("#"):
        return True
    for key in unquote(reference[1:]).split("/")[1:]:
        key = key.replace("~1", "/").replace("~0", "~")
        if isinstance(root, dict) and key in root:
            root = root[key]
        elif isinstance(root, list) and key.isdecimal() and len(key) < 10 and int(key) < len(root):
            root = root[int(key)]
        else:
            return True
    return root


def _short(text: str) -> str:
    return repr(text if len(text) <= 100 else text[:100] + "...")


def listed(value: Any) -> list[Any]:
    """A keyword's value where it has to be a list; whatever has a wrong form asks for nothing."""
    return value if isinstance(value, list) else []


def mapped(value: Any) -> dict[str, Any]:
    """The same where it has to be an object."""
    return value if isinstance(value, dict) else {}
