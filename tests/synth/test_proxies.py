"""Mixture design: the update of DoReMi, caps on epochs, shares of synthetic text, and the file that training reads."""

import math

import hypothesis
import hypothesis.strategies as st
import pytest

from llmjax.core import config as configs
from llmjax.core.errors import ConfigError
from llmjax.data.mixture import parse_mixture
from llmjax.synth.proxies import (
    Design,
    Limits,
    Round,
    average,
    capped,
    check_shares,
    design,
    epochs,
    mixture_file,
    updated,
)

EVEN = {"a": 0.5, "b": 0.5}


def test_an_update_is_the_papers():
    found = updated({"a": 0.2, "b": 0.8}, {"a": 1.0, "b": -3.0}, rate=2.0, smoothing=0.1)
    raw = {"a": 0.2 * math.exp(2.0), "b": 0.8}  # a negative excess counts as none
    total = sum(raw.values())
    assert found == pytest.approx({name: 0.9 * raw[name] / total + 0.05 for name in raw})


@hypothesis.given(st.lists(st.floats(0.01, 1), min_size=2, max_size=5),
                  st.lists(st.floats(-2, 2), min_size=5, max_size=5))  # fmt: skip
@hypothesis.settings(max_examples=50, deadline=None)
def test_weights_stay_shares(raw, excess):
    weights = {str(i): value / sum(raw) for i, value in enumerate(raw)}
    found = updated(weights, {name: excess[int(name)] for name in weights}, rate=1.0, smoothing=0.01)
    assert sum(found.values()) == pytest.approx(1)
    assert min(found.values()) >= 0.01 / len(found)


def test_what_is_hard_for_the_proxy_gains():
    seen = []

    def train(number, weights):
        seen.append(weights)
        return {"a": 3.0 - number, "b": 2.0}

    rounds = design(EVEN, {"a": 1.0, "b": 2.0}, train, num_rounds=3)
    assert seen == [r.weights for r in rounds[:-1]]
    assert [round(r.weights["a"], 3) for r in rounds] == [0.5, 0.88, 0.952, 0.952]
    assert average(rounds)["a"] == pytest.approx(sum(r.weights["a"] for r in rounds[1:]) / 3)


def test_no_source_is_seen_too_often_and_the_others_take_its_part():
    tokens, limits = {"a": 10, "b": 1000, "c": 3000}, Limits(tokens=1000, max_epochs=4)
    found = capped({"a": 0.5, "b": 0.25, "c": 0.25}, tokens, limits)
    assert found == pytest.approx({"a": 0.04, "b": 0.48, "c": 0.48})
    assert epochs(found, tokens, limits)["a"] == pytest.approx(4)
    assert capped({"a": 0.01, "b": 0.99}, tokens, limits) == pytest.approx({"a": 0.01, "b": 0.99})
    with pytest.raises(ConfigError, match="more than 4 epochs of the corpus; it has room for 16,040"):
        capped(EVEN | {"c": 0.0}, tokens, Limits(tokens=20_000))


@pytest.mark.parametrize(("weights", "teachers", "message"), [
    ({"a": 0.4, "s": 0.6}, {"s": {"x": 1, "y": 1}}, "max-synthetic=0.5: 0.60 of the mixture is synthetic"),
    ({"a": 0.6, "s": 0.4}, {"s": {"x": 9, "y": 1}}, "max-teacher=0.75: x wrote 0.90 of the synthetic"),
    ({"a": 0.6, "s": 0.4}, {"s": {"x": 7, "y": 3}}, ""), (EVEN, {}, ""),
])  # fmt: skip
def test_shares_of_synthetic_text(weights, teachers, message):
    if not message:
        check_shares(weights, teachers, Limits(1000))
        return
    with pytest.raises(ConfigError, match=message):
        check_shares(weights, teachers, Limits(1000))


def test_the_file_is_what_training_reads(tmp_path):
    made = Design({"a.txt": 0.75, "b": 0.25}, {}, {}, (Round(EVEN, {}), Round(EVEN, {})))
    path = tmp_path / "mixture.txt"
    path.write_text(mixture_file(made, Limits(1000, max_epochs=2)))
    config = configs.resolve({}, {"data.mixture": f"@{path}"})
    read = parse_mixture(config.data.mixture, field="data.mixture")
    assert [(i.source, i.weight, i.epochs) for i in read] == [("a.txt", 0.75, 2.0), ("b", 0.25, 2.0)]
    assert configs.resolve(configs.to_dict(config)) == config
    with pytest.raises(ConfigError, match="data.mixture: .*none.txt: No such file"):
        configs.resolve({}, {"data.mixture": f"@{tmp_path}/none.txt"})
