"""No number of a run changes but on purpose: ten iterations of each stage are those of the golden trace."""

import json

import pytest

from tests.golden import FILE, processor, record


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    stored = json.loads(FILE.read_text())
    return stored, record(tmp_path_factory.mktemp("golden"))


def leaves(value, name=""):
    """Numbers and texts of a nested structure, each with where it stands."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, f"{name}.{key}")
    else:
        yield name, value


def test_losses_log_probs_divergences_and_rewards_are_those_of_the_trace(traces):
    stored, found = (dict(leaves(trace)) for trace in (traces[0]["trace"], traces[1]))
    assert stored.keys() == found.keys()
    for name, value in stored.items():
        if not name.endswith(".hash"):
            assert found[name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-6, abs=1e-6)), name


def test_on_the_same_processor_they_are_the_same_to_the_bit(traces):
    stored, found = traces
    if stored["processor"] != processor():
        pytest.skip(f"the trace is of {stored['processor']}")
    assert found == stored["trace"]
