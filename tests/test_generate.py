"""The generator under bad replies, bad rows and kills: every source ends as a rubric or as a named failure, and nothing else is lost."""
import json, random, subprocess, sys
from collections import Counter
import pytest
from m2kit.clinic.synthesize import draw_case
from m2kit.core.errors import UserError
from m2kit.lm.chat import Completion, FunctionModel, Sampling
from m2kit.lm.log import CallLog, Logged
from m2kit.rubrics.agreement import LMReferee, compare_all
from m2kit.rubrics.experts import expert, full_points
from m2kit.rubrics.generate import Generator, from_case, from_question, generate_file, read_rows, read_rubric_reply, writing_prompt

CASES = [draw_case(random.Random(i)) for i in range(60)]
RUBRICS = {c.id: expert(full_points(c), random.Random(c.id), c.id) for c in CASES}
SOURCES = [from_case(c) for c in CASES]
BY_PROMPT = {writing_prompt(s)[1]["content"]: s.id for s in SOURCES}

def reply_for(id): return json.dumps(dict(criteria=RUBRICS[id].to_dict()["criteria"]))

def spoil(text, rng):
    "The reply with one of the ways in which replies go wrong."
    d = json.loads(text); c = rng.choice(d["criteria"])
    kind = rng.choice(("torn", "prose", "fence", "type", "range", "double", "against", "none", "empty", "negative", "think", "noise"))
    if kind == "torn": return text[:rng.randrange(len(text))]
    if kind == "prose": return f"Of course! {text} I hope this helps."
    if kind == "fence": return f"```json\n{text}\n```"
    if kind == "type": c["points"] = rng.choice(("7", [7], None, {}, True, "many"))
    if kind == "range": c["points"] = rng.choice((11, -400, 0, 7.5, 1e400))
    if kind == "double": d["criteria"].append(dict(c))
    if kind == "against": d["criteria"].append(dict(c, points=-c["points"]))
    if kind == "none": d["criteria"] = []
    if kind == "negative": d["criteria"] = [dict(x, points=-abs(x["points"])) for x in d["criteria"]]
    if kind == "empty": return ""
    if kind == "think": return "<think>" + text
    if kind == "noise": return "".join(rng.choice('{}[]":, \\ntrue0') for _ in range(200))
    return json.dumps(d)

@pytest.mark.parametrize("seed", range(4))
def test_nothing_is_lost_when_replies_are_bad(seed):
    rng = random.Random(seed)
    model = FunctionModel(lambda m: spoil(reply_for(BY_PROMPT[m[1]["content"]]), rng) if rng.random() < .7 else reply_for(BY_PROMPT[m[1]["content"]]))
    g = Generator(model)
    rubrics, failures = g.generate(SOURCES)
    ids = [r.id for r in rubrics] + [f.id for f in failures]
    assert sorted(ids) == sorted(s.id for s in SOURCES) and len(rubrics) > 40
    assert [r.id for r in rubrics] == [s.id for s in SOURCES if s.id in {r.id for r in rubrics}]     # in the sources' order
    assert g.report.failed == len(failures) and len(SOURCES) < g.report.replies <= 3*len(SOURCES)
    assert sum(g.report.faults.values()) and sum(g.report.repairs.values())
    for r in rubrics: assert all(-10 <= p <= 10 and p for p in r.points) and r.best > 0
    untouched = {r.id for r in rubrics if [(c.points, c.text) for c in r] == [(c.points, c.text) for c in RUBRICS[r.id]]}
    assert len(untouched) > 20                                                                        # a good reply comes through as it is

