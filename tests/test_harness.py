"""The HealthBench run where a chapter cannot show it: real rows against the reference, a server with every fault, kill -9 at twenty points, five thousand rows. No row is ever printed (they carry a canary)."""
import base64, json, os, random, re, subprocess, sys, threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
import pytest
from m2kit.core.errors import UserError
from m2kit.core.run import root
from m2kit.evaluate.clinic_rows import TextClauses, clinic_rows, write_clinic_rows
from m2kit.evaluate.harness import run_healthbench
from m2kit.evaluate.healthbench import aggregate, parse_row, read_rows
from m2kit.evaluate.meta import run_meta
from m2kit.lm.chat import FunctionModel
from m2kit.lm.server import ServerModel

INPUTS = Path(os.environ.get("M2KIT_INPUTS") or root().parent/"shared"/"data")
DATA, EXPECTED = INPUTS/"healthbench_21.jsonl", INPUTS/"healthbench_21_expected.json"
real = pytest.mark.skipif(not (DATA.exists() and EXPECTED.exists()), reason="healthbench_21.jsonl is not in $M2KIT_INPUTS")
QUIET = dict(tell=lambda text: None, pages=False, bootstrap=50)

def lines(path): return [json.loads(l) for l in Path(path).read_text(encoding="utf-8").splitlines()]
def differing(got, want): return sorted(k for k in set(got) | set(want) if got.get(k) != want.get(k))
def lasting(result): return {k: v for k, v in result.items() if k != "this_run"}

def asked_about(messages):
    "(answer, criterion, name of the boolean) of a grading prompt."
    part = lambda name: re.search(rf"<{name}>\n(.*?)\n</{name}>", messages[-1]["content"], re.S)[1]
    return part("answer"), part("criterion"), "unacceptable" if '"unacceptable"' in messages[0]["content"] else "acceptable"

# --- real rows

@real
def test_recorded_verdicts_give_the_reference_scores(tmp_path):
    r, want = run_healthbench("recorded", "recorded", DATA, out=tmp_path, **QUIET), json.loads(EXPECTED.read_text())
    got = {k: v for k, v in r["metrics"].items() if not k.endswith(":bootstrap_std")}
    assert sorted(got) == sorted(want) and differing(got, want) == [] and r["score"] == want["overall_score"]
    scores = [d["score"] for d in lines(tmp_path/"examples.jsonl")]
    assert len(scores) == 21 and min(scores) < 0 and sum(s < 0 for s in scores) == r["counts"]["negative"]
    assert r["counts"]["unknown"] == r["counts"]["left out"] == r["counts"]["accepted"] == 0          # none of the real rubrics is doubtful
    assert differing(aggregate(read_rows(tmp_path/"examples.jsonl"), bootstrap=50), r["metrics"]) == []               # what was written scores the same

@real
@pytest.mark.parametrize("form", [dict(), dict(order="shared"), dict(typed=False)], ids=["typed", "shared", "unified"])
def test_a_grader_that_says_the_same_gives_the_same(tmp_path, form):
    said = {(r.completion, c.text): v.met for r in read_rows(DATA) for c, v in zip(r.rubrics, r.verdicts)}
    unmark = lambda text: re.sub(r"&lt;(?=\s*/?\s*(?:conversation|answer|criterion)\b)", "<", text)      # what the prompt escapes
    def reply(messages):
        answer, criterion, name = asked_about(messages)
        if form: name = "criteria_met" if "typed" in form else re.search(r'"((?:un)?acceptable)": true', messages[-1]["content"].rpartition("</answer>")[2])[1]
        return json.dumps({"explanation": "as recorded", name: said[unmark(answer), unmark(criterion)]})
    r, want = run_healthbench("recorded", FunctionModel(reply, "parrot"), DATA, out=tmp_path, chunk=5, grading=form, **QUIET), json.loads(EXPECTED.read_text())
    assert differing({k: r["metrics"][k] for k in want}, want) == [] and r["this_run"]["asked"] == len({k for k in said}) == 249

