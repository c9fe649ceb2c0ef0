"What the chapters of simulator/ cannot show by themselves: any combination of broken models, company in a batch, kill -9, a server, a context that is too short."
import json, os, random, signal, subprocess, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import pytest
from m2kit.clinic.persona import draw_script
from m2kit.core.errors import UserError
from m2kit.core.run import fingerprint
from m2kit.lm.chat import Completion, Sampling
from m2kit.lm.log import CallLog, Logged
from m2kit.simulator.affect import MONOLITH
from m2kit.simulator.calls import freerun, lockstep
from m2kit.simulator.facts import FactualUnit, sentences
from m2kit.simulator.gate import TerminationGate
from m2kit.simulator.patient import PatientSimulator, load_transcripts, save_transcripts, simulate

SCRIPTS = [draw_script(random.Random(i)) for i in range(6)]

class Whim:
    "Answers one of `texts`, by the hash of the question and the sample: the same whatever the company, never the same twice."
    def __init__(self, name, *texts): self.name, self.texts = name, texts
    def chat(self, dialogues, sampling=Sampling(), samples=None, on_done=None):
        def one(d, k):
            x = random.Random(fingerprint(self.name, d, sampling.identity, k)).choice(self.texts)
            return x if isinstance(x, Completion) else Completion(x)
        return [one(d, k) for d, k in zip(dialogues, samples or [0]*len(dialogues))]

RUBBISH = ("", " \n ", "null", "{}", "[]", '{"faults": 3}', '{"trigger": 7}', '{"trigger": ["farewell"]}', '{"faults": [{"sentence": -1}]}', "У меня кашель.", "word "*10_000, "<think>hm", "</think>", "\ud800", "\x00",
           "[END]", "Doctor: Hello.\nPatient: Yes.", Completion("Yes. And", finish="length"), Completion("", finish="error", error="timeout"), "{"*5000, "<|im_end|>", "...", "。！", "| <b>*_`[")
FINE = ("Since May.", "Yes, I do. It hurts at night.", "No.")
CLEAR, OBJECT = ('{"faults": []}',)*4, ('{"faults": [{"sentence": 1, "kind": "leak"}]}', '{"faults": [{"sentence": 2, "kind": "fabrication"}, {"sentence": 9, "kind": "leak"}]}')
NONE, STOP = ('{"trigger": "none"}',)*9, ('{"trigger": "farewell"}', '{"trigger": "diagnosis"}')

def chatty(name, n=30): return [f"{name}, question {i}?" for i in range(n)]

def whims(seed, **kw):
    "A simulator whose models are partly mad, and its doctor."
    return PatientSimulator(Whim(f"p{seed}", *FINE, *RUBBISH), TerminationGate(Whim(f"g{seed}", *NONE, *STOP, *RUBBISH), max_turns=8), FactualUnit(Whim(f"c{seed}", *CLEAR, *OBJECT, *RUBBISH), **kw), **dict(sampling=Sampling(seed=seed)))

@pytest.mark.parametrize("on_error", ("mark", "refuse"))
def test_any_mad_models_end_within_bounds(on_error, tmp_path):
    "240 dialogues with models that answer anything: bounded, recorded, and nothing is said that a readable check objected to."
    for seed in range(20):
        sim = whims(seed, on_error=on_error)
        ts = simulate(SCRIPTS, Whim(f"d{seed}", *chatty("Sir"), *RUBBISH), sim)
        for t in ts:
            assert len(t.turns) <= 8 and t.ended in ("farewell", "diagnosis", "repetition", "budget", "error")
            assert t._repr_html_() and t._repr_markdown_() and "\n<b>" not in t._repr_html_()
            for r in t.turns:
                assert all(r.calls.get(u, 0) <= n for u, n in sim.worst_case.items()), r.calls
                assert (r.reply is None) == (r.action == "stopped") and (r.reply is None or r.reply.strip())
                assert (r.action == "safe") == any(x.done == "safe answer" for x in r.troubles)
                objected = {f.span for s in r.steps for f in s.check.faults if s.check is r.steps[-1].check}
                assert not r.reply or not objected & set(sentences(r.reply)), r
                if on_error == "refuse": assert not r.unchecked
        assert load_transcripts(save_transcripts(ts, tmp_path/"t.jsonl")) == ts

def test_worst_case_is_reached():
    "The documented bound is the exact one: a patient who needs every redraw and a checker that objects to every draft but repairs nothing."
    class Twice(Whim):
        def chat(self, dialogues, sampling=Sampling(), samples=None, on_done=None): return [Completion("" if k % 2 == 0 else "In May. In spring.") for k in samples]
    sim = PatientSimulator(Twice("p"), Whim("g", NONE[0]), Whim("c", OBJECT[0]))
    (t,) = simulate(SCRIPTS[:1], chatty("Madam", 3), sim)
    assert sim.worst_case == dict(gate=1, affect=6, facts=4) and all(r.calls == sim.worst_case and r.action == "safe" for r in t.turns)
    for d in range(3):
        for r in range(3):
            sim = PatientSimulator(Whim("p", ""), Whim("g", NONE[0]), FactualUnit(Whim("c", OBJECT[0]), resamples=r), redraws=d)
            assert sum(sim.worst_case.values()) == 1 + (1 + r)*(1 + d) + (r + 2)

