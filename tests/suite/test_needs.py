"""What a run needs is carried over from stored runs by the formula that the page states, and the page is current."""

import json

import pytest
from test_notebooks_hub import TESTED

from helpers.base.storage import MODELS
from helpers.subjects.model_files import load_pretrained
from helpers.suite import needs
from helpers.suite.needs import PAGE, Sizes, carried_over, filled_page, sizes, stated, steps

SPENT = {"set-up": 0.5, "figures": 0.25, "training": 1.0, "harvest": 2.0, "evaluation and the rest": 3.0}


def test_the_page_is_current():
    text = PAGE.read_text(encoding="utf-8")
    assert text == filled_page(text), "run `make pages` and commit what it changed"


def test_the_page_names_the_notebooks_that_are_tested_on_a_stand_in_for_the_hub():
    *others, last = TESTED.split()
    text = " ".join(PAGE.read_text(encoding="utf-8").split())
    assert f"and {', '.join(others)} and {last} on a stand-in for the hub" in text


def test_a_run_is_carried_over_by_hand(monkeypatch):
    """Twice as wide, with ten times the weights below the site: 0.75 + 2 * 1 + 10 * 5 minutes, 2 * 1.5 + 2 * 4 GB."""
    known = {"small": Sizes(8, 10, 20), "gpt2": Sizes(16, 100, 2**30)}
    monkeypatch.setattr(needs, "sizes", known.get)
    run = {"minutes_spent_on": SPENT, "peak_memory_gb": 1.5}
    assert carried_over(run, "small", "gpt2", 2) == (pytest.approx(52.75), pytest.approx(11.0))


@pytest.mark.parametrize("name", ["docs-gpt2", "docs-gemma2-base"])
def test_sizes_are_those_of_the_weights(name):
    whole = load_pretrained(MODELS / name)
    found = sizes(name)
    assert (found.width, found.all) == (whole.config.hidden_size, whole.model.num_parameters())
    a, b = (sum(p.numel() for p in whole.first_blocks(n).parameters()) for n in (3, 2))
    assert found.below == 3 * (a - b)


def test_a_notebook_that_nobody_ran_says_so(tmp_path):
    row = needs.needs(tmp_path).splitlines()[2]
    assert row.startswith("| [00](00_tour.ipynb) | not run | not run | not run | ")


def test_a_notebook_states_its_other_scales(write_notebook):
    budget = 'run.budget(smoke="20 s: a miniature", laptop="5 min, 9 without", paper=f"about {hours} days, resumable")'
    assert stated(write_notebook("15_mine", "hours = 3", budget)) == ["20 s", "about … days"]


def test_the_papers_own_runs_are_planned_for_one_device():
    names = [line.split(" | ")[0].strip("| ") for line in needs.papers().splitlines()[2:]]
    assert names == list(needs.PAPERS)


def test_steps_say_how_far_the_plan_was_off(tmp_path):
    assert steps(tmp_path) == "Not run yet."
    rows = {
        n: [{"k": 2048, "planned": 0.5, "measured": ratio / 2, "ratio": ratio}] for n, ratio in (("1", 2.0), ("2", 1.5))
    }
    about = {"hardware": "two cores", "torch": "2", "commit": "abc"}
    (tmp_path / "paper_scale.json").write_text(json.dumps(about | {"processes": rows}))
    found = steps(tmp_path).splitlines()
    assert found[0] == "Measured on two cores, torch 2, commit abc: a step took 1.5 to 2.0 times its plan."
    assert found[-1] == "| 2 | 2,048 | 0.5 | 0.75 | 1.5 |"
