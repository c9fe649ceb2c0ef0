"""HealthBench through our harness and through simple-evals, beside each other: one loopback server, the same rows.

    python tests/bench_server.py                       5 ms, 20 ms and 1 s a request
    python tests/bench_server.py --latency 5 --rows 40

Simple-evals' own code where $M2KIT_SIMPLE_EVALS names its checkout (it needs blobfile and pandas); else its way of asking,
written down again: 120 rows at a time, each in a thread, and in each as many threads for the rubric as there are cores.
Both run in processes of their own, by default settings; time counts from the first request to the result."""
import argparse, asyncio, importlib, json, os, random, resource, subprocess, sys, tempfile, time
from multiprocessing.pool import ThreadPool
from pathlib import Path

def rows(n, seed=0):
    "Rows of invented text, as long as the benchmark's: 7 to 17 criteria, 12 on average."
    rng, words = random.Random(seed), "knee pain after long walks since Monday with some swelling and no fever at night".split()
    text = lambda k: " ".join(rng.choices(words, k=k))
    for i in range(n):
        rubric = [dict(criterion=f"Says {j}: {text(25)}", points=rng.choice([3, 5, -4]) if j else 5, tags=["axis:accuracy"])
                  for j in range(rng.randint(7, 17))]
        yield dict(prompt_id=f"row-{i}", prompt=[dict(role="user", content=f"{i}: {text(200)}")], rubrics=rubric,
                   example_tags=["theme:knee"], ideal_completions_data=None)

# --- the server: one process, no threads, the same bytes for everybody

def body(text):
    usage = dict(prompt_tokens=700, completion_tokens=90, total_tokens=790, prompt_tokens_details=dict(cached_tokens=0),
                 completion_tokens_details=dict(reasoning_tokens=0))
    choice = dict(index=0, finish_reason="stop", message=dict(role="assistant", content=text))
    data = json.dumps(dict(id="c", object="chat.completion", created=0, model="m", choices=[choice], usage=usage)).encode()
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(data), data)

WHY = "The answer says so in its second sentence, and nothing that it says elsewhere takes it back. "*2
VERDICTS = {k: body(json.dumps({"explanation": WHY, k: True})) for k in ("acceptable", "unacceptable", "criteria_met")}
ANSWER = body("Rest the knee, cool it, and see a doctor if it swells. "*30)

def response(request):
    "What is sent back: a verdict to a question that names its field, an answer to anything else."
    name = next((k for k in VERDICTS if b'\\"%s\\"' % k.encode() in request), None)
    return VERDICTS[name] if name else ANSWER

class Line(asyncio.Protocol):
    "Answers each request after `latency` seconds."
    latency, asked, now, most = 0., 0, 0, 0
    def connection_made(self, transport): self.transport, self.data = transport, b""
    def data_received(self, data):
        self.data += data
        while (end := self.data.find(b"\r\n\r\n")) >= 0:
            head = self.data[:end].lower()
            size = int(head.split(b"content-length:")[1].split(b"\r\n")[0])
            if len(self.data) < end + 4 + size: return
            request, self.data = self.data[end + 4:end + 4 + size], self.data[end + 4 + size:]
            Line.asked, Line.now = Line.asked + 1, Line.now + 1
            Line.most = max(Line.most, Line.now)
            asyncio.get_running_loop().call_later(self.latency, self.answer, response(request))
    def answer(self, data): Line.now -= 1; self.transport.write(data)

