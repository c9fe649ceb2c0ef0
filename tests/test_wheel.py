"""A wheel, installed where there is no clone: what a user of the library has. The packages that m2kit needs come from this environment."""
import os, shutil, subprocess, sys, zipfile
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[1]
TURNS = "What brings you here today?\nHow long have you had it?\nDo you take any medicines?\nGoodbye.\n"
pytestmark = pytest.mark.slow


def pip(*words, **kw):
    r = subprocess.run([sys.executable, "-m", "pip", *map(str, words)], capture_output=True, text=True, **kw)
    assert r.returncode == 0, r.stdout + r.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "Built in a copy, so that nothing of an older build gets in; with a file of evidence, which must stay out."
    here = tmp_path_factory.mktemp("build")
    for name in ("m2kit", "data"): shutil.copytree(ROOT/name, here/name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "settings.ini", "pyproject.toml", "README.md", "LICENSE"): shutil.copy(ROOT/name, here/name)
    (here/"data/evidence/fig05").mkdir(parents=True, exist_ok=True)
    (here/"data/evidence/fig05/metrics.jsonl").write_text("{}\n")
    pip("wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", here/"dist", here)
    return next((here/"dist").glob("*.whl"))


def test_what_is_in_it(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert not [n for n in names if "evidence" in n.split("/")]
    data = {p.relative_to(ROOT/"data").as_posix() for p in (ROOT/"data").rglob("*") if p.is_file()}
    assert {f"m2kit/_data/{n}" for n in data if not n.startswith("evidence/")} <= set(names)
    modules = {f"m2kit/{p.relative_to(ROOT/'m2kit').as_posix()}" for p in (ROOT/"m2kit").rglob("*.py")}
    assert modules <= set(names) and not [n for n in names if n.startswith(("nbs/", "tests/"))]
    assert wheel.stat().st_size < 16e6


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    "A function that runs a command with the wheel, in a folder where nothing is."
    site, away = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("away")
    pip("install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel)
    env = {k: v for k, v in os.environ.items() if not k.startswith("M2KIT_")} | dict(PYTHONPATH=str(site))
    def run(*words, stdin="", python=("-m", "m2kit")):
        command = [sys.executable, *python, *map(str, words)]
        r = subprocess.run(command, cwd=away, env=env, input=stdin, capture_output=True, text=True, timeout=600)
        assert r.returncode == 0, r.stdout + r.stderr
        return r.stdout
    assert run(python=("-c", "import m2kit; print(m2kit.__file__)")).strip() == str(site/"m2kit/__init__.py")
    run.folder = away
    return run


def test_check(installed):
    code = "import random; from m2kit.clinic.synthesize import draw_case; draw_case(random.Random(0)).dump('case.json')"
    installed(python=("-c", code))
    assert "case, 1 read, all well" in installed("check", "case.json")


def test_consult(installed):
    said = installed("consult", "--condition", "gout", "--save", "talk.jsonl", stdin=TURNS)
    assert said.count("patient>") >= 3 and "gate:" in said and "the script's diagnosis: gout" in said
    assert (installed.folder/"talk.jsonl").exists()


def test_healthbench(installed):
    said = installed("healthbench", "--model", "tiny:doctor", "--grader", "clauses", "--rows", "clinic:6", "--out", "run")
    assert "overall_score" in said and (installed.folder/"run/result.json").exists()


def test_the_book_needs_a_clone(installed):
    code = """from m2kit.core.errors import UserError
from m2kit.reproduce.pipeline import reproduce
try: reproduce()
except UserError as e: print(e)"""
    assert "run this in a clone of the repository, not from an installed wheel" in installed(python=("-c", code))
