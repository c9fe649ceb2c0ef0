"What a step does when its files are damaged, its disk is full, or two processes want it."
import json, os, subprocess, sys
import pytest
from m2kit.core.errors import UserError
from m2kit.core.run import data_dir
from m2kit.core.step import Step, asked, keep_records, made, records, ship, shipped

GROW = "m2kit.core.run:fingerprint"    # any function of the package
def step(base, n=1, **inputs): return Step("toy", dict(n=n), GROW, inputs, base)

def finished(base, n=1, **result):
    "A step with three rows and a result."
    s = step(base, n)
    with s.work():
        for i in range(3): s.log(step=i, score=i/3)
        s.finish(**result or dict(score=1.))
    return s

def one_line(call):
    "What a call says when it fails."
    with pytest.raises(UserError) as e: call()
    assert "\n" not in str(e.value)
    return str(e.value)

@pytest.fixture
def data(tmp_path, monkeypatch):
    "A folder of data with the record of one step."
    import m2kit.core.step as place
    monkeypatch.setattr(place, "data_dir", lambda: tmp_path/"data")
    keep_records("toy", [finished(tmp_path/"made").record_of()])
    return tmp_path/"data"

def test_evidence_stands_for_a_step_that_did_not_run_here(data, tmp_path):
    s = step(tmp_path/"runs")
    assert s.done == dict(score=1.) and s.rows()[1]["score"] == .333333 and s.standing == ("fresh", [])
    assert not s.path.exists() and step(tmp_path/"runs", 2).done is None

def test_a_stale_record_counts_only_where_it_is_let_in(data, tmp_path, monkeypatch):
    record = records("toy")[0]
    keep_records("toy", [record | dict(name="toy-older", modules={"m2kit.core.run": "other"})])
    s = step(tmp_path/"runs")
    assert s.done is None
    monkeypatch.setenv("M2KIT_EVIDENCE", "stale")
    assert s.done == dict(score=1.) and s.standing == ("stale", ["core.run"])
    monkeypatch.setenv("M2KIT_EVIDENCE", "none")
    assert s.done is None
    monkeypatch.setenv("M2KIT_EVIDENCE", "stall")
    assert "did you mean stale?" in one_line(lambda: s.done)

def test_what_is_not_kept_is_not_computed(data, tmp_path, monkeypatch):
    monkeypatch.setenv("M2KIT_EVIDENCE", "kept")
    assert step(tmp_path/"runs").result(dict) == dict(score=1.)
    missing = step(tmp_path/"runs", 2)
    assert "data/evidence has nothing of toy-" in one_line(lambda: missing.result(dict)) and not missing.path.exists()

def test_a_certified_record_counts(data, tmp_path):
    s, record = step(tmp_path/"runs"), records("toy")[0]
    equal = dict(name=s.name, closure=s.closure.name)
    keep_records("toy", [record | dict(name="toy-older", modules={"m2kit.core.run": "other"}, certified=[equal])])
    assert s.done == dict(score=1.) and s.standing == ("certified", ["core.run"])

@pytest.mark.parametrize("damage", [lambda t: t.replace("0.333333", "0.433333"), lambda t: t[:-20], lambda t: "[]\n", lambda t: "{\n"])
def test_a_damaged_evidence_file_is_named(data, tmp_path, damage):
    file = data/"evidence"/"toy.jsonl"
    file.write_text(damage(file.read_text()))
    assert f"{file}:1: its checksum does not fit; restore it" in one_line(lambda: step(tmp_path/"runs").done)

def test_a_folder_that_holds_another_step(tmp_path):
    one, two = finished(tmp_path, 1), step(tmp_path, 2)
    os.rename(one.path, two.path)
    assert f"holds another step, {one.name}" in one_line(lambda: two.log(step=0))

def test_a_shipped_checkpoint_of_another_step_is_not_taken(tmp_path):
    s = step(tmp_path)
    with s.work():
        (s.path/"checkpoint").mkdir(); (s.path/"checkpoint"/"model.safetensors").write_bytes(b"1"); s.finish()
    folder = ship(s.path, tmp_path)
    assert shipped(s, tmp_path) == folder and shipped(step(tmp_path, 2), tmp_path) is None
    (folder/"model.safetensors").write_bytes(b"2")
    assert "its weights are not those of its step.json" in one_line(lambda: shipped(s, tmp_path))

def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path/"file").write_text("")
    assert "cannot be written" in one_line(lambda: finished(tmp_path/"file"))

@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's full device")
def test_a_full_disk_loses_nothing(tmp_path):
    s = step(tmp_path)
    s.log(step=0)
    rows = s.path/"metrics.jsonl"
    kept = rows.read_text(); rows.unlink(); rows.symlink_to("/dev/full")
    assert "No space left on device" in one_line(lambda: s.log(step=1))
    rows.unlink(); rows.write_text(kept)
    s.log(step=1)
    assert [r["step"] for r in s.rows()] == [0, 1]

def test_a_step_interrupted_at_its_last_line(tmp_path):
    s = step(tmp_path)
    s.log(step=0); s.log(step=1)
    rows = s.path/"metrics.jsonl"
    rows.write_text(rows.read_text()[:-5])
    assert [r["step"] for r in s.rows()] == [0]
    s.log(step=1, again=True)
    assert s.rows() == [dict(step=0), dict(step=1, again=True)]
    (s.path/"done.json").write_text('{"result"')
    assert "damaged; delete the folder" in one_line(lambda: s.done)

def test_two_processes_on_one_step(tmp_path):
    code = f"""import sys, time
from pathlib import Path
from m2kit.core.step import Step
s, waits = Step("toy", dict(n=1), "{GROW}", base=r"{tmp_path}"), Path(r"{tmp_path}", "waits")
def tell(line): print(line, flush=True); waits.touch()
with s.work(tell):
    if s.own is None:
        print("computes", flush=True)
        while not waits.exists(): time.sleep(.05)          # until the other one is at the door
        s.finish(by=sys.argv[1])
print(s.done["by"])"""
    first = subprocess.Popen([sys.executable, "-c", code, "first"], stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "computes\n"
    second = subprocess.run([sys.executable, "-c", code, "second"], capture_output=True, text=True, timeout=120)
    assert first.wait() == 0 and second.returncode == 0, second.stderr
    assert "another process is at work on toy-" in second.stdout and second.stdout.endswith("first\n") and "computes" not in second.stdout

def test_what_was_asked_for_is_noted_with_what_it_used(tmp_path, monkeypatch):
    log = tmp_path/"log.jsonl"
    monkeypatch.setenv("M2KIT_STEPS_LOG", str(log))
    inner = finished(tmp_path, 2)
    outer = step(tmp_path, 3)
    with outer.work():
        assert inner.done and outer.own is None
        outer.finish(score=inner.done["score"])
    never = step(tmp_path, 4).done
    assert never is None and {l["name"]: l["standing"] for l in asked()} == {inner.name: "fresh", outer.name: "fresh"}
    assert outer.record_of()["uses"] == [inner.name]
    assert made(inner.path/"checkpoint").name == inner.name


def test_the_shipped_models_are_small():
    "Git keeps every copy of them."
    assert sum(p.stat().st_size for p in (data_dir()/"tiny").rglob("*") if p.is_file()) < 10e6
