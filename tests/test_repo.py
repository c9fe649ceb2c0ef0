"""The repository agrees with itself: package with notebooks, README with index, notebooks clean, nothing astray. `make check` runs this file."""
import ast, json, os, shutil, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
NOTEBOOKS = sorted(p for p in (ROOT/"nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
TOP = {"nbs", "m2kit", "settings.ini", "data", "figures", "tests", "README.md",                        # the book
       "Makefile", "pyproject.toml", "setup.py", "LICENSE", "constraints.txt", ".gitattributes", ".gitignore", ".ci"}  # the usual small files
ids = lambda p: str(p.relative_to(ROOT))

def sh(*cmd, cwd=ROOT):
    r = subprocess.run([str(c) for c in cmd], cwd=cwd, capture_output=True, text=True, env={**os.environ, "IN_TEST": ""})
    assert r.returncode == 0, f"{' '.join(map(str, cmd))}\n{r.stdout}\n{r.stderr}"
    return r.stdout

@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "The notebooks and what nbdev reads with them, in a folder of their own."
    to = tmp_path_factory.mktemp("repo")
    shutil.copytree(ROOT/"nbs", to/"nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    for f in ("settings.ini", "pyproject.toml", "setup.py", "README.md"): shutil.copy(ROOT/f, to/f)
    (to/"m2kit").mkdir()
    shutil.copy(ROOT/"m2kit/__init__.py", to/"m2kit/__init__.py")
    return to

def sources(folder): return {str(p.relative_to(folder)): p.read_text(encoding="utf-8") for p in sorted(folder.rglob("*.py"))}

def test_package_is_what_the_notebooks_export(copy):
    sh(BIN/"nbdev_export", cwd=copy)
    ours, fresh = sources(ROOT/"m2kit"), sources(copy/"m2kit")
    assert len(fresh) > 3
    assert ours.keys() == fresh.keys(), f"only in m2kit/: {ours.keys() - fresh.keys()}; only exported: {fresh.keys() - ours.keys()}; run: make export"
    assert not (differ := [n for n in ours if ours[n] != fresh[n]]), f"edited by hand or not exported: {differ}; run: make export"

def test_notebooks_are_clean(copy):
    sh(BIN/"nbdev_clean", cwd=copy)
    dirty = [ids(p) for p in NOTEBOOKS if p.read_bytes() != (copy/p.relative_to(ROOT)).read_bytes()]
    assert NOTEBOOKS and not dirty, f"nbdev_clean changes {dirty}; run: make export"

def test_readme_is_the_index(tmp_path):
    sh("make", "-s", "_readme", f"README={tmp_path/'README.md'}", f"BIN={BIN}")
    assert (ROOT/"README.md").read_text(encoding="utf-8") == (tmp_path/"README.md").read_text(encoding="utf-8"), "README.md is not nbs/index.ipynb; run: make readme"

def test_top_level():
    if not (ROOT/".git").exists(): pytest.skip("not a git checkout")
    tracked = {f.split("/")[0] for f in sh("git", "ls-files").splitlines()}
    assert not (astray := tracked - TOP), f"does not belong at the top level: {sorted(astray)}"

def test_git_merges_notebooks_by_cell():
    assert "*.ipynb merge=nbdev-merge" in (ROOT/".gitattributes").read_text().splitlines()

@pytest.mark.parametrize("path", NOTEBOOKS, ids=ids)
def test_notebook_opens_with_title_and_blockquote(path):
    first = json.loads(path.read_text(encoding="utf-8"))["cells"][0]
    lines = [l for l in "".join(first["source"]).splitlines() if l.strip()]
    assert first["cell_type"] == "markdown" and len(lines) > 1 and lines[0].startswith("# ") and lines[1].startswith("> "), "a notebook opens with an H1 and a one-line blockquote"

@pytest.mark.parametrize("path", NOTEBOOKS, ids=ids)
def test_notebook_has_no_outputs(path):
    code = [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    assert not [c for c in code if c["outputs"] or c["execution_count"]], "clear the outputs: they belong in figures/"

def unsafe(tree):
    "What could run code from a downloaded file: pickle, torch.load, trust_remote_code."
    for n in ast.walk(tree):
        if isinstance(n, ast.Import): yield from (a.name for a in n.names if a.name.split(".")[0] in ("pickle", "dill", "joblib", "cloudpickle"))
        if isinstance(n, ast.ImportFrom) and (n.module or "").split(".")[0] in ("pickle", "dill", "joblib", "cloudpickle"): yield n.module
        if isinstance(n, ast.Attribute) and n.attr == "load" and getattr(n.value, "id", "") == "torch": yield "torch.load"
        if isinstance(n, ast.keyword) and n.arg == "trust_remote_code" and not (isinstance(n.value, ast.Constant) and n.value.value is False): yield n.arg

def test_nothing_unpickles_or_trusts_remote_code():
    assert set(unsafe(ast.parse("import pickle\ntorch.load(p)\nf(trust_remote_code=True)"))) == {"pickle", "torch.load", "trust_remote_code"}  # it does see them
    found = {n: bad for n, src in sources(ROOT/"m2kit").items() if (bad := list(unsafe(ast.parse(src))))}
    assert not found, f"load safetensors, and no remote code: {found}"