def test_company_does_not_matter():
    "The same dialogues alone, together, in another order, in lock-step and in threads."
    sim, doctors = whims(3), [chatty(f"You {i}", 12) for i in range(6)]
    ts = simulate(SCRIPTS, doctors, sim)
    assert len({t.ended for t in ts}) > 1
    assert ts == [simulate([s], [d], sim)[0] for s, d in zip(SCRIPTS, doctors)]
    assert ts == simulate(SCRIPTS[::-1], doctors[::-1], sim)[::-1]
    assert ts == simulate(SCRIPTS, doctors, sim, driver="freerun")

def test_equal_dialogues_are_different_samples():
    sim = PatientSimulator(Whim("p", *map(str, range(1000))))
    ts = simulate([SCRIPTS[0]]*4, chatty("Sir", 4), sim)
    assert len({t.dialogue[1]["content"] for t in ts}) == 4 and [t.settings["sample"] for t in ts] == [0, 1, 2, 3]
    assert simulate([SCRIPTS[0]], chatty("Sir", 4), sim, samples=[2]) == [ts[2]]
    assert simulate([SCRIPTS[0]], chatty("Sir", 4), PatientSimulator(sim.affect.model, sampling=Sampling(temperature=.7, max_tokens=96, seed=1)))[0].dialogue != ts[0].dialogue

def test_a_training_loop_steps_turn_by_turn():
    "`replies`, called once a turn, says what `simulate` says."
    sim, doctors = whims(5), [chatty(f"You {i}", 5) for i in range(6)]
    ts, talks, open_ = simulate(SCRIPTS, doctors, sim), [[] for _ in SCRIPTS], list(range(6))
    for n in range(5):
        for i in open_: talks[i].append(dict(role="assistant", content=doctors[i][n]))
        records = sim.replies([SCRIPTS[i] for i in open_], [talks[i] for i in open_])
        for i, r in zip(open_, records): talks[i] += [dict(role="user", content=r.reply)]*(r.reply is not None)
        open_ = [i for i, r in zip(open_, records) if r.reply is not None]
    assert talks == [t.dialogue for t in ts]

# A patient of half a million random weights: its replies are noise, but they come from a real network in real batches.
@pytest.fixture(scope="module")
def noise():
    torch = pytest.importorskip("torch")
    from m2kit.lm.local import LocalModel
    from m2kit.tiny.model import make_model, make_tokenizer
    torch.set_num_threads(1)
    tok = make_tokenizer([s.text() for s in SCRIPTS], blocks=(MONOLITH,), vocab=400)
    return LocalModel(make_model(tok, context=900), tok, name="noise")

def test_a_network_in_batches(noise):
    "Batches of one and of six give the same transcript, and so does the log without a model."
    sim = PatientSimulator(noise, sampling=Sampling(temperature=.9, max_tokens=12), redraws=0)
    ts = simulate(SCRIPTS, chatty("Sir", 3), sim)
    assert ts == [simulate([s], chatty("Sir", 3), sim)[0] for s in SCRIPTS]

