"""Every chapter is its own test: its examples run from top to bottom, in a process of its own. (Exhibits are run by `make reproduce`, lessons by test_lessons.)"""
import json, os, re
from pathlib import Path
import pytest
from m2kit.reproduce.touched import run_chapter, run_forked

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = [*(p for p in sorted((ROOT/"nbs").glob("*/*.ipynb")) if p.parent.name not in ("exhibits", "lessons")), ROOT/"nbs"/"index.ipynb"]
name = lambda p: p.relative_to(ROOT/"nbs").with_suffix("").as_posix()

# Libraries that choose the older instructions of another CPU: sums are then taken in another order, and their last bits differ.
OTHER_CPUS = [
    dict(ATEN_CPU_CAPABILITY="default"),
    dict(MKL_CBWR="COMPATIBLE"),
    dict(ATEN_CPU_CAPABILITY="default", MKL_CBWR="COMPATIBLE"),
]


def sources(path):
    return ["".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]


SLOW = [p for p in CHAPTERS if any(re.search(r"^#\s*\|\s*slow\s*$", s, re.M) for s in sources(p))]


@pytest.mark.parametrize("path", CHAPTERS, ids=name)
def test_chapter(path):
    passed, said = run_forked(path)
    assert passed, said


@pytest.mark.slow
@pytest.mark.parametrize("path", SLOW, ids=name)
def test_chapter_with_its_slow_cells(path):
    passed, said = run_forked(path, "slow", timeout=1800)
    assert passed, said


@pytest.mark.long
@pytest.mark.parametrize("path", CHAPTERS, ids=name)
@pytest.mark.parametrize("cpu", OTHER_CPUS, ids=lambda cpu: "+".join(f"{k}={v}" for k, v in cpu.items()))
def test_chapter_on_another_cpu(path, cpu):
    passed, said = run_chapter(path, timeout=1200, env={**os.environ, **cpu})
    assert passed, said


def test_a_notebooks_own_loop_is_not_started_again():
    "In JupyterLab and under papermill a loop is running, and `asyncio.run` refuses: it gets a thread, `pool.submit(asyncio.run, work)`."
    assert not [name(p) for p in CHAPTERS for s in sources(p) if re.search(r"(?m)^[^#\n]*\basyncio\.run\(", s)]
