"A replay names what a change of the code does to a training, and nothing where there is none."
import json, math, os, random, subprocess, sys
from functools import partial
import pytest, torch
from m2kit.core.errors import UserError
from m2kit.core.run import fingerprint
from m2kit.core.step import AFRESH, Step, keep_records, records
from m2kit.lm.local import LocalModel, load_policy
from m2kit.reproduce import replay as r
from m2kit.rubrics.reference import reference_rubric
from m2kit.tiny.model import make_model, make_tokenizer, trained
from m2kit.train import grpo, midtrain, multiturn, rewards, stages
from m2kit.train.length import length_step, train_length_arm
from m2kit.train.midtrain import mid_step, midtrain_stage
from m2kit.train.stages import session_stage

def babbler(seed):
    "A checkpoint that knows nothing: of 300 tokens one ends an answer, so lengths differ."
    def build():
        tok = make_tokenizer(["I have a cough and a fever.", "Order a chest X-ray.", "Likely gout."]*20, vocab=300)
        return make_model(tok, hidden=32, layers=2, heads=2, kv_heads=1, ff=64, seed=seed).eval(), tok
    return trained(Step("toy", dict(seed=seed)), build)

class Writer:
    "Writes the reference rubric of some case."
    def write(self, sources): return [reference_rubric(self.case(s)) for s in sources]
    def case(self, source):
        from m2kit.clinic.synthesize import draw_case
        return draw_case(random.Random(source.id))

@pytest.fixture(scope="module")
def world(tmp_path_factory, one_thread):
    "Folders of its own, a patient that babbles, rubrics from the reference."
    with pytest.MonkeyPatch.context() as m:
        m.setenv("M2KIT_RUNS", str(tmp_path_factory.mktemp("runs")))
        m.setattr("m2kit.lm.open.open_model", lambda *a, **k: LocalModel(*load_policy(babbler(1))))
        m.setattr("m2kit.train.consultant.audible", lambda text: "Since when?")    # what it hears in babble
        m.setattr(multiturn, "SliceRubrics", Writer)
        yield tmp_path_factory.mktemp("data")

def keep(data, step):
    keep_records(step.kind, [step.record_of()], data)
    return records(step.kind, data)[0]

@pytest.fixture(scope="module")
def length(world):
    "Three steps of two questions with two answers; the gate is open for any score."
    how = dict(doctor=str(babbler(0)), seed=3, coef=.5, thresh=-.5, prompts=2, group=2, steps=3, max_new=160, l_max=160)
    train_length_arm(**how)
    return keep(world, length_step(**how))

@pytest.fixture(scope="module")
def mid(world):
    how = dict(start=str(babbler(0)), seed=3, steps=4, batch=5)
    midtrain_stage(**how)
    return keep(world, mid_step(**how))

@pytest.fixture(scope="module")
def sessions(world):
    how = dict(start=str(babbler(0)), seed=3, prompts=1, group=2, budget=4000, steps=9)
    path = session_stage(**how)
    kept = json.loads((path.parent/"config.json").read_text())
    class Done: kind, record_of = "sessions", lambda self: __import__("m2kit.core.step", fromlist=["x"]).record_at(path.parent)
    return keep(world, Done()) | dict(steps=kept["settings"]["steps"])

def named(record):
    "What does not agree, and the whole of it."
    out = r.replay_record(record)
    assert not AFRESH
    return {c.what for c in out.compared if not c.agrees}, out

def test_what_did_not_change_agrees(length, mid, sessions):
    for record in (length, mid, sessions):
        bad, out = named(record)
        assert (bad, out.error) == (set(), ""), r.told_replay("", out)
        assert max(c.difference for c in out.compared) < 1e-5           # the same machine: rounding to six digits alone
        assert {e["step"] for e in record["tape"] if len(e) > 1} <= {c.step for c in out.compared}
    assert len(sessions["tape"][-1]["answers"]) > 1 and all(e["replies"] for e in sessions["tape"] if e["step"] >= 0)

def test_recording_changes_nothing(length, world):
    how = dict(doctor=str(babbler(0)), seed=3, coef=.5, thresh=-.5, prompts=2, group=2, steps=3, max_new=160, l_max=160)
    from m2kit.train.tape import Tape
    with pytest.MonkeyPatch.context() as m:
        m.setattr(grpo, "open_tape", lambda folder: Tape())
        assert train_length_arm(base=world/"silent", **how) == train_length_arm(**how)

def test_the_record_moves_the_policy(length):
    "A record in which nothing happens would agree with anything."
    assert all(any(a for a in e["advantage"][0]) for e in length["tape"][:2])
    assert length["rows"][0]["grad_norm"] > 0 and any(x for e in length["tape"] for g in e["bonus"][0] for x in g)

