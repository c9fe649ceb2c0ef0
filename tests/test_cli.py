"""The command `m2kit` as a shell sees it."""
import os, random, subprocess, sys
from pathlib import Path
import pytest
from m2kit.reproduce.cli import main

M2KIT = str(Path(sys.executable).with_name("m2kit"))


def m2kit(*argv):
    return subprocess.run([M2KIT, *argv], capture_output=True, text=True, timeout=60)


def test_help_teaches():
    said = m2kit("--help").stdout
    for name in ("reproduce", "exhibits", "doctor"):
        assert name in said
        assert f"    m2kit {name}" in m2kit(name, "--help").stdout      # an example to type


@pytest.mark.parametrize("argv, words", [
    ("reproduce --only fig0l6", "no notebook named 'fig0l6'; did you mean fig06?"),
    ("reproduce --only core/rnu", "did you mean core/run?"),
    ("reproduce --scale hueg", "no scale named 'hueg'"),
    ("reproduce --only fig06 --scale gpu", "not at the scale gpu: fig06 (it has: tiny)"),
    ("reproduce --only fig06 --scale paper", "not at the scale paper"),
    ("reproduce --only fig06 --jobs 0", "0 is not in the range x>=1"),
    ("reproduce --only fig06 --jobs many", "'many' is not a valid integer"),
    ("reproduce --only fig06 --set fig06.sclae=tiny", "did you mean scale?"),
    ("reproduce --only fig06 --set fig06.out=3", "takes a word"),
    ("reproduce --only fig06 --set fig07.out=x", "no notebook among those to run named 'fig07'"),
    ("reproduce --only fig06 --set steps", "write NAME.PARAM=VALUE"),
    ("exhibits --out /no/such/folder", "run m2kit reproduce first"),
    ("doctor --scale big", "no scale named 'big'"),
    ("frobnicate", "No such command 'frobnicate'"),
    ("reproduce --frsh", "Did you mean '--fresh'?"),
])
def test_wrong_input_is_one_line_and_2(argv, words, tmp_path):
    r = subprocess.run([M2KIT, *argv.split()], capture_output=True, text=True, timeout=60, env={**os.environ, "M2KIT_RUNS": str(tmp_path)})
    assert r.returncode == 2 and r.stdout == "" and r.stderr.count("\n") == 1 and r.stderr.startswith("m2kit: "), r
    assert words in r.stderr


def test_doctor():
    r = m2kit("doctor")
    assert "scale tiny" in r.stdout and "scale gpu" in r.stdout
    assert r.returncode == (1 if "! scale tiny" in r.stdout else 0)
    r = m2kit("doctor", "--scale", "gpu")
    assert r.returncode == (1 if "! scale gpu" in r.stdout else 0)


def test_exhibits_lists_what_there_is(tmp_path):
    r = m2kit("exhibits", "--out", str(tmp_path))
    assert r.returncode == 0
    lines = {l.split()[0]: l for l in r.stdout.splitlines() if not l.startswith(" ")}
    assert {"fig06", "fig07", "fig08"} <= set(lines) and "redrawn" in lines["fig06"] and "not run yet" in lines["fig06"]


def test_version():
    import m2kit as kit
    assert m2kit("--version").stdout == f"m2kit {kit.__version__}\n"


# Wrong words beside a model that would take minutes to load: told before it is.

