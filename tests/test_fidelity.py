"""Judges and attacks under fire: secrets in every disguise, judge replies cut at every letter, real records, and dialogues that are paired as they should be."""
import ast, base64, inspect, json, os, random
from pathlib import Path
import numpy as np
import pytest
from m2kit.clinic.importers import load_agentclinic
from m2kit.clinic.interview import doctor_turns, wordings
from m2kit.clinic.persona import Script, draw_script
from m2kit.core.errors import UserError
from m2kit.lm.chat import Completion, FunctionModel
from m2kit.simulator import fidelity
from m2kit.simulator.affect import PATIENT
from m2kit.simulator.attack import ATTACKS, discloses, leak_rates, run_attacks
from m2kit.core.stats import gap_interval, ratio_interval
from m2kit.simulator.fidelity import LMJudge, closes_at, counts, ending, exchanges, oracle, read_turn_judgement
from m2kit.simulator.patient import PatientSimulator, simulate

OSCE = Path(os.environ.get("M2KIT_INPUTS") or Path(__file__).resolve().parents[2]/"shared"/"data")/"agentclinic_medqa_30.jsonl"
needs_osce = pytest.mark.skipif(not OSCE.exists(), reason="no AgentClinic cases (set M2KIT_INPUTS)")

WORDS = dict(zip("0123456789", "zero one two three four five six seven eight nine".split()))
DISGUISES = dict(plain=str, upper=str.upper, spelt=lambda v: "-".join(c for c in v if c.isalnum()), spaced=lambda v: " ".join(v.replace(" ", "")), backwards=lambda v: v[::-1],
                 base64=lambda v: base64.b64encode(v.encode()).decode(), urlsafe=lambda v: base64.urlsafe_b64encode(v.encode()).decode().rstrip("="), hex=lambda v: v.encode().hex(),
                 squeezed=lambda v: v.replace(" ", ""), dotted=lambda v: ". ".join(v.split(" ")), words=lambda v: " ".join(WORDS.get(c, c) for c in v) if sum(map(str.isdigit, v)) > 5 else v)

@pytest.mark.parametrize("disguise", DISGUISES)
def test_a_secret_is_found_in_every_disguise_and_nobody_elses(disguise):
    people = [draw_script(random.Random(i)) for i in range(40)]
    missed, wrong = [], []
    for me, other in zip(people, [*people[1:], people[0]]):
        for field, value in me.secrets.items():
            said = f"It is {DISGUISES[disguise](value)}, I think."
            if not discloses(said, value, field): missed.append((value, said))
            theirs = other.secrets[field]
            if not set(value.split()) & set(theirs.split()) and discloses(said, theirs, field): wrong.append((theirs, said))
    assert not missed and not wrong, (missed[:3], wrong[:3])

def test_ordinary_replies_disclose_nothing():
    "Each patient's replies, read for the secrets of another: a name in common is the only way."
    for i in range(60):
        s, other = draw_script(random.Random(i)), draw_script(random.Random(1000 + i))
        talk = " ".join([s.case.medical.story, *s.items("symptoms"), *s.items("work"), *s.items("habits"), *s.items("medicines"), f"I am {s.case.medical.age}."])
        assert not [f for f, v in other.secrets.items() if discloses(talk, v, f)], (talk, other.secrets)

WHOLE = json.dumps(dict(leaks=["Ana \"the\" Novak"], contradictions=[], fabrications=["fever, {chills}"], volunteered=[], withheld=["onset"]))

def test_a_judge_reply_cut_anywhere_is_unknown():
    whole = read_turn_judgement(Completion(WHOLE))
    assert whole.privacy is False and whole.fact is False and not whole.error
    for n in range(len(WHOLE)):
        j = read_turn_judgement(Completion(WHOLE[:n]))
        assert j.error and j.privacy is None and j.fact is None, WHOLE[:n]

@pytest.mark.parametrize("said", ["null", "[]", "{}", "true", '{"leaks": true, "contradictions": [], "fabrications": [], "volunteered": [], "withheld": []}', "No faults.", "\x00", "{" * 3000,
                                  '{"leaks": [1], "contradictions": [], "fabrications": [], "volunteered": [], "withheld": []}', "<think>" + WHOLE, "好的,没有问题。"])
def test_nonsense_is_no_verdict(said): assert read_turn_judgement(Completion(said)).error

def test_unknown_turns_are_left_out_and_counted():
    script = draw_script(random.Random(1))
    judge = LMJudge(FunctionModel(lambda m: WHOLE if "Turn" not in m[1]["content"] else "hm"), retries=1)
    j = judge.judge([(script, [("Hello?", "Yes."), ("Turn?", "No.")])])[0]
    assert [t.privacy for t in j.turns] == [False, None] and counts(j)["privacy"] == [(0, 1)]
    assert j.error and j.opportunities == () and judge.faults["no readable JSON"] == 4
    assert np.isnan(ratio_interval([counts(j)["personification"]])[0])

def test_a_model_that_is_down_is_unknown_too():
    class Down:
        name = "down"
        def chat(self, dialogues, sampling=None, **kw): return [Completion("", finish="error", error="refused") for _ in dialogues]
    j = LMJudge(Down(), retries=1).judge([(draw_script(random.Random(1)), [("Hello?", "Yes.")])])[0]
    assert j.turns[0].error and j.error and counts(j)["fact"] == [(0, 0)]

def test_the_judge_is_not_the_checker():
    "The oracle neither imports the Factual Unit nor asks a model."
    tree = ast.parse(inspect.getsource(fidelity))
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and (n.module or "").endswith("facts")]

def test_arms_are_paired_on_the_same_dialogues():
    scripts = [draw_script(random.Random(i)) for i in range(6)]
    doctors = [doctor_turns(s, random.Random(i)) for i, s in enumerate(scripts)]
    ends = [closes_at(d) for d in doctors]
    mute, liar = (PatientSimulator(FunctionModel(lambda m, t=t: t)) for t in (wordings("unsure")[0], wordings("allergy", table="patient")[0].format("everything")))
    rows = []
    for sim in (mute, liar):
        talks = simulate(scripts, doctors, sim)
        assert [ending(t, e) for t, e in zip(talks, ends)] == ["late"]*6 and [[q for q, _ in exchanges(t, e)] for t, e in zip(talks, ends)] == [[t.text for t in d[:e]] for d, e in zip(doctors, ends)]
        rows.append([counts(j)["fact"] for j in oracle([(s, exchanges(t, e)) for s, t, e in zip(scripts, talks, ends)])])
    assert gap_interval(*rows) == (1.0, 1.0, 1.0) and gap_interval(*rows[::-1])[0] == -1.0
    with pytest.raises(UserError, match="same dialogues"): gap_interval(rows[0], rows[1][:3])

@needs_osce
def test_the_suite_runs_on_real_records():
    scripts = [Script.of(c) for c in load_agentclinic(OSCE)[:8]]
    def blab(messages): return messages[0]["content"].rpartition(": ")[2]
    told, silent = (run_attacks(PatientSimulator(FunctionModel(f), block=PATIENT), scripts) for f in (blab, lambda m: "I would rather not say."))
    assert all(r["rate"] == 1 for r in leak_rates(told).values() if r["goal"] == "private")
    assert not any(o.how for o in silent) and len({o.attack for o in silent}) == len(ATTACKS) >= 14
    assert {o.field for o in told} > {"name", "contact"} and told == run_attacks(PatientSimulator(FunctionModel(blab), block=PATIENT), scripts)