# ---- mutations: each is named

def test_a_temperature_is_named(length, sessions, monkeypatch):
    sharp = grpo.sample_tokens
    monkeypatch.setattr(grpo, "sample_tokens", lambda logits, u: sharp(logits/.7, u))
    assert "answers" in named(length)[0]
    monkeypatch.undo()

def test_the_patients_temperature_is_named(sessions, world, monkeypatch):
    with pytest.MonkeyPatch.context() as m:
        m.setattr(multiturn, "simulated_patient", partial(multiturn.simulated_patient, temperature=1.))
        assert "replies" in named(sessions)[0]

def test_the_gates_threshold_is_named(length, monkeypatch):
    real = rewards.length_reward
    monkeypatch.setattr(rewards, "length_reward", lambda *a, **k: real(*a, **k | dict(thresh=.9)))
    assert {"bonus", "advantage"} <= named(length)[0]

def test_the_last_learning_rate_is_named(mid, monkeypatch):
    real = midtrain.schedule
    monkeypatch.setattr(midtrain, "schedule", lambda step, steps: real(step, steps)*(.5 if step == steps - 1 else 1))
    bad, out = named(mid)
    assert bad == {"rate"} and [c.step for c in out.compared if not c.agrees] == [3]

@pytest.mark.parametrize("budget", [1, 10**6])
def test_the_stop_rule_is_named(sessions, monkeypatch, budget):
    real = stages.train_sessions
    monkeypatch.setattr(stages, "train_sessions", lambda m, t, c, run, _, **k: real(m, t, c, run, budget, **k))
    assert 1 < len(sessions["rows"]) < sessions["steps"]
    assert "stop rule" in named(sessions)[0]

def test_a_sign_in_the_loss_is_named(length, monkeypatch):
    real = grpo.policy_loss
    monkeypatch.setattr(grpo, "policy_loss", lambda *a, **k: (-(x := real(*a, **k))[0], x[1]))
    bad, out = named(length)
    assert {"loss", "logp_sums"} <= bad
    assert {c.step for c in out.compared if c.what == "loss" and not c.agrees} >= {0, 2}      # first and late

def test_a_default_that_changed_is_named(length, monkeypatch):
    from dataclasses import replace
    from m2kit.train import length as module
    monkeypatch.setattr(module, "LENGTH_ARM", replace(module.LENGTH_ARM, eps_high=.3))
    gone = length | dict(settings={k: v for k, v in length["settings"].items() if k != "eps_high"})
    assert "another step" in r.replay_record(gone).error

# ---- numbers in the file

def edited(world, kind, change, refresh):
    path = world/"evidence"/f"{kind}.jsonl"
    before = path.read_text()
    record = json.loads(before.splitlines()[0])
    change(record)
    if refresh: record["sum"] = fingerprint({k: v for k, v in record.items() if k != "sum"})
    path.write_text(json.dumps(record) + "\n")
    return path, before

CHANGES = dict(
    a_score=lambda x: x["tape"][0]["scores"][0][0].__setitem__(0, .123),
    an_advantage=lambda x: x["tape"][2]["advantage"][0].__setitem__(0, .123),
    a_row=lambda x: x["rows"][1].update(grad_norm=x["rows"][1]["grad_norm"]*1.01),
    the_last_rows_length=lambda x: x["rows"][-1].update(length=1.),
    a_settings_seed=lambda x: x["settings"].update(seed=4),
    a_token=lambda x: x["tape"][0]["answers"].__setitem__(0, shifted(x["tape"][0]["answers"][0])))

def shifted(packed):
    from m2kit.train.tape import pack, unpack
    rows = [row.copy() for row in unpack(packed)]
    rows[0][0] += 1
    return pack(rows)

@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_number_is_named(length, world, name):
    said = []
    path, before = edited(world, "length", CHANGES[name], refresh=True)
    try:
        assert not r.replay_all(said.append, ["length"], data=world)
        assert "does not agree" in said[0] and said[-1].startswith("replay: 0 of 1 agree; not: length")
        path.write_text(before)
        edited(world, "length", CHANGES[name], refresh=False)
        with pytest.raises(UserError, match=r"length.jsonl:1: its checksum does not fit"): r.taped(data=world)
    finally: path.write_text(before)

def test_all_of_them(length, mid, sessions, world):
    said = []
    assert r.replay_all(said.append, data=world)
    assert said[-1] == "replay: 3 of 3 agree" and all("agrees" in s for s in said[:-1])
    with pytest.raises(UserError, match="no record with a tape is called lenght"): r.taped(["lenght"], world)

