"""Recipes and mergekit's YAML: what is read, what is refused, and how."""

from __future__ import annotations

from pathlib import Path

import pytest
from merge_cases import same_bits, tiny_checkpoint, tiny_run, weights

import waypost
from waypost.core.config import build, parse_yaml, to_tree
from waypost.core.errors import CheckpointError, ConfigError
from waypost.transform import mergekit
from waypost.transform.recipe import TransformRecipe, resolve
from waypost.transform.selecting import SELECTIONS
from waypost.transform.selecting.last_k import LastK, last_steps

RECIPES = Path(__file__).parents[2] / "recipes"

MERGEKIT = """
models:
  - model: a
    parameters: {weight: 1}
  - model: b
    parameters: {weight: 3.0}
merge_method: linear
dtype: float32
"""


def test_mergekit_is_read_as_it_is():
    got = resolve(mergekit.read(parse_yaml(MERGEKIT, "test")))
    assert got == build(
        TransformRecipe,
        {"sources": ["a", "b"], "method": {"name": "linear", "weights": [1.0, 3.0], "normalize": True}, "dtype": "F32"},
    )


@pytest.mark.parametrize(
    ("change", "field", "value"),
    [
        ("out_dtype: bfloat16", "dtype", "BF16"),
        ("parameters: {normalize: false}", "method.normalize", False),
        ("base_model: a", "dtype", "F32"),
    ],
)
def test_mergekit_keys(change, field, value):
    tree = mergekit.read(parse_yaml(f"{MERGEKIT}{change}\n", "test"))
    for part in field.split("."):
        tree = tree[part]
    assert tree == value


def test_a_common_weight_is_everybodys():
    text = "models: [{model: a}, {model: b}]\nparameters: {weight: 0.5}\nmerge_method: linear\n"
    assert mergekit.read(parse_yaml(text, "test"))["method"]["weights"] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MERGEKIT.replace("linear", "liner"), "merge_method: 'liner' is not supported. Did you mean 'linear'"),
        (MERGEKIT.replace("linear", "ties"), "merge_method: 'ties' is not supported"),
        (MERGEKIT + "tokenizer_source: union", "tokenizer_source: this key of mergekit's is not supported"),
        (MERGEKIT + "dtyp: float16", "dtyp: this key of mergekit's is not supported. Did you mean 'dtype'"),
        (MERGEKIT.replace("weight: 1}", "weight: [0, 1]}"), r"models\[0\].parameters.weight: \[0, 1\] must be one number"),
        (MERGEKIT.replace("weight: 1}", "density: 1}"), r"models\[0\].parameters.density: this key"),
        (MERGEKIT.replace("{weight: 1}", "{}"), r"models\[0\].parameters.weight: None must be one number"),
        (MERGEKIT.replace("model: a", "model: a+lora"), "asks for a LoRA on top of a model"),
        (MERGEKIT + "base_model: c", "base_model: 'c' is not among the models"),
        (MERGEKIT.replace("float32", "float31"), "dtype: 'float31' is no dtype of a checkpoint. Did you mean 'float32'"),
        ("merge_method: linear\nmodels: a", "models: give a list"),
        ("merge_method: linear\nmodels: [a]", r"models\[0\]: 'a' is not a mapping"),
        (MERGEKIT + "parameters: {normalize: 3}", "parameters.normalize: 3 must be true or false"),
    ],
)
def test_what_mergekit_asks_and_is_not_done_is_an_error(text, message):
    with pytest.raises(ConfigError, match=message):
        mergekit.read(parse_yaml(text, "test"))