class Cut(FunctionModel):
    "A model whose replies end at a limit, all but the last of its tries."
    def __init__(self, whole_from): super().__init__(lambda m: ""); self.whole_from, self.calls = whole_from, 0
    def chat(self, dialogues, sampling=Sampling(), samples=None, on_done=None):
        self.calls += 1
        text = lambda m: reply_for(BY_PROMPT[m[1]["content"]])
        return [Completion(text(d)) if self.calls >= self.whole_from else Completion(text(d)[:len(text(d))*2//3], finish="length") for d in dialogues]

def test_a_reply_that_was_cut_is_asked_for_again_and_kept_only_in_need():
    whole = Generator(Cut(2)).generate(SOURCES[:3])[0]
    assert [len(r) for r in whole] == [len(RUBRICS[s.id]) for s in SOURCES[:3]]
    g = Generator(Cut(9)); short = g.generate(SOURCES[:3])[0]
    assert g.report.repairs["cut off"] == 3 and all(0 < len(r) < len(RUBRICS[r.id]) for r in short)

def test_errors_of_the_model_are_failures_of_their_source_only():
    class Half(FunctionModel):
        def chat(self, dialogues, *a, **k):
            return [Completion("", finish="error", error="503") if i % 2 else Completion(reply_for(BY_PROMPT[d[1]["content"]])) for i, d in enumerate(dialogues)]
    rubrics, failures = Generator(Half(lambda m: ""), retries=0).generate(SOURCES[:10])
    assert len(rubrics) == 5 and all("503" in f.reason for f in failures)

@pytest.mark.parametrize("seed", range(5))
def test_rows_of_any_kind_are_sound_or_reported_with_their_id(seed):
    rng = random.Random(seed); rows = []
    for c in CASES:
        d = RUBRICS[c.id].to_dict(); x = rng.choice(d["criteria"])
        rng.choice((lambda: None, lambda: d.update(criteria=[]), lambda: d.pop("criteria"), lambda: x.update(points=rng.choice((99, "five", None, 0))), lambda: d["criteria"].append(dict(x)),
                    lambda: d["criteria"].append(dict(x, points=-x["points"])), lambda: d.update(criteria="none"), lambda: x.update(text=7), lambda: d["criteria"].insert(0, [])))()
        rows.append(d if rng.random() < .9 else json.dumps(d)[:rng.randrange(5, 50)])
    good, bad = read_rows(rows)
    assert len(good) + len(bad) == len(rows)
    whole = {c.id: RUBRICS[c.id] for c in CASES}
    assert all(r.points == whole[r.id].points for r in good)                        # strict: what comes through is what stood there
    assert all(f.id in f.reason for f in bad)
    lenient, still = read_rows(rows, strict=False, repairs=(n := Counter()))
    assert len(lenient) + len(still) == len(rows) and len(lenient) > len(good) and sum(n.values())

def test_a_killed_run_goes_on_where_it_was(tmp_path):
    (tmp_path/"in.jsonl").write_text("\n".join(c.model_dump_json() for c in CASES[:20]))
    asked = []
    def fn(m):
        asked.append(m[1]["content"])
        if len(asked) == 12: raise KeyboardInterrupt
        return reply_for(BY_PROMPT[m[1]["content"]])
    run = lambda: generate_file(Logged(FunctionModel(fn), CallLog(tmp_path/"calls.jsonl")), tmp_path/"in.jsonl", tmp_path/"out.jsonl")
    with pytest.raises(KeyboardInterrupt): run()
    assert not (tmp_path/"out.jsonl").exists()
    n, fails, _ = run()
    assert (n, fails) == (20, []) and len(asked) == 21                              # the one that was cut off is asked again, no other
    assert len((tmp_path/"out.jsonl").read_text().splitlines()) == 20

def test_the_private_part_reaches_no_prompt():
    for c in CASES:
        text = writing_prompt(from_case(c))[1]["content"]
        assert not any(v in text for v in c.secrets().values() if v != "none")

def test_two_sources_with_one_id_are_refused():
    with pytest.raises(UserError, match="the id q is taken"): Generator(FunctionModel(lambda m: "")).generate([from_question("a", "q"), from_question("b", "q")])

def test_a_referee_without_a_verdict_is_counted():
    pairs = list(RUBRICS.values())[:4]
    rows, lost = compare_all(pairs, pairs, LMReferee(FunctionModel(lambda m: "no idea")))
    assert rows == [{}]*4 and lost == 8

def test_deeply_nested_and_huge_replies_end():
    for text in ("["*5000, '{"a":'*3000, '{"criteria": [' + '{"text": "x", "points": 1},'*3000):
        try: read_rubric_reply(text, "deep")
        except ValueError as e: assert str(e)

def test_cheap_modules_bring_no_torch():
    code = "import sys, m2kit.rubrics.generate, m2kit.rubrics.construct, m2kit.rubrics.prompts, m2kit.rubrics.experts, m2kit.rubrics.agreement; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
