"""Recipes and overrides become one frozen config, or a line that names the field, the value and what fits."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmjax.core import config as config_lib
from llmjax.core.config import flatten, from_workdir, load, resolve, save, to_dict
from llmjax.core.errors import ConfigError, RunError

RECIPE = '''
from ml_collections import ConfigDict

def get_config(arg=""):
    config = ConfigDict({"train": {"steps": 7}, "model": {"dim": 48}})
    if arg:
        config.train.steps = int(arg)
    return config
'''


def test_a_recipe_file_its_argument_and_overrides_end_in_typed_fields(tmp_path: Path) -> None:
    recipe = tmp_path / "small.py"
    recipe.write_text(RECIPE)
    assert load(str(recipe)).train.steps == 7
    assert load(f"{recipe}:12").train.steps == 12
    config = load(f"{recipe}:12", {"train.steps": "30", "optim.learning_rate": "1", "model.rope_scaling.factor": "8"})
    assert (config.train.steps, config.model.dim) == (30, 48)
    assert type(config.optim.learning_rate) is float and config.model.rope_scaling.factor == 8.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train.steps = 3  # type: ignore[misc]


def test_the_name_is_the_files_and_the_argument_made_safe_unless_given(tmp_path: Path) -> None:
    recipe = tmp_path / "small.py"
    recipe.write_text("def get_config(arg=''): return {}")
    assert load(str(recipe)).name == "small"
    assert load(f"{recipe}:a/b=3").name == "small_a-b-3"
    assert load(str(recipe), {"name": "other"}).name == "other"


def test_a_recipe_edits_the_one_beside_it_and_leaves_no_module_behind(tmp_path: Path) -> None:
    for folder, steps in (("one", 3), ("two", 4)):
        (tmp_path / folder).mkdir()
        parent = f"def get_config(): return {{'train': {{'steps': {steps}}}}}"
        (tmp_path / folder / "parent_recipe.py").write_text(parent)
        child = tmp_path / folder / "child.py"
        child.write_text("import parent_recipe\ndef get_config(): return parent_recipe.get_config()")
        assert load(str(child)).train.steps == steps
        assert "parent_recipe" not in sys.modules and str(tmp_path / folder) not in sys.path


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def get_config(:", ":1: SyntaxError"),
        ("\ndef get_config():\n    return 1 / 0", ":3: ZeroDivisionError"),
        ("import no_such_module_anywhere", ":1: ModuleNotFoundError"),
        ("x = 1", "defines get_config"),
    ],
)
def test_a_recipe_that_fails_is_named_with_its_line(tmp_path: Path, source: str, said: str) -> None:
    recipe = tmp_path / "broken.py"
    recipe.write_text(source)
    with pytest.raises(ConfigError, match="broken.py") as caught:
        load(str(recipe))
    assert said in str(caught.value)


def test_a_missing_recipe_names_those_spelt_alike(tmp_path: Path) -> None:
    (tmp_path / "quickstart.py").write_text("")
    with pytest.raises(ConfigError, match=r"quickstrat\.py: no such file; near it: .*quickstart\.py"):
        load(str(tmp_path / "quickstrat.py"))


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"train": {"stpes": 3}}, ["train.stpes", "train.steps"]),
        ({"train": {"learning_rate": 3.0}}, ["train.learning_rate", "optim.learning_rate"]),
        ({"trian": {"steps": 3}}, ["trian", "train"]),
        ({"train": 3}, ["train=3", "section", "steps"]),
        ({"train": {"steps": 2.0}}, ["train.steps=2.0", "integer"]),
        ({"train": {"steps": True}}, ["train.steps=True", "integer"]),
        ({"train": {"steps": "10"}}, ["train.steps='10'", "integer"]),
        ({"optim": {"learning_rate": "fast"}}, ["optim.learning_rate='fast'", "number"]),
        ({"optim": {"learning_rate": float("nan")}}, ["optim.learning_rate=nan", "finite"]),
        ({"data": {"sources": 3}}, ["data.sources=3", "string"]),
        ({"optim": {"schedule": "cosin"}}, ["optim.schedule='cosin'", "'cosine'", "'wsd'"]),
        ({"model": {"rope_scaling": {"kind": "longrope"}}}, ["model.rope_scaling.kind='longrope'", "'llama3'"]),
        ({"train": {"steps": 0}}, ["train.steps=0", "at least 1"]),
        ({"data": {"holdout_fraction": 1.5}}, ["data.holdout_fraction=1.5", "at most 1"]),
        ({"model": {"num_heads": 8, "num_kv_heads": 3}}, ["model.num_kv_heads=3", "model.num_heads=8", "2, 4"]),
        ({"model": {"head_dim": 33}}, ["model.head_dim=33", "even"]),
        ({"data": {"batch_size": 10}, "train": {"accumulation": 4}}, ["data.batch_size=10", "8, 12"]),
        ({"data": {"seq_len": 4096}, "model": {"max_seq_len": 2048}}, ["data.seq_len=4096", "max_seq_len=2048"]),
        ({"eval": {"seq_len": 64, "stride": 65}}, ["eval.stride=65", "eval.seq_len=64"]),
        ({"train": {"compiler_options": "xla_a=1, xla_b"}}, ["train.compiler_options='xla_a=1, xla_b'", "'xla_b'"]),
        ({"mesh": {"fsdp": -1}}, ["mesh.fsdp=-1", "mesh.data"]),
        ({"mesh": {"tensor": 0}}, ["mesh.tensor=0", "at least 1"]),
    ],
)
def test_each_mistake_is_one_line_with_the_field_the_value_and_what_fits(raw: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(raw)
    line = str(caught.value)
    assert "\n" not in line
    for part in said:
        assert part in line


@pytest.mark.parametrize("path", ["train", "train.steps.more", "nothing", "train.stpes"])
def test_an_override_of_no_field_is_refused(path: str) -> None:
    with pytest.raises(ConfigError, match=f"^{path}: no such field"):
        resolve({}, {path: "1"})


def test_values_that_stand_for_another_field_are_filled_in() -> None:
    config = resolve({"data": {"seq_len": 128}, "optim": {"learning_rate": 0.5}})
    assert (config.eval.seq_len, config.eval.stride, config.optim.adam_learning_rate) == (128, 64, 0.5)
    given_anyway = resolve({"data": {"seq_len": 128}, "eval": {"seq_len": 32, "stride": 7}})
    assert (given_anyway.eval.seq_len, given_anyway.eval.stride) == (32, 7)


LEAVES = flatten(resolve({}))
CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "train.steps": st.integers(1, 10**9), "optim.learning_rate": st.floats(0, 10), "optim.b1": st.floats(0, 1),
        "data.sources": st.text(), "optim.schedule": st.sampled_from(["cosine", "linear", "wsd", "constant"]),
        "model.rope_scaling.factor": st.floats(1, 100), "mesh.fsdp": st.integers(1, 64),
    },
)  # fmt: skip


@given(changes=CHANGES)
def test_overrides_read_back_as_given_and_json_keeps_the_config(changes: dict[str, Any]) -> None:
    config = resolve({}, {path: str(value) for path, value in changes.items()})
    flat = flatten(config)
    assert {path: flat[path] for path in changes} == changes
    assert resolve(json.loads(json.dumps(to_dict(config)))) == config


def test_every_size_has_a_limit_that_names_a_field() -> None:
    for path, limit in {**config_lib.AT_LEAST, **config_lib.AT_MOST}.items():
        assert isinstance(LEAVES[path], (int, float)), path
        assert limit is not None
    numbers = {path for path, value in LEAVES.items() if isinstance(value, (int, float)) and "mesh." not in path}
    rope = "model.rope_scaling"
    free = {"data.shuffle_seed", "train.seed", f"{rope}.low_freq_factor", f"{rope}.high_freq_factor"}
    assert numbers - config_lib.AT_LEAST.keys() == free


def test_a_workdir_gives_its_config_back_and_takes_overrides(tmp_path: Path) -> None:
    config = resolve({"name": "here", "train": {"steps": 5}})
    save(config, tmp_path)
    assert from_workdir(tmp_path) == config
    assert from_workdir(tmp_path, {"train.steps": "6"}).train.steps == 6


def test_a_workdir_without_a_readable_config_is_a_failed_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="missing"):
        from_workdir(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RunError, match="not JSON"):
        from_workdir(tmp_path)
