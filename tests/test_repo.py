"""The repository agrees with itself: package with notebooks, README with index, notebooks clean, nothing astray. `make check` runs this file.

Some rules are younger than the code. What still breaks them stands in tests/allowed.toml, which only gets shorter: a test fails on anything
that is not there. `python tests/test_repo.py` takes out what is mended.
"""
import ast, collections, json, os, re, shutil, subprocess, sys, tomllib
from pathlib import Path
import pytest
from m2kit.reproduce.outputs import kept_outputs, output_bytes
from m2kit.reproduce.site import repo_links

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
NOTEBOOKS = sorted(p for p in (ROOT/"nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
TOP = {"nbs", "m2kit", "settings.ini", "data", "figures", "tests", "README.md",                        # the book
       "Makefile", "pyproject.toml", "setup.py", "LICENSE", "constraints.txt", ".gitattributes", ".gitignore", ".ci",  # the usual small files
       "CITATION.cff", "CONTRIBUTING.md", "CHANGELOG.md", "environment.yml", ".github"}
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
    sh("make", "-s", "_convert", f"README={tmp_path/'README.md'}", f"BIN={BIN}")
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

# Outputs are committed, small: `m2kit outputs` takes them from the run that redoes the book. Bytes: of one notebook, of all of them.
MOST, ALL = 400_000, 12_000_000

@pytest.mark.parametrize("path", NOTEBOOKS, ids=ids)
def test_outputs_are_small_and_neutral(path):
    nb = json.loads(path.read_text(encoding="utf-8"))
    code = [c for c in nb["cells"] if c["cell_type"] == "code"]
    assert not [c for c in code if c["execution_count"]], "clear the counts: make export"
    assert output_bytes(nb) <= MOST, f"{output_bytes(nb):,} bytes of outputs: show less, or a smaller picture"
    mine = [c["outputs"] for c in code if kept_outputs(c["outputs"], pictures=False) != c["outputs"]]
    assert not mine, f"not as m2kit outputs leaves them (stderr, a folder of this machine, a long text): {str(mine)[:500]}"

def test_all_outputs_together_are_small():
    sizes = {ids(p): output_bytes(json.loads(p.read_text(encoding="utf-8"))) for p in NOTEBOOKS}
    assert sum(sizes.values()) <= ALL, sorted(sizes.items(), key=lambda s: -s[1])[:10]

def test_links_of_notebooks_lead_somewhere():
    cells = [(p, "".join(c["source"])) for p in NOTEBOOKS for c in json.loads(p.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "markdown"]
    linked = [(ids(p), f) for p, text in cells for f in repo_links(text, str(p.parent.relative_to(ROOT)))]
    lost = [l for l in linked if not (ROOT/l[1]).exists() and not l[1].startswith("figures/")]      # figures come from a run
    assert len(linked) > 100 and not lost, lost

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

# Rooms: who may import what. Each imports only from those to its right, and from itself.
ROOMS = "reproduce service evaluate tiny infer train rubrics simulator knowledge clinic lm core".split()
# Packages that a function may import when it is called: they take long to load, or come with an extra.
HEAVY = set("torch transformers PIL cycler httpx2 nbdev tokenizers safetensors numpy pandas matplotlib scipy IPython huggingface_hub papermill nbconvert nbformat ipywidgets rich jinja2 psutil openai "
            "sphinx docutils packaging accelerate bitsandbytes compressed_tensors datasets fastapi fhir peft ray sklearn starlette trl unsloth uvicorn verl vllm yaml".split())
LONG = 140      # characters of a line of code

def modules():
    "Syntax tree of every module of the package, by dotted name below m2kit."
    found = {".".join(p.relative_to(ROOT/"m2kit").with_suffix("").parts): p for p in (ROOT/"m2kit").rglob("*.py")}
    return {n: ast.parse(p.read_text(encoding="utf-8")) for n, p in found.items() if not n.endswith("__init__") and n not in ("_modidx", "__main__")}

def imports(name, tree):
    "(absolute module, imported name, the functions around it) for every import in a module."
    package = ("m2kit." + name).split(".")[:-1]
    def visit(node, inside):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ImportFrom):
                base = ".".join([*package[:len(package) - child.level + 1], *filter(None, [child.module])]) if child.level else child.module
                yield from ((base, a.name, inside) for a in child.names)
            elif isinstance(child, ast.Import): yield from ((a.name, "", inside) for a in child.names)
            function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
            yield from visit(child, (*inside, child) if function else inside)
    return visit(tree, ())

def named(tree):
    "Modules that stand in strings: an argument of `import_module`, a table of 'm2kit.lm.open:open_model'."
    strings = (n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str))
    return {m[1] for s in strings if (m := re.fullmatch(r"(m2kit(?:\.\w+)+)(?::\w+)?", s))}

def room(module): return module.removeprefix("m2kit.").split(".")[0]

def is_command(function):
    "Whether it is the body of a command of `m2kit`."
    return any(getattr(getattr(d, "func", None), "id", "") == "command" for d in function.decorator_list)

def upward(trees):
    "Imports, or modules named in strings, of a room further up."
    for name, tree in trees.items():
        for module in {m for m, _, _ in imports(name, tree)} | named(tree):
            if module.startswith("m2kit.") and {room(module), room(name)} <= set(ROOMS) and ROOMS.index(room(module)) < ROOMS.index(room(name)):
                yield f"{name} -> {module.removeprefix('m2kit.')}"

def private(trees):
    "Names with an underscore that belong to another module."
    for name, tree in trees.items():
        for module, what, _ in imports(name, tree):
            if module.startswith("m2kit.") and what.startswith("_") and not what.startswith("__") and module != f"m2kit.{name}":
                yield f"{name} -> {module.removeprefix('m2kit.')}.{what}"

def exported(tree):
    "What `__all__` lists."
    return next((ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__all__"), [])

def shared(trees):
    "Names that more than one module exports."
    homes = collections.defaultdict(list)
    for name, tree in trees.items():
        for e in exported(tree): homes[e].append(name)
    return {n for n, where in homes.items() if len(where) > 1}

def weighty(trees):
    "Modules of ours that load a heavy package as soon as they are imported, themselves or through others."
    top = {n: {m if m.removeprefix("m2kit.") in trees else f"{m}.{what}" for m, what, inside in imports(n, t) if not inside} for n, t in trees.items()}
    found = {n for n, ms in top.items() if any(m.split(".")[0] in HEAVY for m in ms)}
    while more := {n for n, ms in top.items() if n not in found and any(m.removeprefix("m2kit.") in found for m in ms)}: found |= more
    return found

def late(trees):
    "Imports inside functions: neither of something heavy, nor in a command or in the chapter of commands."
    heavy = HEAVY | {f"m2kit.{n}" for n in weighty(trees)}
    for name, tree in trees.items():
        for module, what, inside in imports(name, tree):
            if not inside or name == "reproduce.cli" or any(map(is_command, inside)): continue
            if not {module, module.split(".")[0], f"{module}.{what}"} & heavy: yield f"{name}.{inside[0].name} -> {module.removeprefix('m2kit.')}"

def long_lines():
    "Lines of code over `LONG` characters, by notebook."
    for p in NOTEBOOKS:
        cells = json.loads(p.read_text(encoding="utf-8"))["cells"]
        lines = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code").split("\n")
        if n := sum(len(l) > LONG for l in lines): yield ids(p), n

RULES = dict(upward=upward, private=private, shared=shared, late=late)

def allowed():
    return tomllib.loads((ROOT/"tests/allowed.toml").read_text(encoding="utf-8"))

def broken():
    "What breaks each rule now; long lines by notebook."
    trees = modules()
    return {name: sorted(set(rule(trees))) for name, rule in RULES.items()} | dict(long=dict(long_lines()))

HELP = dict(
    upward="imports only point down the list of rooms: move what both need further down, or let the upper room register itself",
    private="make the name public where it belongs, or do without it",
    shared="one name, one thing: give one of them another name, or import it from the other",
    late="import at the top; in functions only heavy packages, and in commands")

@pytest.fixture(scope="module")
def now(): return broken()

@pytest.mark.parametrize("rule", RULES)
def test_rule(rule, now):
    new = set(now[rule]) - set(allowed()[rule])
    assert not new, f"{sorted(new)}: {HELP[rule]}"

def test_lines_fit(now):
    longer = {n: f"{count}, at most {allowed()['long'].get(n, 0)}" for n, count in now["long"].items() if count > allowed()["long"].get(n, 0)}
    assert not longer, f"lines of code over {LONG} characters, by notebook: {longer}; wrap them at about 100"

def test_rules_see_what_they_are_for():
    trees = {"lm.a": ast.parse("from ..train.b import f\nT = dict(x='m2kit.tiny.c:g')\n__all__ = ['x', 'y']"),
             "train.b": ast.parse("from ..lm.a import _p\n__all__ = ['y']\ndef f():\n  import torch\n  import json\n@command('x')\ndef g():\n  import json")}
    assert set(upward(trees)) == {"lm.a -> train.b", "lm.a -> tiny.c"} and set(private(trees)) == {"train.b -> lm.a._p"}
    assert shared(trees) == {"y"} and set(late(trees)) == {"train.b.f -> json"}
    assert weighty(dict(a=ast.parse("import torch"), b=ast.parse("from .a import x"), c=ast.parse("def f():\n  import torch"))) == {"a", "b"}

def write_allowed():
    "Write down what breaks the rules now, but nothing that was not allowed: the lists only get shorter."
    before, now = allowed(), broken()
    lines = ["# What breaks a rule of tests/test_repo.py that is younger than the code. These lists only get shorter."]
    for rule in RULES: lines += [f"{rule} = [", *(f"    {json.dumps(x)}," for x in now[rule] if x in before[rule]), "]"]
    lines += ["", f"[long]  # lines of code over {LONG} characters", *(f"{json.dumps(n)} = {min(c, before['long'][n])}" for n, c in sorted(now["long"].items()) if n in before["long"])]
    (ROOT/"tests/allowed.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")

if __name__ == "__main__": write_allowed()