def test_mergekits_yaml_and_the_recipe_give_the_same_bytes(tmp_path):
    a, b = (tiny_checkpoint(tmp_path / name, seed=seed) for seed, name in enumerate("ab"))
    text = MERGEKIT.replace("model: a", f"model: {a}").replace("model: b", f"model: {b}")
    (tmp_path / "merge.yaml").write_text(text)
    one = weights(waypost.transform(tmp_path / "merge.yaml", tmp_path / "one"))
    recipe = {"sources": [str(a), str(b)], "method": {"name": "linear", "weights": [0.25, 0.75]}, "dtype": "F32"}
    other = weights(waypost.transform(recipe, tmp_path / "other"))
    assert all(same_bits(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", ["merge-linear", "soup", "average-last", "mergekit-linear", "lcsc", "upcycle"])
def test_the_shipped_recipes_are_valid(name):
    recipe = resolve(RECIPES / f"{name}.yaml")
    assert build(TransformRecipe, to_tree(recipe)) == recipe
    assert len(recipe.sources) in (1, 2, 3)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"sources": [], "method": "soup"}, "sources is empty"),
        ({"sources": ["a"], "method": "sop"}, "transform: no technique named 'sop'. Did you mean 'soup'"),
        ({"sources": ["a"], "method": "soup", "selct": 1}, "selct: unknown key. Did you mean 'select'"),
        ({"sources": ["a"], "method": {"name": "soup", "k": 1}}, "method.k: unknown key"),
        ({"sources": ["a"], "method": "soup", "dtype": "BF61"}, "dtype:"),
        ({"sources": ["a"]}, "method"),
        ({"sources": ["a"], "method": "soup", "probe_tokens": 1}, "probe_tokens=1: must be at least 2"),
        ({"sources": ["a"], "method": "soup", "held_out": {"seq_tokens": 1}}, "seq_tokens=1 must be at least 2"),
    ],
)
def test_a_wrong_recipe_says_where(tree, message):
    with pytest.raises(ConfigError, match=message):
        resolve(tree)


def test_settings_reach_into_the_recipe():
    recipe = resolve(RECIPES / "average-last.yaml", ["sources.0=runs/other", "select.k=7", "dtype=F32"])
    assert (recipe.sources, recipe.select, recipe.dtype) == (["runs/other"], LastK(k=7), "F32")
    with pytest.raises(ConfigError, match="complete as it is"):
        resolve(recipe, ["dtype=F32"])


def test_last_steps_count_back_from_the_newest():
    assert last_steps([10, 20, 30, 40, 50], 3, 1) == [50, 40, 30]
    assert last_steps([10, 20, 30, 40, 50], 3, 2) == [50, 30, 10]
    assert last_steps([10], 1, 9) == [10]
    with pytest.raises(
        ConfigError, match=r"needs 5 checkpoints for k=3, every=2; the run keeps 4, at steps \[10, 20, 30, 40\]"
    ):
        last_steps([10, 20, 30, 40], 3, 2)


def test_last_k_of_a_run(tmp_path):
    run = tiny_run(tmp_path / "run", {10: 3.0, 20: 2.5, 30: 2.0})
    assert [path.name for path in LastK(k=2).select([run])] == ["step-00000030", "step-00000020"]
    out = waypost.transform({"sources": [str(run)], "select": {"name": "last_k", "k": 1}, "method": "soup"}, tmp_path / "out")
    want, have = weights(run / "step-00000030"), weights(out)
    assert all(same_bits(want[name], have[name]) for name in want)
    with pytest.raises(ConfigError, match="takes one run folder"):
        LastK().select([run, run])
    with pytest.raises(ConfigError, match="k=0, every=1; both must be at least 1"):
        LastK(k=0)
    with pytest.raises(CheckpointError, match="nowhere: no such folder; give a checkpoint"):
        LastK().select([tmp_path / "nowhere"])
    with pytest.raises(ConfigError, match=r"step-00000020 is one checkpoint; give the run folder that holds it"):
        LastK(k=1).select([run / "step-00000020"])


def test_every_file_of_selecting_has_a_row():
    import waypost.transform.selecting as package

    files = {p.stem for p in Path(package.__file__).parent.glob("*.py") if not p.stem.startswith("_")}
    assert files == set(SELECTIONS)
