"""What comes from outside, as benchmarks/fuzz.py has it, on as many inputs as CI has time for."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import fuzz

NAMES = ("protocol", "admission", "batch", "header", "stops")


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    made = fuzz.targets(tmp_path_factory.mktemp("fuzz"))
    assert tuple(target.name for target in made) == NAMES
    return {target.name: target for target in made}


@pytest.mark.parametrize("name", NAMES)
def test_good_inputs_are_taken(targets, name):
    outcomes = [fuzz.outcome_of(targets[name], seed) for seed in targets[name].seeds]
    assert [outcome for outcome in outcomes if not outcome.startswith("taken")] == []


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=400, derandomize=True, deadline=None, database=None)
@given(seed=st.integers(0, 2**32))
def test_changed_inputs_are_taken_or_refused_as_documented(targets, name, seed):
    target = targets[name]
    changed = fuzz.change(target, fuzz.Corpus(target.seeds), random.Random(seed))
    fuzz.outcome_of(target, changed)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(data=st.binary(max_size=300))
def test_any_bytes_are_taken_or_refused_as_documented(targets, name, data):
    fuzz.outcome_of(targets[name], data)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_documented_is_found(targets, name):
    """The search itself: a reader that fails on what few inputs have."""

    def check(data):
        if len(data) % 7 == 3:
            raise ZeroDivisionError

    planted = fuzz.dataclasses.replace(targets[name], check=check)
    result = fuzz.fuzz(planted, 200, seed=0)
    (failure,) = result["failures"]
    assert "ZeroDivisionError" in failure["traceback"]
    assert len(fuzz.base64.b64decode(failure["input"])) % 7 == 3


def test_the_definition_of_a_cut_is_not_the_code_under_test():
    assert fuzz.cut_by_definition("xabc", ["abc", "b"]) == ("xa", "b")
    assert fuzz.cut_by_definition("xabc", ["bc", "abc"]) == ("x", "abc")
    assert fuzz.cut_by_definition("xabc", ["d"]) == ("xabc", None)


def test_the_stored_run_is_of_a_million_inputs_without_a_failure():
    stored = json.loads(fuzz.RESULT.read_text())
    assert stored["num_failures"] == 0
    assert stored["num_inputs"] >= 1_000_000
    assert set(stored["targets"]) == set(NAMES)
