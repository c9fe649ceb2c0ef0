"What the chapters of lm/ cannot show by themselves: a server with every fault, a real server, kill -9, several processes."
import json, os, random, signal, subprocess, sys, threading, time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
import pytest
from conftest import wait_for
from m2kit.core.errors import UserError
from m2kit.lm.chat import Sampling, answer_seed, dialogue
from m2kit.lm.log import CallLog, Logged, Replay
from m2kit.lm.server import ServerModel

FAULTS = ("429", "500", "stall", "torn", "early")

class FaultServer(ThreadingHTTPServer):
    "Echoes the last message. Which try of which row fails, and how, is drawn from the row itself: the same in any order of arrival."
    request_queue_size, daemon_threads, handle_error = 128, True, lambda *a: None
    def __init__(self, share, delay=.002, die_after=None):
        self.share, self.delay, self.die_after, self.lock, self.stop = share, delay, die_after, threading.Lock(), threading.Event()
        self.tries, self.injected, self.now, self.most, self.answers = {}, dict.fromkeys(FAULTS, 0), 0, 0, 0
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self): return f"http://127.0.0.1:{self.server_port}/v1"
    @property
    def dead(self): return self.die_after is not None and self.answers >= self.die_after

    def fault(self, text):
        with self.lock:
            k = self.tries[text] = self.tries.get(text, 0) + 1
            u = random.Random(f"{text}/{k}").random()
            for name, share in self.share.items():
                if u < share: self.injected[name] += 1; return name
                u -= share

class Handler(BaseHTTPRequestHandler):
    protocol_version, wbufsize, log_message = "HTTP/1.1", -1, lambda *a: None
    def do_POST(self):
        text, s = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][-1]["content"], self.server
        with s.lock: s.now += 1; s.most = max(s.most, s.now)
        time.sleep(s.delay)
        with s.lock: s.now -= 1
        if s.dead: self.close_connection = True; return
        self.answer(s.fault(text), json.dumps(dict(choices=[dict(message=dict(content=f"heard: {text}"), finish_reason="stop")], usage=dict(prompt_tokens=3, completion_tokens=4))).encode())

    def answer(self, fault, body):
        if fault == "stall": self.server.stop.wait(5); self.close_connection = True; return
        if fault == "torn": body = body[:len(body)//2]
        self.send_response(int(fault) if fault in ("429", "500") else 200)
        if fault == "429": self.send_header("Retry-After", "0.01")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body) + 100*(fault == "early")))        # promises more than it sends, and hangs up
        self.end_headers(); self.wfile.write(body)
        self.close_connection = fault == "early"
        if not fault:
            with self.server.lock: self.server.answers += 1
            if self.server.dead: threading.Thread(target=self.server.server_close).start()

@contextmanager
def faulty(share, **kw):
    s = FaultServer(share, **kw)
    threading.Thread(target=s.serve_forever, args=(.01,), daemon=True).start()
    try: yield s
    finally: s.stop.set(); s.shutdown(); s.server_close()

ROWS = [dialogue(f"Case {i}: my knee hurts.") for i in range(80)]

def check_all(s, retries=15):
    heard, stalls = [], "stall" in s.share
    model = ServerModel(s.url, "toy", concurrency=8, retries=retries, timeout=1 if stalls else 20, backoff=.01)
    out = model.chat(ROWS, on_done=lambda i, c: heard.append((i, c)))
    assert [c.text for c in out] == [f"heard: {d[-1]['content']}" for d in ROWS]           # every row, in its place
    assert sorted(i for i, _ in heard) == list(range(len(ROWS))) and all(out[i] == c for i, c in heard)
    extra = sum(s.tries.values()) - len(ROWS) - sum(s.injected.values())                   # one try more for each fault, none besides;
    assert extra == 0 or stalls and extra > 0                                              # with a short timeout, a loaded machine may add some

@pytest.mark.parametrize("fault", FAULTS)
def test_one_fault_in_five_tries(fault):
    with faulty({fault: .2}) as s:
        check_all(s)
        assert s.injected[fault] >= 8 and s.most <= 8 if fault != "stall" else s.injected[fault] >= 8

def test_all_faults_at_once():
    with faulty(dict.fromkeys(FAULTS, .12)) as s:
        check_all(s, retries=25)
        assert min(s.injected.values()) >= 5