@real
def test_pages_hold_no_markup_but_their_own(tmp_path):
    run_healthbench("recorded", "recorded", DATA, out=tmp_path, **QUIET | dict(pages=True))
    pages = sorted((tmp_path/"pages").iterdir())
    assert len(pages) == 21 and (tmp_path/"index.html").read_text(encoding="utf-8").count('href="pages/') == 21
    own = set("html head meta title style body p a h1 h2 b div table thead tr th tbody td".split())
    assert all({t.lower() for t in re.findall(r"<([a-zA-Z]\w*)", p.read_text(encoding="utf-8"))} <= own for p in pages)

@real
def test_physicians_answers(tmp_path):
    count = lambda **kw: run_healthbench(None, FunctionModel(lambda m: json.dumps({"explanation": "", asked_about(m)[2]: True}), "yes"), DATA, out=tmp_path/str(kw), **kw, **QUIET)["counts"]
    rows = list(read_rows(DATA))
    assert count(physician="ideal")["answers"] == sum(r.ideal is not None for r in rows) == 16
    assert count(physician="ideal", group=1)["answers"] == sum(r.group == "Group 1" for r in rows) == 2
    assert count(physician="references")["answers"] == 4*sum(r.group in ("Group 2", "Group 3") for r in rows) == 56
    with pytest.raises(UserError, match="no row has reference answers by a physician of group 1"): count(physician="references", group=1)

@real
def test_meta_evaluation_against_recorded_verdicts(tmp_path):
    said = {(r.completion, c.text): v.met for r in read_rows(DATA) for c, v in zip(r.rubrics, r.verdicts)}
    def reply(messages, flip):
        answer, criterion, name = asked_about(messages)
        return json.dumps({"explanation": "", name: said[answer, criterion] != (random.Random(criterion).random() < flip)})
    same = run_meta(FunctionModel(lambda m: reply(m, 0), "same"), DATA, out=tmp_path/"a", tell=lambda t: None)
    assert same["metrics"]["pairwise_model_f1_balanced"] == 1 and same["counts"]["verdicts"] == 249
    flawed = run_meta(FunctionModel(lambda m: reply(m, .2), "flawed"), DATA, out=tmp_path/"b", tell=lambda t: None)
    wrong = sum(random.Random(c).random() < .2 for _, c in said)
    assert flawed["agreement"]["share"] == 1 - wrong/249 and .6 < flawed["metrics"]["pairwise_model_f1_balanced"] < .95
    assert {"points:positive", "points:negative", "axis:accuracy"} <= {k.split(": ")[0] for k in flawed["metrics"]}

# --- rows that cannot be used

def spoilt(rows):
    "Ten kinds of spoilt rows, and what is said of each."
    base = lambda i: json.loads(json.dumps(rows[i]))
    def edit(i, f): d = base(i); f(d); return d
    first = lambda d: d["rubrics"][0]
    bad = [(edit(0, lambda d: d.update(rubrics=[])), "rubric is empty"), (edit(1, lambda d: [c.update(points=-abs(c["points"])) for c in d["rubrics"]]), "no positive points"),
           (edit(2, lambda d: first(d).update(points=11)), "criterion 1: points are 11"), (edit(3, lambda d: first(d).update(points=2.5)), "write a whole number"),
           (edit(4, lambda d: d["rubrics"].append(first(d))), "say the same; remove one"), (edit(5, lambda d: d["rubrics"].append(first(d) | dict(points=-4))), "once for points and once against"),
           (edit(6, lambda d: d["rubrics"].append(first(d) | dict(criterion="Does not name " + first(d)["criterion"][6:]))), "are opposites, and both are rewarded"),
           (edit(7, lambda d: d["prompt"].append(dict(role="user", content=None))), "content is of type NoneType"), (edit(8, lambda d: d.update(prompt_id=rows[20]["prompt_id"])), "prompt_id is that of line"),
           (edit(9, lambda d: d.pop("example_tags")), "example_tags is missing")]
    return bad

