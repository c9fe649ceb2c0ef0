"Every name in the glossary's last column is there, and every lesson is linked."
import importlib, inspect, json, re
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[1]
GLOSSARY = ROOT/"nbs/lessons/glossary.ipynb"
TEXT = "\n".join("".join(c["source"]) for c in json.loads(GLOSSARY.read_text(encoding="utf-8"))["cells"])
ROWS = [line for line in TEXT.splitlines() if line.startswith("| ") and not line.startswith("| ---")]
NAMES = sorted({n for row in ROWS for n in re.findall(r"`([a-z_0-9]+\.[A-Za-z_0-9.]+(?:\(\w+\))?)`", row.rsplit(" | ", 1)[1])})


def found(name):
    "Whether a module of the package holds this name, with that argument."
    path, _, argument = name.rstrip(")").partition("(")
    room, module, *rest = path.split(".")
    value = importlib.import_module(f"m2kit.{room}.{module}")
    for part in rest:
        if not hasattr(value, part): return part in getattr(value, "__annotations__", {}) and part == rest[-1]
        value = getattr(value, part)
    return not argument or argument in inspect.signature(value).parameters


@pytest.mark.parametrize("name", NAMES)
def test_name_is_there(name): assert found(name)


def test_a_name_that_is_not_there_is_seen():
    assert len(NAMES) > 70
    assert not found("train.grpo.group_advantages") and not found("train.grpo.group_advantage(reward)") and found("train.grpo.Rollout.ids")


def test_rows_have_all_their_columns():
    tables = re.findall(r"(?m)^\|(.+)\|\n\|[ |-]+\|\n((?:\|.+\|\n?)+)", TEXT)
    assert len(tables) >= 8
    for head, body in tables:
        for row in body.strip().splitlines(): assert row.count(" | ") == head.count(" | "), row


def test_every_lesson_is_linked():
    for p in (ROOT/"nbs/lessons").glob("[0-9]*.ipynb"): assert f"({p.name})" in TEXT, p.name