def test_a_network_resumes_from_half_a_log(noise, tmp_path):
    "Half of the answers come from the log and the others from batches that never were before: the same transcripts. A model that remembers prefixes gives them too."
    from m2kit.lm.prefix import PrefixModel
    log, draws = tmp_path/"calls.jsonl", dict(sampling=Sampling(temperature=.9, max_tokens=12), redraws=0)
    run = lambda model: simulate(SCRIPTS, chatty("Sir", 3), PatientSimulator(model, **draws))
    ts = run(Logged(noise, CallLog(log)))
    assert run(PrefixModel(noise.model, noise.tok, name="noise")) == ts
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(random.Random(0).sample(lines, len(lines)//2)))
    half = Logged(noise, CallLog(log))
    assert run(half) == ts and (half.found, half.asked) == (len(lines)//2, len(lines) - len(lines)//2)

def test_one_prompt_too_long_for_the_context(noise):
    "It costs that dialogue a safe answer, named, and the others nothing; a model that can answer nobody is the user's to mend."
    sim = PatientSimulator(noise, sampling=Sampling(temperature=.9, max_tokens=12), redraws=0, max_heard=5000)
    doctors = [["Since when?"]]*5 + [["word "*1500]]
    ts = simulate(SCRIPTS, doctors, sim)
    assert ts[5].turns[0].action == "safe" and "exceed the 900 positions" in str(ts[5].troubles[0][1])
    assert ts[:5] == simulate(SCRIPTS[:5], doctors[:5], sim)
    with pytest.raises(UserError, match="900 positions"): simulate(SCRIPTS[5:], doctors[5:], sim)

SLOW = """
import sys, time; sys.path.insert(0, {tests!r})
from test_simulator import *
class Slow(Whim):
    def chat(self, *a, **kw): time.sleep(.03); return super().chat(*a, **kw)
def run(log):
    log = CallLog(log)
    sim = PatientSimulator(*(Logged(Slow(n, *t), log, chunk=2) for n, t in (("p", FINE + RUBBISH[:4]), ("g", NONE), ("c", CLEAR + OBJECT))))
    return simulate(SCRIPTS, Logged(Slow("d", *chatty("Sir")), log, chunk=2), sim, max_turns=6)
if __name__ == "__main__": save_transcripts(run(sys.argv[1]), sys.argv[2])
"""

def test_killed_midway_goes_on_from_the_log(tmp_path):
    "kill -9 in the middle of six dialogues; the same program run again asks only for what is missing, and comes to the same transcripts."
    script, tests = tmp_path/"slow.py", os.path.dirname(os.path.abspath(__file__))
    script.write_text(SLOW.format(tests=tests))
    start = lambda log, out: subprocess.Popen([sys.executable, script, log, out], env=dict(os.environ, OMP_NUM_THREADS="1"))
    lines = lambda p: p.read_bytes().count(b"\n") if p.exists() else 0
    assert start(tmp_path/"whole.jsonl", tmp_path/"whole.out").wait(60) == 0
    total = lines(tmp_path/"whole.jsonl")
    p = start(tmp_path/"cut.jsonl", tmp_path/"cut.out")
    try:
        deadline = time.monotonic() + 60
        while lines(tmp_path/"cut.jsonl") < total//2 and time.monotonic() < deadline: time.sleep(.005)
    finally: p.send_signal(signal.SIGKILL); p.wait()
    had = lines(tmp_path/"cut.jsonl")
    assert total//2 <= had < total and not (tmp_path/"cut.out").exists()
    assert start(tmp_path/"cut.jsonl", tmp_path/"cut.out").wait(60) == 0
    assert load_transcripts(tmp_path/"cut.out") == load_transcripts(tmp_path/"whole.out")
    assert lines(tmp_path/"cut.jsonl") == total                     # nothing was asked twice

class Clinic(BaseHTTPRequestHandler):
    "An OpenAI-compatible server with two models; answers after a while that depends on the question."
    protocol_version, log_message = "HTTP/1.1", lambda *a: None
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        s, model, messages = self.server, body["model"], body["messages"]
        with s.lock: s.now += 1; s.most = max(s.most, s.now)
        time.sleep(random.Random(messages[-1]["content"]).uniform(.001, .03))
        text = Whim(model, *dict(patient=FINE + RUBBISH[:6], checker=CLEAR + OBJECT, gate=NONE)[model]).chat([messages], samples=[body["seed"]])[0].text
        with s.lock: s.now -= 1
        out = json.dumps(dict(choices=[dict(message=dict(content=text), finish_reason="stop")])).encode()
        self.send_response(200); self.send_header("Content-Type", "application/json"); self.send_header("Content-Length", str(len(out))); self.end_headers(); self.wfile.write(out)

def test_free_running_over_a_server():
    "Dialogues run free over a real socket, never more than the server's share at a time, and come out as in lock-step."
    from m2kit.lm.server import ServerModel
    server = ThreadingHTTPServer(("127.0.0.1", 0), Clinic)
    server.lock, server.now, server.most = threading.Lock(), 0, 0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/v1"
        sim = PatientSimulator(*(ServerModel(url, m, concurrency=4) for m in ("patient", "gate", "checker")))
        free = simulate(SCRIPTS, chatty("Sir", 2), sim)
        assert 1 < server.most <= 4
        assert free == simulate(SCRIPTS, chatty("Sir", 2), sim, driver="lockstep")
    finally: server.shutdown(); server.server_close()
    gone = PatientSimulator(ServerModel(url, "patient", retries=0, backoff=.01))
    for driver in ("lockstep", "freerun"):
        with pytest.raises(UserError, match="no server answers"): simulate(SCRIPTS, chatty("Sir", 4), gone, driver=driver)

def test_an_exception_ends_all(tmp_path):
    "A bug in a model is no fault of the dialogue: it comes out, from either driver, and quickly."
    class Bug(Whim):
        def chat(self, *a, **kw): raise ZeroDivisionError("bug")
    for run in (lockstep, freerun):
        with pytest.raises(ZeroDivisionError): run([PatientSimulator(Bug("b")).turn(s, [dict(role="assistant", content="Hello?")]) for s in SCRIPTS])

def test_importing_costs_no_torch():
    code = "import sys, m2kit.simulator.patient; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'matplotlib')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