def test_faults_without_patience_cost_only_their_own_rows():
    with faulty({"500": .2}) as s:
        out = ServerModel(s.url, "toy", retries=0).chat(ROWS)
        failed = [c for c in out if not c.ok]
        assert len(failed) == s.injected["500"] > 0 and all("said 500" in c.error and c.text == "" for c in failed)
        assert sum(c.ok for c in out) == len(ROWS) - len(failed)

@pytest.mark.parametrize("bound", [1, 3, 16])
def test_concurrency_is_bounded_and_used(bound):
    with faulty({}, delay=.03) as s:
        ServerModel(s.url, "toy", concurrency=bound).chat(ROWS[:48])
        assert s.most <= bound and s.most >= min(bound, 3)

def test_a_server_that_dies_loses_no_answer(tmp_path):
    with faulty({}, die_after=20) as s:
        log, t = CallLog(tmp_path/"calls.jsonl"), time.time()
        model = Logged(ServerModel(s.url, "toy", retries=3, backoff=.01), log)
        out = model.chat(ROWS)
        done = sum(c.ok for c in out)
        assert 20 <= done < 30 and len(log) == done and time.time() - t < 20
        assert all("connection lost" in c.error for c in out if not c.ok)
    with faulty({}) as s:                                                                  # it is back: only the rest is asked
        again = Logged(ServerModel(s.url, "toy"), log)
        assert all(c.ok for c in again.chat(ROWS)) and again.asked == len(ROWS) - done == sum(s.tries.values())

def test_nobody_there_is_one_line():
    with faulty({}) as s: url = s.url
    with pytest.raises(UserError, match="no server answers at"): ServerModel(url, "toy", retries=2, backoff=.01).chat(ROWS*20)

def test_ctrl_c_ends_a_batch():
    with faulty({"stall": 1.0}) as s:
        code = f"from m2kit.lm.server import ServerModel; from m2kit.lm.chat import dialogue; ServerModel({s.url!r}, 'toy').chat([dialogue('x')]*20)"
        p = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
        wait_for(lambda: s.injected["stall"] >= 8)
        p.send_signal(signal.SIGINT)
        err = p.communicate(timeout=10)[1]
        assert p.returncode and err.strip().endswith("KeyboardInterrupt") and "was destroyed" not in err

# --- the call log under kill -9 and among processes

CHILD = """
import json, os, sys, time
from pathlib import Path
from m2kit.lm.chat import Completion, Sampling, answer_seed, dialogue, sample_indices
from m2kit.lm.log import CallLog, Logged
log, asked, out, n, pause, salt, together = sys.argv[1:]

class Dice:
    name = "dice"
    def chat(self, dialogues, sampling=Sampling(), samples=None, on_done=None):
        answers = []
        for i, (d, k) in enumerate(zip(dialogues, samples)):
            with open(asked, "a") as f: f.write(f"{d[-1]['content'][:8]}/{k}\\n")
            time.sleep(float(pause))
            answers.append(Completion(f"{answer_seed(d, sampling, k)}{salt} " + "x"*5000, 3, 1))
            on_done(i, answers[-1])
        return answers

n, here = int(n), Path(out).parent
(here/f"ready-{Path(out).name}").touch()
while len(list(here.glob("ready-*"))) < int(together): time.sleep(.002)                    # nobody starts before all are up
batch = [dialogue(f"case {i % (n//3):03d} " + "y"*3000) for i in range(n)]                 # three samples of each dialogue
at = n//9*int(salt.split()[-1]) if salt else 0                                             # each begins elsewhere, so each has something to give
answers = Logged(Dice(), CallLog(log)).chat(batch[at:] + batch[:at])
with open(out, "w") as f: json.dump(sorted(c.text for c in answers), f)
"""

def child(tmp_path, log, tag, n=120, pause=.01, salt="", together=1):
    args = [str(tmp_path/log), str(tmp_path/f"asked-{tag}"), str(tmp_path/f"out-{tag}"), str(n), str(pause), salt, str(together)]
    return subprocess.Popen([sys.executable, "-c", CHILD, *args])

def asked(tmp_path, tag): return (tmp_path/f"asked-{tag}").read_text().split("\n")[:-1]
def answers(tmp_path, tag): return json.loads((tmp_path/f"out-{tag}").read_text())
def lines(path): return path.read_bytes().count(b"\n") if path.exists() else 0

