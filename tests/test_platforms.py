"""Other machines, as far as this one can play them: a Python that is too new, a folder called m2kit beside a script, and Windows: no `make`, no fork, its old code page, paths with
spaces and letters."""
import importlib.util, json, os, re, shutil, subprocess, sys, sysconfig
from configparser import ConfigParser
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[1]
WINDOWS = """import builtins, io, multiprocessing, os
for name in ("sched_getaffinity", "fork", "forkpty", "getpgid", "killpg", "setsid", "mkfifo"): vars(os).pop(name, None)
multiprocessing.set_start_method("spawn")

plain_import, plain_open = builtins.__import__, io.open
def only_what_windows_has(name, globals=None, *rest, **more):
    "What the package itself imports; the packages it needs have other code for Windows, which is not here."
    if name in ("fcntl", "resource", "pwd", "grp", "termios", "tty", "readline") and str((globals or {}).get("__name__")).startswith(("m2kit", "__main__")):
        raise ModuleNotFoundError(f"Windows has no {name}")
    return plain_import(name, globals, *rest, **more)
def in_its_code_page(file, mode="r", buffering=-1, encoding=None, *rest, **more):
    "Text without a named encoding is Windows-1252."
    if "b" not in mode and encoding in (None, "locale"): encoding = "cp1252"
    return plain_open(file, mode, buffering, encoding, *rest, **more)
builtins.__import__, builtins.open, io.open = only_what_windows_has, in_its_code_page, in_its_code_page
"""


