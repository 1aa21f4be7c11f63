"""The tables of notebooks/NEEDS.md: what each notebook takes on each subject, and the plan of the largest run.

Measured figures come from stored runs and from benchmarks' records. Nobody has run the notebooks at laptop scale on
other subjects than the embedded ones, so for these the stored run's are carried over:

    minutes   set-up and figures + w * training + m * (harvest and the rest)
    GB        w * the stored run's + the models' weights

w is the ratio of widths, m that of weights in the blocks up to the site. Of other scales stands what a notebook states.
"""

import ast
import json
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import nbformat
import pandas as pd
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Gemma2Config, Gemma3TextConfig, GPT2Config

from helpers.base.storage import MODELS, RESULTS, write_atomic
from helpers.dictionaries.paper_scale import H100, PAPERS, plan
from helpers.notebook.claims import number
from helpers.suite.pages import fill_all, markdown_table
from helpers.suite.run import NOTEBOOKS, find, number_of

PAGE = NOTEBOOKS / "NEEDS.md"
PROCESSES = (8, 16, 32, 64)
SINGLE, PAIR = "00 01 02 03 04 05 06 07 08".split(), "09 10 11".split()  # the others read the embedded models always
SIZES_OF_GEMMA_3 = {"hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18, "num_attention_heads": 4}
SIZES_OF_GEMMA_3 |= {"num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262_144}
BLOCKS = {"docs-gpt2": 3, "docs-gemma2-base": 3, "gpt2": 9, "gemma3": 10, "gemma2": 14}  # up to the site
BYTES = {"gpt2": 4, "gemma3": 4, "gemma2": 2}  # of a weight as it is computed with


class Sizes(NamedTuple):
    width: int
    below: int  # weights in the blocks up to the site
    all: int  # weights of the whole model


def write_page() -> None:
    """Make the tables of NEEDS.md anew."""
    write_atomic(PAGE, filled_page(PAGE.read_text(encoding="utf-8")))


def filled_page(text: str, results: Path = RESULTS) -> str:
    """NEEDS.md's text with what is between its markers made anew."""
    parts = {"needs": needs(results), "papers": papers(), "plan": planned(), "steps": steps(results)}
    return fill_all(text, parts, PAGE.name)


def needs(results: Path = RESULTS) -> str:
    """A row for each notebook: minutes and GB on each subject at laptop scale, and the budgets of the others."""
    header = ["notebook", "embedded, measured", "gemma, computed", "hub, computed", "smoke, stated", "paper, stated"]
    rows = [[*_row(number_of(path), path.name, Path(results)), *stated(path)] for path in find()]
    return markdown_table(header, rows)


def stated(path: Path) -> list[str]:
    """What a notebook's budget says of smoke and of paper scale, to the first comma; what it computes is left open."""
    code = "\n".join(cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code")
    calls = (node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call))
    budget = next(call for call in calls if ast.unparse(call.func) == "run.budget")
    said = {each.arg: ast.unparse(each.value).lstrip("f").strip("'") for each in budget.keywords}
    return [re.split("[,:]", re.sub("{.*?}", "…", said[scale]))[0] for scale in ("smoke", "paper")]


def _row(name: str, file: str, results: Path) -> list[str]:
    link, path = f"[{name}]({file})", results / "embedded-laptop" / f"{name}.json"
    if not path.exists():
        return [link, *["not run"] * 3]
    run = json.loads(path.read_text(encoding="utf-8"))
    own = f"{number(run['minutes'])} min, {number(run['peak_memory_gb'])} GB"
    if name in SINGLE:
        return [link, own, *(_cell(carried_over(run, "docs-gpt2", model, 1)) for model in ("gemma3", "gpt2"))]
    if name in PAIR:
        return [link, own, *(_cell(carried_over(run, "docs-gemma2-base", model, 2)) for model in ("gemma3", "gemma2"))]
    return [link, own, "as embedded", "as embedded"]


def _cell(cost: tuple[float, float]) -> str:
    return f"{cost[0]:,.0f} min, {cost[1]:,.0f} GB"


def carried_over(run: dict, embedded: str, name: str, n_models: int) -> tuple[float, float]:
    """Minutes and GB of a stored run on `n_models` of another model, by the formula at the module's head."""
    ours, theirs, spent = sizes(embedded), sizes(name), run["minutes_spent_on"]
    w, m = theirs.width / ours.width, theirs.below / ours.below
    fixed, training = sum(spent.get(kind, 0) for kind in ("set-up", "figures")), spent.get("training", 0)
    minutes = fixed + w * training + m * (sum(spent.values()) - fixed - training)
    return minutes, w * run["peak_memory_gb"] + n_models * BYTES[name] * theirs.all / 2**30


@cache
def sizes(name: str) -> Sizes:
    """Of an embedded subject, or of one of the hub's architectures; no memory is taken for weights."""
    makes = {"gpt2": GPT2Config, "gemma2": Gemma2Config, "gemma3": lambda: Gemma3TextConfig(**SIZES_OF_GEMMA_3)}
    config = makes[name]() if name in makes else AutoConfig.from_pretrained(MODELS / name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    inner = model.base_model
    blocks = inner.h if hasattr(inner, "h") else inner.layers
    return Sizes(config.hidden_size, BLOCKS[name] * _count(blocks[0]), _count(model))


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def papers() -> str:
    """What the papers' own runs would take of one device."""
    rows = [{"run": name} | plan(run, [1]).reset_index().iloc[0].to_dict() for name, run in PAPERS.items()]
    table = pd.DataFrame(rows)[["run", "state GB", "memory GB", "seconds", "days"]]
    return _numbers(table)


def planned() -> str:
    """The plan of the 16-million-latent run, a row for each number of processes."""
    table = plan(PAPERS["GPT-4, 16 million"], PROCESSES, H100)
    return _numbers(table.reset_index())


def steps(results: Path = RESULTS) -> str:
    """Steps as planned and as measured, by one process and by two."""
    file = Path(results) / "paper_scale.json"
    if not file.exists():
        return "Not run yet."
    found = json.loads(file.read_text(encoding="utf-8"))
    rows = [{"processes": int(n)} | row for n, each in found["processes"].items() for row in each]
    low, high = (f(row["ratio"] for row in rows) for f in (min, max))
    about = f"Measured on {found['hardware']}, torch {found['torch']}, commit {found['commit']}"
    return f"{about}: a step took {low:.1f} to {high:.1f} times its plan.\n\n{_numbers(pd.DataFrame(rows))}"


def _numbers(table: pd.DataFrame) -> str:
    def cell(x: float | int | str) -> str:
        return x if isinstance(x, str) else f"{x:,.3g}" if isinstance(x, float) else f"{x:,}"

    cells = [[cell(x) for x in row] for row in table.itertuples(index=False)]
    return markdown_table(list(table.columns), cells)