@pytest.fixture
def desk(tmp_path, monkeypatch):
    "A folder with a checkpoint that must not be opened, and some files."
    import m2kit.evaluate.harness, m2kit.lm.open
    from m2kit.clinic.persona import draw_script
    from m2kit.clinic.synthesize import draw_case
    from m2kit.simulator.patient import Transcript, save_transcripts
    def boom(*a, **k): raise AssertionError("a model was opened")
    monkeypatch.setattr(m2kit.lm.open, "open_model", boom)
    monkeypatch.setenv("M2KIT_RUNS", str(tmp_path/"runs"))
    monkeypatch.chdir(tmp_path)
    Path("big").mkdir(); Path("big/config.json").write_text("{}")
    draw_case(random.Random(0)).dump("case.json")
    Path("rows.jsonl").write_text('{"id": 1}\n'); Path("empty.jsonl").touch(); Path("file").touch()
    Path("other").mkdir(); Path("other/run.json").write_text('{"model": {"spec": "tiny:doctor"}, "seed": 0, "physician": null}')
    save_transcripts([Transcript(draw_script(random.Random(7)).id, "you", (), "doctor", {})], "talk.jsonl")
    return tmp_path


@pytest.mark.parametrize("argv, words", [
    ("consult --model big --case case.json --number 9", "--number goes from 1 to 1"),
    ("consult --model big --condition gouty", "gout"),
    ("consult --model big --save talk.jsonl --seed 1", "name another file"),
    ("consult --model big --save file/talk.jsonl", "file is a file, and no folder"),
    ("consult --model big --log /proc/calls.jsonl", "/proc cannot be written to"),
    ("consult --model big --checker tiny:cheker", "did you mean tiny:checker?"),
    ("consult --model big --judge replay:none.jsonl", "none.jsonl: there is no such file"),
    ("consult --model bgi", "bgi is no checkpoint: it has no config.json"),
    ("rubrics --model big --sources none.jsonl --out out.jsonl", "'none.jsonl' does not exist"),
    ("rubrics --model big --sources rows.jsonl --out /proc/out.jsonl", "/proc cannot be written to"),
    ("rubrics --model big --sources rows.jsonl --out out.jsonl --max-tokens 0", "0 is not in the range x>=1"),
    ("rubrics --model big --sources empty.jsonl --out out.jsonl", "no sources in it"),
    ("typed-prompts --model big --items rows.jsonl", "rows.jsonl:1"),
    ("typed-prompts --model big --order backwards", "'backwards' is not one of 'printed', 'shared'"),
    ("pairwise big tiny:docter --judge oracle", "did you mean tiny:doctor?"),
    ("pairwise big big --judge big --rows empty.jsonl", "there is nothing in it"),
    ("pairwise big big --judge big --rows rows.jsonl", "row 1 has no prompt"),
    ("agreement --generated rows.jsonl --experts none.jsonl --referee big", "'none.jsonl' does not exist"),
    ("agreement --generated empty.jsonl --experts empty.jsonl --referee big", "share 0 ids"),
    ("healthbench --model big --grader bgi --rows clinic:3", "bgi is no checkpoint"),
    ("healthbench --model big --grader big --rows none.jsonl", "none.jsonl"),
    ("healthbench --model big --grader big --rows clinic:3 --out file", "file is no folder"),
    ("healthbench --model big --grader big --rows clinic:3 --out other", "other holds another run: another data, grader, lenient, model"),
    ("healthbench --meta-eval --grader big --rows clinic:3 --out other", "other holds another run"),
    ("healthbench --model big --grader recorded --rows clinic:3", "use --model recorded"),
    ("healthbench --meta-eval --grader big --rows clinic:3 --budget 9", "leave out --meta-eval"),
    ("healthbench --model big --grader big --rows clinic:3 --limit 0", "0 is not in the range x>=1"),
    ("ladder --stages rule --start none", "'none' does not exist"),
])
def test_told_before_a_model_is_loaded(argv, words, desk, capsys):
    before = sorted(p.name for p in desk.iterdir())
    assert main(argv.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and words in err, err
    assert sorted(p.name for p in desk.iterdir() if p.name != "runs") == before     # and nothing is left behind


def test_python_m_is_the_command():
    import m2kit as kit
    r = subprocess.run([sys.executable, "-m", "m2kit", "--version"], capture_output=True, text=True)
    assert (r.returncode, r.stdout) == (0, f"m2kit {kit.__version__}\n")