def said(*words, python=sys.executable, **kw):
    "Status, and all that was printed."
    # A `make` that runs these tests hands its flags to any `make` below it, which then also says where it is.
    env = {k: v for k, v in (kw.pop("env", None) or os.environ).items() if k not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    r = subprocess.run([str(w) for w in words if w], capture_output=True, text=True, encoding="utf-8", errors="replace", timeout=600, env=env, **kw)
    return r.returncode, r.stdout + r.stderr


# --- Python's version

def test_pip_refuses_a_python_without_wheels():
    "pip reads this before it installs anything, and says it in one line."
    cfg = ConfigParser(delimiters=["="])
    cfg.read(ROOT/"settings.ini", encoding="utf-8")
    status, wanted = said(sys.executable, "-c", "import setuptools; setuptools.setup = lambda **kw: print(kw['python_requires']); exec(open('setup.py').read())", cwd=ROOT)
    assert status == 0, wanted
    good = SpecifierSet(wanted.strip())
    assert [v for v in ("3.10.14", "3.11.0", "3.12.1", "3.13.0", "3.14.2", "3.15.0", "3.15.0rc1") if good.contains(v, prereleases=True)] == ["3.11.0", "3.12.1", "3.13.0", "3.14.2"]


@pytest.mark.skipif(not shutil.which("make"), reason="no make here")
@pytest.mark.parametrize("version, good", [((3, 10, 9), False), ((3, 11, 0), True), ((3, 14, 1), True), ((3, 15, 0), False)])
def test_make_refuses_it_before_anything_is_installed(version, good, tmp_path):
    "A Python that says of itself that it is another; as a good one it is asked for a venv next, which this one cannot make."
    for name in ("Makefile", "settings.ini", "constraints.txt", "setup.py", "pyproject.toml"): shutil.copy(ROOT/name, tmp_path)
    python = tmp_path/"python"
    python.write_text(f"""#!/bin/sh
[ "$1" = -c ] || {{ echo asked for "$@"; exit 3; }}
exec '{sys.executable}' -c "import sys; sys.version_info = ({', '.join(map(str, version))}, 'final', 0)
$2"
""")
    python.chmod(0o755)
    status, text = said("make", "reproduce", f"PYTHON={python}", cwd=tmp_path)
    assert status == 2 and not (tmp_path/".venv").exists()
    if good: assert "asked for -m venv .venv" in text and "name another" not in text
    else: assert text.splitlines()[0] == f"{python} is absent, or no Python 3.11, 3.12, 3.13 or 3.14; name another with PYTHON=" and "asked for" not in text


# --- a folder called m2kit beside a script

@pytest.mark.slow
def test_a_script_beside_the_clone_finds_the_package(tmp_path):
    "Installed in place, as the README says, in a clone that is called as the package; the script's own folder comes first on the path."
    clone = tmp_path/"sp ace"/"m2kit"
    for name in ("m2kit", "data"): shutil.copytree(ROOT/name, clone/name, ignore=shutil.ignore_patterns("__pycache__", "evidence"))
    for name in ("setup.py", "settings.ini", "pyproject.toml", "README.md", "LICENSE"): shutil.copy(ROOT/name, clone/name)
    (clone/"nbs").mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path/"venv"], check=True)
    python = tmp_path/"venv"/("Scripts/python.exe" if os.name == "nt" else "bin/python")
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip())
    (site/"zz_others.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")      # the other packages, after this one's own
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    status, text = said(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-build-isolation", "-e", clone, env=env)
    assert status == 0, text
    script = clone.parent/"script.py"
    script.write_text("import m2kit; from m2kit.clinic.knowledge import conditions; from m2kit.core.run import data_dir\nprint(m2kit.__file__, data_dir(), len(conditions()), sep='\\n')")
    status, text = said(python, script, cwd=clone.parent, env=env)
    assert status == 0, text
    file, data, n = text.split("\n")[:3]
    assert (Path(file), Path(data)) == (clone/"m2kit"/"__init__.py", clone/"data") and int(n) > 5


# --- Windows

@pytest.fixture(scope="module")
def windows(tmp_path_factory):
    "A function that runs a command as Windows' Python would: no fork, its old code page, a path with spaces and letters, no `make`."
    place = tmp_path_factory.mktemp("Program Files")/"Jürgen 家"
    (place/"site").mkdir(parents=True)
    (place/"site"/"sitecustomize.py").write_text(WINDOWS)
    env = dict(os.environ, LC_ALL="C.UTF-8",        # names of files are Unicode there
        PYTHONPATH=os.pathsep.join([str(place/"site"), str(ROOT)]), PYTHONUTF8="0", PYTHONIOENCODING="cp1252:strict", M2KIT_RUNS=str(place/"runs"), PATH=str(place))         # nothing to start: no make, no git
    def run(*words, code=None, **kw):
        r = subprocess.run([sys.executable, *(("-c", code) if code else ("-m", "m2kit")), *map(str, words)], capture_output=True, cwd=place, env=env, timeout=600, **kw)
        return r.returncode, (r.stdout + r.stderr).decode("cp1252", "replace")
    run.place = place
    return run


def test_what_windows_lacks_is_lacking(windows):
    "The stage itself: without it the tests below would say nothing."
    status, text = windows(code="import multiprocessing, os, shutil, sys; print(hasattr(os, 'fork'), multiprocessing.get_start_method(), sys.stdout.encoding, shutil.which('make'), open('x', 'w').encoding); import fcntl")
    assert status == 1 and text.startswith("False spawn cp1252 None cp1252") and "Windows has no fcntl" in text, text


def test_every_module_imports_on_windows(windows):
    status, text = windows(code="import pkgutil, importlib, m2kit\nfor m in pkgutil.walk_packages(m2kit.__path__, 'm2kit.'): importlib.import_module(m.name)\nprint('all')")
    assert status == 0 and text.strip().endswith("all"), text


def test_the_commands_of_a_windows_reader(windows):
    "Looked at, listed, checked, scored, and asked for help; the files have letters in their names and in them."
    rows = windows.place/"Zürich rows 家.jsonl"
    verdicts = [dict(criteria_met=True, explanation="sí, 好")]
    row = dict(prompt_id="é家", prompt=[dict(role="user", content="fièvre ≥ 39 °C 家")], completion="Drink → rest.", rubrics=[dict(criterion="Says rest", points=5, tags=["axis:x"])], example_tags=["theme:家"], verdicts=verdicts)
    for codec in ("utf-8", "utf-8-sig", "utf-16"):              # Notepad's, PowerShell's
        rows.write_bytes(json.dumps(row, ensure_ascii=False).replace("\n", "\r\n").encode(codec))
        assert windows("check", rows)[0] == 0 and windows("score", rows)[0] == 0
    status, text = windows("healthbench", "--model", "recorded", "--grader", "recorded", "--rows", rows, "--out", windows.place/"out ö")
    assert status == 0 and "theme:\\u5bb6" in text, text                               # no letter for it: an escape
    assert "fièvre ≥ 39" in (windows.place/"out ö"/"pages"/"00001.html").read_text(encoding="utf-8")
    for words in (["doctor"], ["exhibits"], ["steps"], ["--help"], ["recipes", "--out", windows.place/"recipes ü"]):
        status, text = windows(*words)
        assert status == 0 and "Traceback" not in text, text
    status, text = windows("check", windows.place/"keine Datei 家.json")
    assert status == 2 and text.count("\n") == 1 and "\\u5bb6.json: cannot be read" in text, text


def test_a_consultation_on_windows(windows):
    "Questions typed into a file are UTF-8; another code page is told, and so is UTF-16."
    said = "What brings you here, Señora 家?\r\nGoodbye.\r\n"
    status, text = windows("consult", "--condition", "gout", "--save", windows.place/"talk ü.jsonl", input=said.encode("utf-8-sig"))
    assert status == 0 and "the script's diagnosis: gout" in text, text
    assert "Señora 家?" in (windows.place/"talk ü.jsonl").read_text(encoding="utf-8")
    for codec in ("cp1252", "utf-16"):
        status, text = windows("consult", "--condition", "gout", input="Señora?\r\n".encode(codec))
        assert status == 2 and text.splitlines()[-1].startswith("m2kit: standard input: not UTF-8") and "Traceback" not in text, text


def test_jobs_side_by_side_without_fork(windows):
    "Workers are started anew, from a script as from a notebook."
    script = windows.place/"mehr Kerne.py"
    script.write_text("from m2kit.core.jobs import run_jobs\nif __name__ == '__main__': print(run_jobs('builtins:dict', [dict(a=1), dict(a=2)], workers=2))")
    status, text = windows(code=f"import runpy; runpy.run_path(r'{script}', run_name='__main__')")
    assert status == 0 and "[{'a': 1}, {'a': 2}]" in text, text


# --- the README's own commands

def commands_for_windows():
    "What a Windows reader is told to type."
    text = (ROOT/"README.md").read_text(encoding="utf-8")
    block = re.search(r"```bat\n(.*?)```", text, re.S)
    return [line.split("&:")[0].split("  ")[0].strip() for line in block[1].splitlines() if line.strip()]


def test_the_readme_tells_windows_readers_what_to_type():
    lines = commands_for_windows()
    assert lines[0].startswith("py -3.") and "-m venv .venv" in lines[0] and "pip install -c constraints.txt -e" in lines[1]
    assert all(line.startswith((r".venv\Scripts\python -m ", "py -3.")) for line in lines) and len(lines) >= 5 and not [line for line in lines if "make" in line or "'" in line]


@pytest.mark.parametrize("line", [line for line in commands_for_windows() if " -m m2kit " in line])
def test_each_of_them_runs(line, windows):
    "As they stand, but for the folder of Python; what takes longer than a minute is asked for its help."
    words = line.split(" -m m2kit ")[1].split()
    quick = words[0] in ("doctor", "check", "exhibits")
    status, text = windows(*(words if quick else [words[0], "--help"]), **({} if quick else {}))
    assert status == 0 and (quick or not (set(w for w in words if w.startswith("--")) - set(re.findall(r"--[a-z-]+", text)))), text


def test_modules_the_readme_names_are_there():
    for line in commands_for_windows():
        if m := re.search(r" -m ([a-z0-9_]+)", line): assert m[1] in ("venv", "pip") or importlib.util.find_spec(m[1]), line