def test_spoilt_rows_are_named_and_cost_nobody_else(tmp_path):
    rows = list(clinic_rows(30))
    bad = spoilt(rows)
    f, clean = tmp_path/"rows.jsonl", tmp_path/"clean.jsonl"
    texts = [json.dumps(d) for d in rows[10:]]
    for i, (d, _) in enumerate(bad): texts.insert(2*i + 12, json.dumps(d))
    texts.insert(7, '{"prompt_id": "torn')
    f.write_text("\n".join(texts)); clean.write_text("\n".join(json.dumps(d) for d in rows[10:]))
    model = FunctionModel(lambda m: "You have gout.", "gout")
    r, want = (run_healthbench(model, "clauses", p, out=tmp_path/p.stem, chunk=4, **QUIET) for p in (f, clean))
    assert differing(r["metrics"], want["metrics"]) == [] and r["counts"]["answers"] == 20 and r["counts"]["left out"] == 11
    failures = lines(tmp_path/"rows"/"failures.jsonl")
    assert [x["line"] for x in failures] == [8] + [2*i + 14 for i in range(9)] + [31]
    for x, (d, says) in zip(failures[1:], bad): assert says in x["fault"] and x["prompt_id"] == d["prompt_id"] and "\n" not in x["fault"]
    assert "not JSON" in failures[0]["fault"]
    lenient = run_healthbench(model, "clauses", f, out=tmp_path/"lenient", lenient=True, **QUIET)        # as the reference would: doubtful rubrics are scored, and still reported
    assert (lenient["counts"]["left out"], lenient["counts"]["accepted"], lenient["counts"]["answers"]) == (8, 3, 23)

# --- a server with every fault

FAULTS = ("429", "500", "stall", "torn", "types", "early")

class Faulty(ThreadingHTTPServer):
    "A doctor and a grader. Each fault strikes one try in five, independently of the others; which, is drawn from the request itself."
    request_queue_size, daemon_threads, handle_error = 128, True, lambda *a: None
    def __init__(self, reply, share):
        self.reply, self.share, self.tries, self.injected, self.lock, self.stop = reply, share, {}, dict.fromkeys(FAULTS, 0), threading.Lock(), threading.Event()
        super().__init__(("127.0.0.1", 0), Handler)
    @property
    def url(self): return f"http://127.0.0.1:{self.server_port}/v1"
    def fault(self, body):
        key = json.dumps([body["model"], body["messages"], body["seed"]])
        with self.lock:
            k = self.tries[key] = self.tries.get(key, 0) + 1
            rng = random.Random(f"{key}/{k}")
            struck = [f for f in FAULTS if rng.random() < self.share.get(f, 0)]
            if struck: self.injected[(f := rng.choice(struck))] += 1; return f

