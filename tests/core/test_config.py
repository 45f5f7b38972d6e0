"""Configuration: what a recipe may say, what is refused and with which words, and that it survives being written down."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from waypost.core.config import (
    Table,
    build,
    cost,
    dump_yaml,
    load_object,
    override,
    parse_yaml,
    read_yaml,
    recipe,
    technique,
    to_tree,
)
from waypost.core.errors import ConfigError


@technique
class Circle:
    radius: float = 1.0

    def __post_init__(self) -> None:
        if self.radius <= 0:
            raise ConfigError(f"Circle.radius={self.radius}: must be positive")


@technique
class Box:
    width: float = 1.0
    height: float = 1.0
    tiles: int = cost(4)


class Plain:
    """Not a technique."""


SHAPES = {"circle": Circle, "box": "test_config:Box"}


@recipe
class Paint:
    colour: Literal["red", "blue"] = "red"
    layers: int = 1
    glossy: bool = False


@recipe
class Drawing:
    shape: Annotated[Any, Table("shape", SHAPES)] = Circle()
    others: list[Annotated[Any, Table("shape", SHAPES)]] = field(default_factory=list)
    paint: Paint = Paint()
    coats: list[Paint] = field(default_factory=list)
    named: dict[str, Paint] = field(default_factory=dict)
    primer: Paint | None = None
    scale: float = 1.0
    size: int | list[int] | None = None
    title: str


def made(**tree: Any) -> Drawing:
    return build(Drawing, {"title": "t", **tree})


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ({"scael": 2}, r"^scael: unknown key\. Did you mean 'scale'\? Known: shape, others, paint"),
        ({"paint": {"colur": "red"}}, r"^paint\.colur: unknown key\. Did you mean 'colour'\?"),
        ({"coats": [{}, {"layer": 1}]}, r"^coats\[1\]\.layer: unknown key\. Did you mean 'layers'\?"),
        ({"named": {"top": {"glosy": True}}}, r"^named\.top\.glosy: unknown key\. Did you mean 'glossy'\?"),
        ({"primer": {"zzz": 1}}, r"^primer\.zzz: unknown key\. Known: colour, layers, glossy$"),
        ({"shape": {"name": "circle", "radios": 2.0}}, r"^shape\.radios: unknown key\. Did you mean 'radius'\?"),
        ({"others": [{"name": "box", "widht": 1}]}, r"^others\[0\]\.widht: unknown key\. Did you mean 'width'\?"),
        ({"shape": "circel"}, r"^shape: no technique named 'circel'\. Did you mean 'circle'\? Known: circle, box$"),
        ({"shape": {"radius": 2.0}}, r"^shape: needs 'name', one of: circle, box$"),
        ({"shape": {"name": 3}}, r"^shape: needs 'name'"),
        ({"shape": {"name": "circle", "radius": -1.0}}, r"^Circle\.radius=-1\.0: must be positive$"),
        ({"scale": "big"}, r"^scale: input should be a valid number, given 'big'$"),
        ({"scale": True}, r"^scale: input should be a valid number, given True$"),
        ({"paint": {"layers": 1.5}}, r"^paint\.layers: input should be a valid integer.*given 1\.5$"),
        ({"paint": {"layers": "1"}}, r"^paint\.layers: input should be a valid integer, given '1'$"),
        ({"paint": {"layers": True}}, r"^paint\.layers: input should be a valid integer, given True$"),
        ({"paint": {"glossy": 1}}, r"^paint\.glossy: input should be a valid boolean, given 1$"),
        ({"coats": [{"colour": "green"}]}, r"^coats\[0\]\.colour: input should be 'red' or 'blue', given 'green'$"),
        ({"paint": 3}, r"^paint: 3 is not a mapping of fields; known: colour, layers, glossy$"),
        ({"coats": {"layers": 1}}, r"^coats: input should be a valid list"),
        ({"scale": None}, r"^scale: input should be a valid number, given None$"),
        ({"size": "x"}, r"size"),
    ],
)
def test_what_cannot_be_is_named_with_its_path(tree: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        made(**tree)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^title: field required; it has no default$"):
        build(Drawing, {})
    with pytest.raises(ConfigError, match=r"^recipe\.scale: .*given 'x'; recipe\.title: field required; it has no default$"):
        build(Drawing, {"scale": "x"}, "recipe")


def test_a_tree_that_is_no_mapping_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"Drawing: \[1\] is not a mapping"):
        build(Drawing, [1])  # type: ignore[arg-type]


def test_choices_are_built() -> None:
    assert made(shape="box").shape == Box()
    assert made(shape={"name": "box", "width": 2}).shape == Box(width=2.0)
    assert made(others=["circle", {"name": "box", "height": 3.0}]).others == [Circle(), Box(height=3.0)]
    assert made(primer={"layers": 2}).primer == Paint(layers=2)
    assert made(size=[1, 2]).size == [1, 2]
    assert made(shape=Circle(radius=5.0)).shape == Circle(radius=5.0)


def test_an_outsider_is_named_by_its_module() -> None:
    drawing = made(shape={"name": "test_config:Paint", "layers": 7})
    assert drawing.shape == Paint(layers=7)
    assert to_tree(drawing)["shape"]["name"] == "test_config:Paint"
    assert to_tree(made(shape="box"))["shape"]["name"] == "box"  # a lazy row keeps its short name


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("no_such_module:Thing", r"shape: cannot load 'no_such_module:Thing'.*package\.module:Name"),
        ("test_config:Nothing", r"cannot load 'test_config:Nothing'"),
        ("test_config:", r"cannot load"),
        ("test_config:Plain", r"shape: 'test_config:Plain' is not a technique; make it one with @technique"),
        ("math:pi", r"shape: 'math:pi' is not a technique"),
    ],
)
def test_an_outsider_that_is_none_is_refused(name: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        made(shape=name)


def test_load_object_gives_any_object() -> None:
    assert load_object("math:pi", "number") == math.pi


def test_techniques_are_frozen_and_keyword_only() -> None:
    circle = Circle(radius=2.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        circle.radius = 3.0  # type: ignore[misc]
    with pytest.raises(Exception, match="positional"):
        Circle(2.0)  # type: ignore[misc]
    with pytest.raises(ConfigError, match="no field 'diameter'"):
        Circle(diameter=2.0)  # type: ignore[call-arg]
    assert circle == Circle(radius=2.0)
    assert hash(circle) == hash(Circle(radius=2.0))


def test_a_cost_field_says_so() -> None:
    effects = {f.name: f.metadata.get("effect", "value") for f in dataclasses.fields(Box)}  # type: ignore[arg-type]
    assert effects == {"width": "value", "height": "value", "tiles": "cost"}
    assert Box().tiles == 4


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4), ("1E5", 1e5), ("1.", 1.0), (".5", 0.5), ("-2", -2), ("0x1F", 31), ("0o17", 15), ("012", 12),
        ("no", "no"), ("yes", "yes"), ("on", "on"), ("off", "off"), ("true", True), ("False", False), ("null", None),
        ("~", None), ("", None), ("'1'", "1"), ("12:30:00", "12:30:00"), (".inf", math.inf), ("[1, 2.0]", [1, 2.0]),
        ("{b: c}", {"b": "c"}),
    ],
)  # fmt: skip
def test_yaml_is_1_2(text: str, value: object) -> None:
    got = parse_yaml(f"a: {text}", "here")["a"]
    assert (type(got), got) == (type(value), value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [1", "here: not valid YAML: "),
        ("- 1\n- 2", "here: holds list, expected a mapping"),
        ("just words", "here: holds str, expected a mapping"),
        ("a: 1\na: 2", "here: not valid YAML: .*duplicate key"),
        ("a: !!python/object:os.system x", "here: not valid YAML"),
    ],
)
def test_yaml_that_is_no_recipe_is_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_yaml(text, "here")


def test_an_empty_file_is_an_empty_mapping(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing yet\n")
    assert read_yaml(path) == {}


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.yaml: cannot be read \(No such file or directory\)"):
        read_yaml(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"a: \xff\xfe")
    with pytest.raises(ConfigError, match=r"binary\.yaml: not UTF-8 text"):
        read_yaml(tmp_path / "binary.yaml")


TREE = {"title": "t", "shape": "box", "coats": [{"layers": 1}, {"layers": 2}], "primer": None}


@pytest.mark.parametrize(
    ("setting", "want"),
    [
        ("scale=3e-1", {**TREE, "scale": 0.3}),
        ("title=a=b", {**TREE, "title": "a=b"}),
        ("title='5'", {**TREE, "title": "5"}),
        ("primer=", {**TREE, "primer": None}),
        ("shape=circle", {**TREE, "shape": "circle"}),
        ("shape.width=2.0", {**TREE, "shape": {"name": "box", "width": 2.0}}),
        ("paint.colour=blue", {**TREE, "paint": {"colour": "blue"}}),
        ("primer.layers=3", {**TREE, "primer": {"layers": 3}}),
        ("coats.1.layers=9", {**TREE, "coats": [{"layers": 1}, {"layers": 9}]}),
        ("coats.0={colour: blue}", {**TREE, "coats": [{"colour": "blue"}, {"layers": 2}]}),
        ("size=[4, 5]", {**TREE, "size": [4, 5]}),
    ],
)
def test_settings_go_where_they_say(setting: str, want: dict[str, Any]) -> None:
    before = json.dumps(TREE)
    got = override(TREE, [setting])
    assert got == want
    assert json.dumps(TREE) == before  # the tree that was given is as it was
    build(Drawing, got)


def test_settings_apply_in_order() -> None:
    assert override({}, ["a.b=1", "a.b=2", "a.c=3"]) == {"a": {"b": 2, "c": 3}}


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("scale", r"^--set scale: write it as path\.to\.field=value$"),
        ("=3", r"write it as path\.to\.field=value"),
        ("coats.2.layers=1", r"'2' is not an index of a list of 2"),
        ("coats.x=1", r"'x' is not an index of a list of 2"),
        ("coats.-1=1", r"'-1' is not an index"),
        ("number.field=1", r"'number' holds 3, which has no fields"),
        ("scale=[1", r"^--set scale=\[1: not valid YAML"),
    ],
)
def test_settings_that_go_nowhere_are_refused(setting: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        override({**TREE, "number": 3}, [setting])


paints = st.builds(Paint, colour=st.sampled_from(["red", "blue"]), layers=st.integers(), glossy=st.booleans())
positive = st.floats(1e-300, 1e300)
shapes = st.one_of(
    st.builds(Circle, radius=positive),
    st.builds(
        Box,
        width=st.floats(allow_nan=False, allow_infinity=False),
        height=st.floats(allow_nan=False, allow_infinity=False),
        tiles=st.integers(-(2**63), 2**63),
    ),
    paints,
)
# Everything that a person types: letters, marks, numbers, punctuation, symbols, spaces, line ends and tabs.
texts = st.text(st.one_of(st.characters(categories=("L", "M", "N", "P", "S", "Zs")), st.sampled_from("\n\t")), max_size=30)
drawings = st.builds(
    Drawing,
    shape=shapes,
    others=st.lists(shapes, max_size=3),
    paint=paints,
    coats=st.lists(paints, max_size=3),
    named=st.dictionaries(texts, paints, max_size=3),
    primer=st.none() | paints,
    scale=st.floats(allow_nan=False, allow_infinity=False),
    size=st.none() | st.integers() | st.lists(st.integers(), max_size=3),
    title=texts,
)


@given(drawings)
def test_a_recipe_survives_yaml_and_json(drawing: Drawing) -> None:
    tree = to_tree(drawing)
    assert build(Drawing, tree) == drawing
    assert build(Drawing, parse_yaml(dump_yaml(tree), "here")) == drawing
    assert build(Drawing, json.loads(json.dumps(tree))) == drawing


leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts
nested = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=8
)
trees = st.dictionaries(texts, nested, max_size=4)


@given(trees)
def test_plain_data_survives_yaml(tree: dict[str, Any]) -> None:
    back = parse_yaml(dump_yaml(tree), "here")
    assert repr(back) == repr(tree)  # repr: 1 is not 1.0, 0.0 is not -0.0
