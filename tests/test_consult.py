"Consulting real cases: AgentClinic's thirty as scripts, with any model, in the terminal, and over a real OpenAI-compatible server on loopback."
import json, os, re, subprocess, sys
from pathlib import Path
import pytest
from m2kit.clinic.importers import load_agentclinic
from m2kit.clinic.persona import Script
from m2kit.core.errors import UserError
from m2kit.lm.chat import FunctionModel
from m2kit.lm.log import CallLog, Logged
from m2kit.lm.server import ServerModel
from m2kit.service.consult import Consultation, consult
from m2kit.simulator.patient import PatientSimulator, load_transcripts, simulate

OSCE = Path(os.environ.get("M2KIT_INPUTS") or Path(__file__).resolve().parents[2]/"shared"/"data")/"agentclinic_medqa_30.jsonl"
needs_osce = pytest.mark.skipif(not OSCE.exists(), reason="no AgentClinic cases (set M2KIT_INPUTS)")
QUESTIONS = ["What brings you here today?", "Since when do you have it?", "Do you take any medicines?", "You have told me enough. Goodbye."]


def actor(messages):
    "Plays any script: the first question gets the complaint, the others some other line of the script."
    told = dict(l.split(": ", 1) for l in messages[0]["content"].splitlines() if re.match(r"[A-Z][\w ]+: ", l) and not l.startswith("Not to be told"))
    n = sum(m["role"] == "assistant" for m in messages)
    return (told.get("Complaint") or told.get("Symptoms") or "I do not feel well") + "." if n == 0 else list(told.values())[n % len(told)].split(";")[0] + "."

def gate(messages): return json.dumps(dict(trigger="farewell" if "goodbye" in messages[-1]["content"].lower().rpartition("doctor:")[2] else "none"))
def nothing(messages): return '{"faults": []}'
def simulator(): return PatientSimulator(FunctionModel(actor, "actor"), gate=FunctionModel(gate, "gate"), checker=FunctionModel(nothing, "checker"))


@needs_osce
def test_thirty_real_cases_become_scripts_and_are_consulted():
    cases = load_agentclinic(OSCE)
    scripts = [Script.of(c, seed=i) for i, c in enumerate(cases)]
    assert len(scripts) == 30 and scripts == [Script.of(c, seed=i) for i, c in enumerate(cases)]
    for case, script in zip(cases, scripts):
        text = script.text()
        assert case.medical.condition.lower() not in text.lower(), script.id               # a patient does not know the diagnosis
        assert not [v for v in case.medical.tests.values() if len(v) > 30 and v in text]   # nor what no test has shown yet
        assert script.case.psychological.mbti and script.case.social.means and script.case.social.language
        assert len(text.split()) > 30
    for t in simulate(scripts, QUESTIONS, simulator()):
        assert (t.ended, len(t.turns)) == ("farewell", 4) and not t.troubles, (t.script, t.troubles)
        assert len({r.reply for r in t.turns[:3]}) > 1


def test_the_terminal_keeps_the_transcript_and_goes_on(tmp_path, capsys):
    from m2kit.reproduce.cli import pick_script
    script, path = pick_script(seed=5), tmp_path/"talk.jsonl"
    consult(Consultation(script, simulator(), path=path), QUESTIONS[:2])
    said = consult(Consultation(script, simulator(), path=path), [":scores", ":script", ":hint", ":what", *QUESTIONS[2:]])
    out = capsys.readouterr().out
    assert "stops: farewell" in out and "privacy 100%" in out and script.case.private.contact in out and ":quit" in out
    assert load_transcripts(path) == [said] and [t.doctor for t in said.turns] == QUESTIONS
    assert said == consult(Consultation(script, simulator()), QUESTIONS, lambda line: None)    # as if never interrupted
    with pytest.raises(UserError, match="name another file"): Consultation(pick_script(seed=6), simulator(), path=path)
    path.write_text('{"script": 3}\n')
    with pytest.raises(UserError, match="talk.jsonl:1"): Consultation(script, simulator(), path=path)


def m2kit(*args, stdin=""):
    return subprocess.run([Path(sys.executable).with_name("m2kit"), "consult", *map(str, args)], input=stdin, capture_output=True, text=True, timeout=300)

def test_the_command_with_the_tiny_models(tmp_path):
    r = m2kit("--condition", "gout", "--seed", 3, "--save", tmp_path/"talk.jsonl", stdin=":hint\nWhat brings you here today?\nGoodbye.\n")
    assert r.returncode == 0, r.stderr
    assert "patient>" in r.stdout and "gate:" in r.stdout and "checker:" in r.stdout and "the script's diagnosis: gout" in r.stdout
    assert load_transcripts(tmp_path/"talk.jsonl")[0].turns

@pytest.mark.parametrize("args, says", [(["--case", "absent.json"], "cannot be read"), (["--condition", "gouty"], "gout"), (["--model", "tiny:patien"], "patient"), (["--model", "http://x/v1"], "#NAME"),
                                        (["--number", "x"], "--number")])
def test_wrong_words_exit_2(args, says):
    r = m2kit(*args)
    assert (r.returncode, r.stderr.count("\n")) == (2, 1) and says in r.stderr and "Traceback" not in r.stderr


@needs_osce
def test_a_real_server_plays_real_cases(serve, tmp_path):
    "The tiny patient behind `transformers serve`: what it says of a real case is poor, and every dialogue still ends, by name, with all of it on record."
    from m2kit.tiny.patient import tiny_patient
    scripts = [Script.of(c, seed=0) for c in load_agentclinic(OSCE)[:3]]
    for url in serve(str(tiny_patient())):
        server = ServerModel(url, str(tiny_patient()), concurrency=2, name="served")
        def run(): return simulate(scripts, QUESTIONS, PatientSimulator(Logged(server, CallLog(tmp_path/"calls.jsonl")), gate=FunctionModel(gate, "gate"), checker=FunctionModel(nothing, "checker")))
        first = run()
        assert [t.ended for t in first] == ["farewell"]*3 and all(r.reply for t in first for r in t.turns[:3])
        before = len(CallLog(tmp_path/"calls.jsonl"))
        assert before >= 9 and run() == first and len(CallLog(tmp_path/"calls.jsonl")) == before   # again, from the record