class Handler(BaseHTTPRequestHandler):
    protocol_version, wbufsize, log_message = "HTTP/1.1", -1, lambda *a: None
    def do_POST(self):
        body, s = json.loads(self.rfile.read(int(self.headers["Content-Length"]))), self.server
        fault, text = s.fault(body), s.reply(body)
        if fault == "stall": s.stop.wait(5); self.close_connection = True; return
        wrong = random.Random(text).choice((7, None, ["a"], dict(a=1), True))
        data = json.dumps(dict(choices=[dict(message=dict(content=wrong if fault == "types" else text), finish_reason="stop")], usage=dict(prompt_tokens=3, completion_tokens=4))).encode()
        if fault == "torn": data = data[:len(data)//2]
        self.send_response(int(fault) if fault in ("429", "500") else 200)
        if fault == "429": self.send_header("Retry-After", "0.01")
        self.send_header("Content-Length", str(len(data) + 100*(fault == "early")))                      # promises more than it sends, and hangs up
        self.end_headers(); self.wfile.write(data)
        self.close_connection = fault == "early"

@contextmanager
def faulty(reply, share):
    s = Faulty(reply, share)
    threading.Thread(target=s.serve_forever, args=(.01,), daemon=True).start()
    try: yield s
    finally: s.stop.set(); s.shutdown(); s.server_close()

class Clinic:
    "What the server says: a doctor of the clinic, and the lookup behind typed questions."
    def __init__(self, n, mumbles=0.):
        self.rows, self.mumbles = list(clinic_rows(n)), mumbles
        self.answers = {d["prompt"][-1]["content"]: d["ideal_completions_data"]["ideal_completions_ref_completions"][0] for d in self.rows}
        items = [(d["prompt"], self.answers[d["prompt"][-1]["content"]], parse_row(d).rubrics) for d in self.rows]
        self.verdicts = {(text, c.text): v.met for (_, text, cs), vs in zip(items, TextClauses().grade(items)) for c, v in zip(cs, vs)}
    def __call__(self, body):
        if body["model"] == "doctor": return self.answers[body["messages"][-1]["content"]]
        answer, criterion, name = asked_about(body["messages"])
        text = json.dumps({"explanation": "looked up", name: self.verdicts[answer, criterion]})
        u = random.Random(f"{answer}{criterion}{body['seed']}").random()
        return text if u >= self.mumbles else text[:-8] if u < self.mumbles/2 else json.dumps({"explanation": "hm", name: [name]})   # torn, or of a wrong type

def through(s, rows, out, patience=40, **kw):
    models = (ServerModel(s.url, name, concurrency=16, retries=patience, timeout=.6, backoff=2e-5) for name in ("doctor", "grader"))
    return run_healthbench(*models, rows, out=out, **QUIET, **kw)

@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    "The same run without any fault."
    tmp = tmp_path_factory.mktemp("calm")
    rows, clinic = write_clinic_rows(tmp/"rows.jsonl", 12), Clinic(12)
    with faulty(clinic, {}) as s: return rows, clinic, through(s, rows, tmp/"out"), lines(tmp/"out"/"examples.jsonl")

def test_a_calm_server_agrees_with_the_lookup(calm, tmp_path):
    rows, clinic, want, _ = calm
    lookup = run_healthbench(FunctionModel(lambda m: clinic.answers[m[-1]["content"]], "doctor"), "clauses", rows, out=tmp_path, **QUIET)
    assert differing(lookup["metrics"], want["metrics"]) == [] and want["counts"]["unknown"] == 0

def test_six_faults_at_one_in_five_each(calm, tmp_path):
    rows, clinic, want, examples = calm
    with faulty(clinic, dict.fromkeys(FAULTS, .2)) as s:
        r = through(s, rows, tmp_path)
        assert min(s.injected.values()) >= 20 and sum(s.injected.values()) > .6*sum(s.tries.values())      # most tries fail: 1 - 0.8**6 = 74%
    assert differing(lasting(r), lasting(want)) == [] and lines(tmp_path/"examples.jsonl") == examples    # and yet nothing is lost, nothing unknown

@pytest.mark.parametrize("fault", FAULTS)
def test_without_patience_what_is_lost_is_counted(calm, tmp_path, fault):
    rows, clinic, want, _ = calm
    with faulty(clinic, {fault: .2}) as s: r = through(s, rows, tmp_path, patience=0, grading=dict(retries=0))
    n, m = r["counts"], r["metrics"]
    assert n["conversations"] == n["answers"] == 12 and n["verdicts"] == want["counts"]["verdicts"]
    assert n["unknown"] > 0 and n["unknown"] == sum(v["criteria_met"] is None for d in lines(tmp_path/"examples.jsonl") for v in d["verdicts"]) == m["unknown_verdicts"]
    for name in want["by_repeat"]: assert m[f"{name}:lowest"] - 1e-12 <= want["metrics"][name] <= m[f"{name}:highest"] + 1e-12, name
    with faulty(clinic, {}) as s: assert differing(through(s, rows, tmp_path, grading=dict(retries=0))["metrics"], want["metrics"]) == []   # the server is well again: the same command asks for the rest
    assert 0 < len(s.tries) < want["counts"]["verdicts"] + 12

def test_replies_that_cannot_be_read_are_asked_again_and_then_unknown(calm, tmp_path):
    rows, clinic, want, _ = calm
    with faulty(Clinic(12, mumbles=.4), {}) as s: r = through(s, rows, tmp_path)
    n = r["counts"]
    assert .01 < n["unknown"]/n["verdicts"] < .15                                                       # 0.4**3 = 6%
    assert r["grader"]["asked_again"] > n["unknown"] and sum(r["grader"]["faults"].values()) == r["grader"]["replies"] - (n["verdicts"] - n["unknown"])
    assert r["metrics"]["overall_score:lowest"] <= want["score"] <= r["metrics"]["overall_score:highest"]
    assert r["metrics"]["overall_score:highest"] - r["metrics"]["overall_score:lowest"] > 0

def test_a_model_that_never_answers_stops_the_run(tmp_path):
    rows = write_clinic_rows(tmp_path/"rows.jsonl", 3)
    with faulty(Clinic(3), {"500": 1.}) as s, pytest.raises(UserError, match="none of the first 3 answers could be used; the first: the server said 500"): through(s, rows, tmp_path/"out", patience=1)

# --- kill -9

SPAWN = """
import hashlib, json, os, random, shutil, signal, sys, time
from pathlib import Path
from m2kit.evaluate.harness import run_healthbench
from m2kit.lm.chat import FunctionModel
rows, folder, points = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
digest = lambda m: hashlib.sha256(json.dumps(m).encode()).digest()

def doctor(messages): time.sleep(.001); return "Rest it. "*(digest(messages)[0] % 5 + 1)
def grader(messages):
    time.sleep(.001)
    if digest(messages)[1] < 30: return "hm"
    return json.dumps({"explanation": "x"*200, "acceptable" if '"acceptable"' in messages[0]["content"] else "unacceptable": digest(messages)[0] % 2 == 0})
def go(out): return run_healthbench(FunctionModel(doctor, "doctor"), FunctionModel(grader, "grader"), rows, out=out, repeats=2, chunk=3, pages=False, bootstrap=50, tell=lambda t: None)

def fork(out):
    if pid := os.fork(): return pid
    try: go(out); os._exit(0)
    except BaseException as e: print(repr(e), file=sys.stderr); os._exit(1)

def kept(out):
    r = json.loads((out/"result.json").read_text())
    asked = r.pop("this_run")["asked"]
    return [r, (out/"examples.jsonl").read_text(), (out/"failures.jsonl").read_text()], asked

began = time.monotonic()
assert os.waitpid(fork(folder/"whole"), 0)[1] == 0
whole, (want, asked) = time.monotonic() - began, kept(folder/"whole")
rng, report = random.Random(7), []
for k in range(points):
    out = folder/(f"killed-{k}" if k < points//2 else "chain")
    wait = whole*rng.random()*(1 if k < points//2 else .35)
    pid = fork(out); time.sleep(wait); os.kill(pid, signal.SIGKILL)
    died = os.waitpid(pid, 0)[1]
    calls = sum(p.read_bytes().count(b"\\n") for p in out.glob("calls/*.jsonl"))
    if k < points//2 or k == points - 1:
        assert os.waitpid(fork(out), 0)[1] == 0
        got, again = kept(out)
        report.append(dict(k=k, killed=died == 9, calls=calls, of=asked, same=got == want, asked_again=again))
    else: report.append(dict(k=k, killed=died == 9, calls=calls, of=asked))
print(json.dumps(report))
"""

@pytest.mark.parametrize("points", [8, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_points_it_resumes_to_the_same_result(tmp_path, points):
    "Half of the points are of a run of their own each, the others of one run that is killed again and again."
    rows = write_clinic_rows(tmp_path/"rows.jsonl", 9)
    p = subprocess.run([sys.executable, "-c", SPAWN, str(rows), str(tmp_path), str(points)], capture_output=True, text=True, timeout=300)
    assert p.returncode == 0, p.stderr[-2000:]
    report = json.loads(p.stdout)
    ended = [r for r in report if "same" in r]
    assert len(report) == points and sum(r["killed"] for r in report) >= .75*points and len(ended) == points//2 + 1
    assert all(r["same"] for r in ended)
    assert all(r["asked_again"] == r["of"] - r["calls"] for r in ended), ended                             # no call that was on record is made again
    assert len({r["calls"] for r in ended}) > points/4 and any(0 < r["calls"] < r["of"] for r in ended)    # at different points, indeed

SERVED = SPAWN.replace(next(l for l in SPAWN.splitlines() if l.startswith("def go(")), """
from m2kit.lm.server import ServerModel
def go(out):
    models = [ServerModel(sys.argv[4], name, concurrency=16, retries=40, timeout=9, backoff=2e-5) for name in ("doctor", "grader")]
    return run_healthbench(*models, rows, out=out, pages=False, bootstrap=50, tell=lambda t: None)
""")

def killed_beside_a_faulty_server(tmp_path, points):
    "One run to its end, then runs of the same that are killed at random points; a fifth of all tries fails."
    rows = write_clinic_rows(tmp_path/"rows.jsonl", 12)
    with faulty(Clinic(12), {"429": .05, "500": .05, "torn": .05, "early": .05}) as s:
        p = subprocess.run([sys.executable, "-c", SERVED, str(rows), str(tmp_path), str(points), s.url], capture_output=True, text=True, timeout=900)
        assert p.returncode == 0, p.stderr[-2000:]
        assert sum(s.injected.values()) > .1*sum(s.tries.values()) > 20
    report = json.loads(p.stdout)
    ended = [r for r in report if "same" in r]
    assert len(report) == points and all(r["same"] for r in ended) and any(r["killed"] for r in report)
    assert all(r["asked_again"] == r["of"] - r["calls"] for r in ended), ended
    return ended

def test_killed_beside_a_faulty_server(tmp_path): assert len(killed_beside_a_faulty_server(tmp_path, 3)) >= 2

@pytest.mark.long
def test_killed_at_twenty_points_beside_a_faulty_server(tmp_path): assert len(killed_beside_a_faulty_server(tmp_path, 20)) == 11

# --- secrets

@pytest.mark.parametrize("key", ["sk-secret-key-1\n", "  sk-secret-key-1 "])
@pytest.mark.parametrize("status", [200, 400, 500])
def test_nothing_of_a_key_is_in_any_file_of_a_run(tmp_path, key, status):
    rows = write_clinic_rows(tmp_path/"rows.jsonl", 2)
    class Echo(BaseHTTPRequestHandler):
        "Sends all it was sent back: headers and address, as an answer, as a verdict's explanation, or as an error."
        log_message = lambda *a: None
        def do_POST(self):
            model = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["model"]
            said = json.dumps(dict(self.headers, path=self.path))
            text = said if model == "doctor" else json.dumps(dict(explanation=said, acceptable=True) | dict(unacceptable=False))
            bad = status != 200 and model == "grader"
            body = json.dumps(dict(error=dict(message=said)) if bad else dict(choices=[dict(message=dict(content=text), finish_reason="stop")])).encode()
            self.send_response(status if bad else 200)
            self.send_header("X-Echo", self.headers["Authorization"])
            self.send_header("Content-Length", str(len(body))); self.end_headers(); self.wfile.write(body)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    threading.Thread(target=server.serve_forever, args=(.01,), daemon=True).start()
    there = f"http://someone:pass-word-2@127.0.0.1:{server.server_port}/v1?token=query-token-3"
    out, said = tmp_path/"out", ""
    try: run_healthbench(f"{there}#doctor", f"{there}#grader", rows, out=out, **QUIET | dict(pages=True), options=dict(api_key=key, retries=0), grading=dict(retries=0))
    except UserError as e: said = str(e)
    finally: server.shutdown(); server.server_close()
    assert (status == 200) == (not said) and (out/"run.json").exists() and any((out/"calls").iterdir())
    written = said + "".join(p.read_text(encoding="utf-8") for p in out.rglob("*") if p.is_file())
    assert "[secret]" in written
    basic = base64.b64encode(b"someone:pass-word-2").decode()
    for secret in ("secret-key-1", "pass-word-2", "query-token-3", basic): assert secret not in written, secret

def test_a_key_that_cannot_be_one_is_not_shown(tmp_path):
    rows = write_clinic_rows(tmp_path/"rows.jsonl", 1)
    with pytest.raises(UserError, match="not shown") as e:
        run_healthbench("http://127.0.0.1:9/v1#m", "clauses", rows, out=tmp_path/"out", **QUIET, options=dict(api_key="sk-secret key"))
    assert "secret key" not in str(e.value) and not (tmp_path/"out").exists()                              # and no folder is left

def test_a_folder_belongs_to_one_process_and_one_run(tmp_path):
    from filelock import FileLock
    rows = write_clinic_rows(tmp_path/"rows.jsonl", 3)
    go = lambda **kw: run_healthbench(physician="ideal", grader="clauses", rows=rows, out=tmp_path/"out", **QUIET | kw)
    go()
    with FileLock(tmp_path/"out"/".lock"), pytest.raises(UserError, match="another process is at work"): go()
    with pytest.raises(UserError, match="another seed; choose another --out"): go(seed=1)
    assert go(limit=2)["counts"]["answers"] == 2

# --- memory

LONG = """
import json, resource, sys
from m2kit.evaluate.harness import run_healthbench
from m2kit.lm.chat import FunctionModel
rows, out = sys.argv[1:]
judge = lambda m: json.dumps({"explanation": "because", "acceptable": len(m[-1]["content"]) % 2 == 0})
r = run_healthbench(FunctionModel(lambda m: "Rest it. "*99 + m[-1]["content"][:14], "doctor"), FunctionModel(judge, "judge"), rows, out=out, bootstrap=20, tell=lambda t: None)
print(json.dumps(dict(mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024, **r["counts"])))
"""

def peak(tmp_path, n):
    rows = tmp_path/f"{n}.jsonl"
    with open(rows, "w") as f:
        for i in range(n):
            f.write(json.dumps(dict(prompt_id=f"row-{i}", prompt=[dict(role="user", content=f"Question {i}. " + "My knee hurts. "*400)], example_tags=[f"theme:{i % 7}"],
                                    rubrics=[dict(criterion=f"Says thing {j}", points=5, tags=[f"axis:{(i + j) % 5}"]) for j in range(1)])) + "\n")
    p = subprocess.run([sys.executable, "-c", LONG, str(rows), str(tmp_path/str(n))], capture_output=True, text=True, timeout=300)
    assert p.returncode == 0, p.stderr[-2000:]
    r = json.loads(p.stdout)
    assert r["conversations"] == n and r["verdicts"] == n
    return r["mb"], sum(f.stat().st_size for f in (tmp_path/str(n)).rglob("*") if f.is_file())/2**20

def test_memory_is_flat_from_100_to_5000_rows(tmp_path):
    (few, _), (many, written) = peak(tmp_path, 100), peak(tmp_path, 5000)
    assert many - few < 8, f"{few:.0f} MB for 100 rows, {many:.0f} MB for 5000"
    assert written > 10*(many - few) and written > 50                                                     # so little of what passed through stayed