async def serve(latency):
    Line.latency, loop = latency, asyncio.get_running_loop()
    server = await loop.create_server(Line, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    print(json.dumps(dict(asked=Line.asked, most=Line.most, cpu=time.process_time())), flush=True)

# --- the two clients

def ours(url, path, concurrency):
    from m2kit.evaluate.harness import run_healthbench
    from m2kit.lm.server import ServerModel
    import aiohttp, httpx2, openai                             # noqa: imports are not timed on either side
    began = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as tmp:
        doctor, grader = (ServerModel(url, name, concurrency=concurrency) for name in ("doctor", "grader"))
        run_healthbench(doctor, grader, path, out=tmp, bootstrap=0, pages=False, tell=lambda t: None)
        return began

def theirs(url, path, folder):
    folder = Path(folder).resolve()
    sys.path.insert(0, str(folder.parent))
    os.environ |= dict(OPENAI_BASE_URL=url, OPENAI_API_KEY="none")
    module = importlib.import_module(f"{folder.name}.healthbench_eval")
    sampler = importlib.import_module(f"{folder.name}.sampler.chat_completion_sampler").ChatCompletionSampler
    module.INPUT_PATH = str(path)
    began = time.perf_counter(), time.process_time()
    module.HealthBenchEval(grader_model=sampler(model="grader", max_tokens=2048))(sampler(model="doctor", max_tokens=2048))
    return began

def restated(url, path):
    "Their way of asking: a client for each of the two models, blocking calls, threads within threads."
    import openai
    doctor, grader = (openai.OpenAI(base_url=url, api_key="none") for _ in range(2))
    examples = [json.loads(line) for line in open(path)]
    def ask(client, messages):
        r = client.chat.completions.create(model="m", messages=messages, temperature=.5, max_tokens=2048)
        return r.choices[0].message.content
    def grade(talk, c):
        "One verdict."
        said = "\n\n".join(f"{m['role']}: {m['content']}" for m in talk)
        text = "Judge." + " Be exact."*300 + f'\n# Conversation\n{said}\n# Rubric item\n[{c["points"]}] {c["criterion"]}\nFill in "criteria_met".'
        return json.loads(ask(grader, [dict(role="user", content=text)]))["criteria_met"]
    def one(d):
        talk = d["prompt"] + [dict(role="assistant", content=ask(doctor, d["prompt"]))]
        with ThreadPool(min(os.cpu_count() or 10, len(d["rubrics"]))) as pool:
            return talk, list(pool.imap(lambda c: grade(talk, c), d["rubrics"]))
    began = time.perf_counter(), time.process_time()
    with ThreadPool(min(120, len(examples))) as pool: kept = list(pool.imap(one, examples))
    assert all(all(v) for _, v in kept)
    return began

def client(kind, url, path, concurrency):
    if kind == "ours": began = ours(url, path, concurrency)
    elif kind == "theirs": began = theirs(url, path, os.environ["M2KIT_SIMPLE_EVALS"])
    else: began = restated(url, path)
    used = dict(seconds=time.perf_counter() - began[0], cpu=time.process_time() - began[1])
    print(json.dumps(used | dict(mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024)))

# --- side by side

def measure(kind, latency, path, concurrency):
    "What one client takes, with a server of its own."
    me = [sys.executable, __file__]
    server = subprocess.Popen([*me, "--serve", str(latency)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    url = f"http://127.0.0.1:{int(server.stdout.readline())}/v1"
    more = ["--concurrency", str(concurrency)] if concurrency else []
    said = subprocess.run([*me, "--client", kind, url, str(path), *more], capture_output=True, text=True)
    if said.returncode: raise SystemExit(said.stderr[-3000:])
    of_server = json.loads(server.communicate("")[0].splitlines()[-1])
    return json.loads(said.stdout.splitlines()[-1]) | {k: of_server[k] for k in ("asked", "most")}

def compare(latencies, n, concurrency, kinds):
    with tempfile.TemporaryDirectory() as tmp:
        path = Path(tmp)/"rows.jsonl"
        path.write_text("".join(json.dumps(d) + "\n" for d in rows(n)))
        for latency in latencies:
            for kind in kinds:
                r = measure(kind, latency, path, concurrency)
                print(f"{1000*latency:5.0f} ms {kind:9} {r['asked']:6} requests {r['seconds']:7.1f} s {r['asked']/r['seconds']:7.0f} a second, "
                      f"at most {r['most']:4} at a time, {1000*r['cpu']/r['asked']:5.2f} ms CPU each, {r['mb']:4.0f} MB", flush=True)

if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--latency", type=float, nargs="+", default=[5, 20, 1000], metavar="MS")
    p.add_argument("--rows", type=int, default=105)
    p.add_argument("--concurrency", type=int, help="of ours; by default 64 growing to 256")
    p.add_argument("--only", help="ours, theirs or restated")
    p.add_argument("--serve", type=float, help=argparse.SUPPRESS)
    p.add_argument("--client", nargs=3, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.serve is not None: asyncio.run(serve(a.serve))
    elif a.client: client(*a.client, a.concurrency)
    else: compare([ms/1000 for ms in a.latency], a.rows, a.concurrency, [a.only] if a.only else
                  ["ours", "theirs" if os.environ.get("M2KIT_SIMPLE_EVALS") else "restated"])