@pytest.mark.parametrize("seed", [1, 2, 3])
def test_killed_batches_resume_where_they_were(tmp_path, seed):
    assert child(tmp_path, "whole.jsonl", "whole").wait(60) == 0
    log, rng = tmp_path/"calls.jsonl", random.Random(seed)
    for k in range(3):
        goal = lines(log) + rng.randint(1, 20)
        p = child(tmp_path, "calls.jsonl", k)
        wait_for(lambda: lines(log) >= goal)
        time.sleep(rng.random()*.012)                                                      # anywhere between one call and the next
        p.kill(); assert p.wait(10) == -signal.SIGKILL
        if k == 1:
            with open(log, "ab") as f: f.write(b'{"key": "0123')                         # a line torn in the middle, for certain
    before = {f"{r['messages'][-1]['content'][:8]}/{r['sample']}" for r in CallLog(log).rows()}
    assert 0 < len(before) < 120
    assert child(tmp_path, "calls.jsonl", "last").wait(60) == 0
    assert sorted(asked(tmp_path, "last")) == sorted(set(asked(tmp_path, "whole")) - before)   # exactly the missing
    assert answers(tmp_path, "last") == answers(tmp_path, "whole")
    assert len(CallLog(log)) == lines(log) == 120

def test_several_processes_share_a_log(tmp_path):
    ps = [child(tmp_path, "calls.jsonl", j, n=900, pause=.001, salt=f" by {j}", together=3) for j in range(3)]   # the late ones catch up, and then they race
    assert [p.wait(60) for p in ps] == [0, 0, 0]
    assert lines(tmp_path/"calls.jsonl") == len(CallLog(tmp_path/"calls.jsonl")) == 900    # every call once, every line whole
    assert answers(tmp_path, 0) == answers(tmp_path, 1) == answers(tmp_path, 2)            # the first answer is the answer, for all
    assert len({t.split()[2] for t in answers(tmp_path, 0)}) > 1                           # though more than one of them gave some

# --- a real server, up in some ten seconds

@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    "A random Qwen3 of one layer with a byte-level tokenizer, as an ordinary checkpoint."
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
    path, bpe = tmp_path_factory.mktemp("checkpoint"), ByteLevelBPETokenizer()
    bpe.train_from_iterator(["My knee hurts after a long walk.", "How long has it hurt?"], vocab_size=300, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"], show_progress=False)
    tok = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tok.chat_template = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
                         "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    torch.manual_seed(0)
    net = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tok), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
                                       max_position_embeddings=256, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id, bos_token_id=None, tie_word_embeddings=True, initializer_range=.3))
    net.generation_config.do_sample = True                                                 # or the server ignores the temperature
    net.save_pretrained(path); tok.save_pretrained(path)
    return path

@pytest.fixture(scope="module")
def served(checkpoint, serve): yield from serve(checkpoint)

def test_transformers_serve(checkpoint, served, tmp_path):
    from m2kit.lm.local import LocalModel
    rows = [dialogue("My knee hurts."), dialogue("How long?", "A week.", "Why?", system="You are a doctor."), dialogue("Hm.")]
    server, local = ServerModel(served, str(checkpoint), concurrency=1, name="tiny"), LocalModel(checkpoint)
    greedy = Sampling(temperature=0, max_tokens=16)
    ours, theirs = local.chat(rows, greedy), server.chat(rows, greedy)
    assert [c.text.strip() for c in theirs] == [c.text.strip() for c in ours]               # the same model, on either side of HTTP (the server strips)
    assert len({c.text for c in ours}) == 3
    assert [(c.prompt_tokens, c.finish) for c in theirs] == [(c.prompt_tokens, c.finish) for c in ours]

    warm = Sampling(max_tokens=16, seed=5)
    logged = Logged(server, CallLog(tmp_path/"calls.jsonl"))
    first = logged.chat(rows + rows[:1], warm)
    assert all(c.ok for c in first) and first[0].text != first[3].text                     # two samples of one dialogue
    assert server.chat(rows + rows[:1], warm) == first                                     # its seeds hold, one request at a time
    assert logged.chat(rows + rows[:1], warm) == first == Replay(CallLog(logged.log.path), "tiny").chat(rows + rows[:1], warm)
    assert (logged.asked, logged.found) == (4, 4)

    text = theirs[0].text
    stop = next(p for p in map("".join, zip(text[1:], text[2:])) if p.isascii() and p.isalnum())
    cut = server.chat(rows[:1], Sampling(temperature=0, max_tokens=16, stop=stop))[0]
    assert (cut.text, cut.finish) == (text[:text.index(stop)], "stop")                     # the server leaves the stop text in; we do not
    wrong = ServerModel(served, "no/such-model", retries=0).chat(rows)
    assert all("no/such-model" in c.error for c in wrong)
