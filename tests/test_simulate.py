"`m2kit simulate`: rows that trainers read, runs that go on after a kill, words that are checked before a model is loaded."
import json, os, random, signal, subprocess, sys, time
from pathlib import Path
import pytest
import m2kit.service.simulate as s
from m2kit.core.errors import UserError
from m2kit.lm.chat import FunctionModel
from m2kit.simulator.patient import CONSULT, OPENING
from m2kit.service.simulate import SimulationPlan, part_path, run_simulation

QUIET = dict(tell=lambda line: None)
PARTS = dict(
    actor=lambda m: "It hurts.",
    gate=lambda m: json.dumps(dict(trigger="farewell" if "bye" in m[-1]["content"].lower() else "none")),
    checker=lambda m: '{"faults": []}', unreadable=lambda m: "I think that", doctor=lambda m: "Goodbye." if len(m) > 5 else "Where?")

@pytest.fixture
def stand_ins(monkeypatch):
    "Models that are functions, by the names of `PARTS`; who was opened."
    opened = []
    def open_model(spec, *rest):
        opened.append(spec)
        return FunctionModel(PARTS[spec], spec)
    monkeypatch.setattr(s, "open_model", open_model)
    monkeypatch.setattr(s, "read_spec", lambda spec: ("checkpoint", spec, ""))
    return opened

def plan(**more): return SimulationPlan(**dict(patient="actor", gate="gate", checker="checker", at_once=4) | more)
def rows(folder): return [json.loads(line) for line in (Path(folder)/"dialogues.jsonl").read_text(encoding="utf-8").splitlines()]


def test_rows_are_chats_from_the_doctors_side(stand_ins, tmp_path):
    r = run_simulation(plan(doctor="doctor"), 6, tmp_path/"a", **QUIET)
    assert stand_ins.count("actor") == 1 and r["dialogues"] == 6 and r["ended"] == {"farewell": 6}
    for row in rows(tmp_path/"a"):
        assert [m["role"] for m in row["messages"]] == ["system", "user", "assistant", "user", "assistant", "user", "assistant"]
        assert row["messages"][0]["content"] == CONSULT and row["messages"][1]["content"] == OPENING
        assert row["messages"][-1]["content"] == "Goodbye." and row["unchecked"] == 0 and row["doctor"] == "doctor"
    assert len({r["id"] for r in rows(tmp_path/"a")}) == len({r["script"] for r in rows(tmp_path/"a")}) == 6


@pytest.mark.slow
def test_trainers_read_them(stand_ins, tmp_path):
    run_simulation(plan(), 8, tmp_path/"a", **QUIET)
    load_dataset = pytest.importorskip("datasets").load_dataset
    data = load_dataset("json", data_files=str(tmp_path/"a"/"dialogues.jsonl"), cache_dir=str(tmp_path/"cache"))["train"]
    from trl.data_utils import is_conversational
    assert len(data) == 8 and is_conversational(data[0]) and data[0]["privacy"][1] > 0


def test_an_unreadable_checker_is_counted(stand_ins, tmp_path):
    r = run_simulation(plan(checker="unreadable"), 4, tmp_path/"a", **QUIET)
    said = sum(m["role"] == "user" for row in rows(tmp_path/"a") for m in row["messages"][2:])
    assert r["unchecked"] == said > 0 and "said unchecked" in s.result_text(r)


def test_a_run_goes_on_and_grows(stand_ins, tmp_path, monkeypatch):
    whole = run_simulation(plan(), 10, tmp_path/"a", **QUIET)
    class Killed(BaseException): pass
    real, made = s.make_part, []
    def make(*args):
        if len(made) == 1: raise Killed
        made.append(args[2]); return real(*args)
    monkeypatch.setattr(s, "make_part", make)
    with pytest.raises(Killed): run_simulation(plan(), 10, tmp_path/"b", **QUIET)
    part_path(tmp_path/"b", 1, "jsonl").write_text('{"torn')     # a kill between rows and record
    made[:] = [None]*2
    def again(*args): made.append(args[2]); return real(*args)
    monkeypatch.setattr(s, "make_part", again)
    run_simulation(plan(), 10, tmp_path/"b", **QUIET)
    assert made[2:] == [1, 2] and rows(tmp_path/"a") == rows(tmp_path/"b")
    run_simulation(plan(), 14, tmp_path/"b", **QUIET)            # whole parts stay, the short one is done again
    assert made[4:] == [2, 3] and rows(tmp_path/"b")[:10] == rows(tmp_path/"a") and whole["dialogues"] == 10