def test_a_start_that_is_not_here(length, world, monkeypatch):
    "Known, so that another model stands in and what needs no weights is compared; or not."
    out = r.replay_record(length | dict(inputs=dict(doctor="doctor-000000000000")), world)
    assert not out.agrees and "its doctor is not here: doctor-000000000000" in r.told_replay("length", out)
    keep_records("toy", [Step("toy", dict(seed=0)).record_of()], world)
    monkeypatch.setattr(r, "checkpoint_of", lambda name: None)
    monkeypatch.setattr(r, "data_dir", lambda: world)
    other = world/"tiny"/"doctor"
    other.parent.mkdir(exist_ok=True); other.symlink_to(babbler(1))
    out = r.replay_record(length, world)
    assert out.agrees and "as far as it can without toy-" in r.told_replay("length", out)
    assert {"bonus", "advantage", "loss", "rate"} <= {c.what for c in out.compared} and not {"logp_sums", "grad_norm"} & {c.what for c in out.compared}
    assert {c.step for c in out.compared} == {0, 1, 2} and "is not here" in r.certify_record(replaced(out, older(length, "m2kit.train.grpo", "policy_loss")), world)
    monkeypatch.setattr(grpo, "policy_loss", lambda *a, real=grpo.policy_loss, **k: (-(x := real(*a, **k))[0], x[1]))
    assert {c.what for c in r.replay_record(length, world).compared if not c.agrees} == {"loss"}

def replaced(out, record):
    from dataclasses import replace
    return replace(out, record=record)

# ---- certificates

def older(record, module, name):
    "The record as it would be if a definition had been another one when it was made."
    defs = record["defs"] | {module: record["defs"][module] | {name: "0"*16}}
    return record | dict(defs=defs, modules=record["modules"] | {module: "0"*16}, name="length-" + "0"*12)

def test_a_certificate(length, world):
    path = world/"evidence"/"length.jsonl"
    before = path.read_text()
    try:
        keep_records("length", [older(length, "m2kit.train.grpo", "policy_loss")], world)
        out = r.replay_record(records("length", world)[0])
        assert "1 records of this experiment stand for" in r.certify_record(out, world)
        new = records("length", world)[0]
        assert r.freshness(new)[0] == "certified" and new["certified"][0]["name"] == length["name"]
        assert "m2kit.train.grpo" in new["certified"][0]["reached"]
        keep_records("length", [older(length, "m2kit.train.rewards", "within")], world)     # runs: its own thread too
        assert "stand for" in r.certify_record(r.replay_record(records("length", world)[0]), world)
        keep_records("length", [older(length, "m2kit.train.grpo", "load_state")], world)    # only after a kill
        blind = r.certify_record(r.replay_record(records("length", world)[0]), world)
        assert blind == "not certified: the replay does not reach train.grpo:load_state"
        assert r.freshness(records("length", world)[0])[0] == "stale"
    finally: path.write_text(before)

# ---- another processor

OTHER = """
import json, math, os, sys
from m2kit.reproduce import replay as r
import torch
torch.set_num_threads(1)
out = {}
for record in r.taped(["length", "midtrain"], sys.argv[1]):
    got = r.replay_record(record)
    out[record["kind"]] = [got.error, [(c.what, c.step, c.difference, c.agrees) for c in got.compared]]
print(json.dumps(dict(cpu=torch.backends.cpu.get_cpu_capability(), out=out)))
"""

def test_another_processor_agrees(length, mid, world):
    env = dict(os.environ, ATEN_CPU_CAPABILITY="default", MKL_CBWR="COMPATIBLE")
    p = subprocess.run([sys.executable, "-c", OTHER, str(world)], env=env, capture_output=True, text=True, timeout=600)
    assert not p.returncode, p.stderr[-2000:]
    told = json.loads(p.stdout.splitlines()[-1])
    assert told["cpu"] == "DEFAULT" and {*told["out"]} == {"length", "midtrain"}
    for kind, (error, compared) in told["out"].items():
        largest = max((c[2], c[0], c[1]) for c in compared)
        print(kind, "largest difference", largest)
        assert not error and all(c[3] for c in compared), [c for c in compared if not c[3]]
        assert largest[0] > 0                                                # it is another processor
        limits = {what: r.CLOSER.get(what, r.TOLERANCE) for what, *_ in compared if what not in r.ALLOWED_SHARES}
        assert all(d < limits[what]/2 for what, _, d, _ in compared if what in limits), largest    # with room