def test_a_budget_is_kept(stand_ins, tmp_path):
    spent = run_simulation(plan(), 4, tmp_path/"a", **QUIET)["spent"]
    with pytest.raises(UserError, match="4 of 40 dialogues"): run_simulation(plan(), 40, tmp_path/"a", budget=1.5*spent, **QUIET)
    records = [json.loads(p.read_text()) for p in (tmp_path/"a"/"parts").glob("*.json")]
    assert sum(sum(t) for r in records for t in r["tokens"].values()) <= 1.5*spent
    with pytest.raises(UserError, match="another at_once"): run_simulation(plan(at_once=8), 40, tmp_path/"a", **QUIET)


def test_given_cases_come_round(stand_ins, tmp_path):
    from m2kit.clinic.persona import draw_script
    file = tmp_path/"cases.jsonl"
    file.write_text("".join(draw_script(random.Random(i)).case.model_dump_json() + "\n" for i in range(3)))
    run_simulation(plan(cases=str(file)), 7, tmp_path/"a", **QUIET)
    ids = [r["script"] for r in rows(tmp_path/"a")]
    assert len(set(ids)) == 3 and ids[:3] == ids[3:6] == [draw_script(random.Random(i)).id for i in range(3)]


@pytest.mark.parametrize("words, says", [
    ("--out /proc/x", "/proc cannot be written to"), ("", "name a folder with --out"), ("--out x --stratify sexx", "did you mean sex?"),
    ("--out x --doctor tiny:docter", "did you mean tiny:doctor?"), ("--out x --n 0", "not in the range"), ("--out x --price gpt", "write NAME=READ,WRITTEN"),
    ("--out x --cases none.jsonl", "does not exist"), ("--out x --budget 0", "not in the range"), ("--out x --gate nobody", "no checkpoint"),
    ("--out x --cases bad.jsonl", "bad.jsonl"), ("--out x --stratify sex --cases case.json", "leave out --cases")])
def test_wrong_words_are_told_before_a_model_is_loaded(words, says, tmp_path, monkeypatch, capsys):
    from m2kit.clinic.persona import draw_script
    from m2kit.reproduce.cli import main
    monkeypatch.chdir(tmp_path)
    (tmp_path/"bad.jsonl").write_text("not JSON\n"); (tmp_path/"case.json").write_text(draw_script(random.Random(0)).case.model_dump_json())
    def loaded(*words, **options): raise AssertionError("a model was opened")
    monkeypatch.setattr(s, "open_model", loaded)
    assert main(["simulate", *words.split()]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("m2kit: ") and err.count("\n") == 1 and says in err, err


def test_an_estimate_needs_no_model(monkeypatch, capsys):
    from m2kit.reproduce.cli import main
    monkeypatch.setattr(s, "open_model", lambda *w: 1/0)
    assert main("simulate --n 1000 --doctor http://h/v1#big --patient http://h/v1#big --estimate --price big=2,8".split()) == 0
    out = capsys.readouterr().out
    assert "1,000 dialogues" in out and "doctor" in out and "without a cache's discount" in out


@pytest.mark.long
def test_killed_at_ten_random_points(tmp_path):
    "kill -9 at ten random points, then to the end: the same file as a run that was left alone."
    def start(out): return subprocess.Popen([sys.executable, "-m", "m2kit", "simulate", "--n", "60", "--at-once", "4", "--out", str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    began = time.monotonic()
    left = start(tmp_path/"left"); _, err = left.communicate(); took = time.monotonic() - began
    assert left.returncode == 0, err
    rng, parts = random.Random(0), []
    for _ in range(10):
        p = start(tmp_path/"killed"); time.sleep(rng.uniform(.1, .6)*took)
        p.send_signal(signal.SIGKILL); p.communicate()
        parts.append(len(list((tmp_path/"killed"/"parts").glob("*.json"))))
    p = start(tmp_path/"killed"); _, err = p.communicate()
    assert p.returncode == 0, err
    assert parts == sorted(parts) and (tmp_path/"killed"/"dialogues.jsonl").read_bytes() == (tmp_path/"left"/"dialogues.jsonl").read_bytes(), parts
    print("parts that were there after each kill:", parts)
