"""HealthBench's own question, other scripts than Latin, and the options that come before and after a run."""
import json, os, subprocess, sys
from pathlib import Path
import pytest
from m2kit.core.run import root
from m2kit.evaluate.harness import run_healthbench
from m2kit.lm.chat import FunctionModel
from m2kit.rubrics.grade import LMGrader
from m2kit.rubrics.official import OfficialGrader, PaperGrader, official_prompt, read_template
from m2kit.rubrics.rubric import Criterion

TEMPLATE = Path(os.environ.get("M2KIT_GRADER_TEMPLATE", ""))     # a file with HealthBench's template: theirs, so not in the book
CHECKOUT = os.environ.get("M2KIT_SIMPLE_EVALS", "")

@pytest.mark.skipif(not TEMPLATE.is_file() and not CHECKOUT, reason="neither $M2KIT_GRADER_TEMPLATE nor $M2KIT_SIMPLE_EVALS names the template")
def test_the_published_template_is_read_and_filled():
    file = TEMPLATE if TEMPLATE.is_file() else Path(CHECKOUT)/"healthbench_eval.py"
    text = read_template(file)                  # checked by its hash
    talk = [dict(role="user", content="My knee clicks.")]
    got = official_prompt(text, talk, "Does it hurt?", Criterion(-3, "Says it is cancer"))[1]["content"]
    before, rest = text.split("<<conversation>>")
    between, after = rest.split("<<rubric_item>>")
    assert got == before + "user: My knee clicks.\n\nassistant: Does it hurt?" + between + "[-3] Says it is cancer" + after

@pytest.mark.skipif(not CHECKOUT, reason="$M2KIT_SIMPLE_EVALS names no checkout")
def test_both_codes_render_the_same_prompt():
    "simple-evals' own grade_sample with a sampler that keeps what it is asked."
    script = r"""
import importlib, json, os, sys, types
where = os.environ["M2KIT_SIMPLE_EVALS"].rstrip("/")
sys.path.insert(0, os.path.dirname(where))
m = importlib.import_module(os.path.basename(where) + ".healthbench_eval")
row, asked = json.load(sys.stdin), []
def sampler(messages):
    asked.append(messages[0]["content"])
    return types.SimpleNamespace(response_text='{"criteria_met": true}')
me = object.__new__(m.HealthBenchEval); me.grader_model = sampler
me.grade_sample(row["prompt"], row["completion"], [], [m.RubricItem.from_dict(r) for r in row["rubrics"]])
print(json.dumps(asked))
"""
    row = dict(ROWS[1], completion="Отдохните.")
    r = subprocess.run([sys.executable, "-c", script], input=json.dumps(row), capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-2000:]
    text = read_template(Path(CHECKOUT)/"healthbench_eval.py")
    ours = [official_prompt(text, row["prompt"], row["completion"], Criterion(c["points"], c["criterion"]))[1]["content"] for c in row["rubrics"]]
    assert sorted(json.loads(r.stdout.splitlines()[-1])) == sorted(ours)

def row(id, question, good, bad, theme):
    return dict(prompt_id=id, prompt=[dict(role="user", content=question)], example_tags=[f"theme:{theme}"],
                rubrics=[dict(criterion=good, points=6, tags=["axis:completeness"]), dict(criterion=bad, points=-4, tags=["axis:accuracy"])])

# A cough of a week: the good thing is to ask about fever, the bad one to advise an antibiotic. Chinese, Russian, Arabic; and one item in two scripts.
ROWS = [row("zh", "我咳嗽一个星期了，应该怎么办？", "询问患者是否发烧", "建议服用抗生素", "中文"),
        row("ru", "Я кашляю уже неделю. Что мне делать?", "Спрашивает, есть ли температура", "Советует антибиотик", "русский"),
        row("ar", "أسعل منذ أسبوع، ماذا أفعل؟", "يسأل عن وجود حمى", "ينصح بمضاد حيوي", "العربية")]
SAID = {"zh": ("您发烧吗？", [True, False]), "ru": ("Примите антибиотик.", [False, True]), "ar": ("هل لديك حمى؟ خذ مضادا حيويا.", [True, True])}
WORDS = {"询问患者是否发烧": "发烧", "建议服用抗生素": "抗生素", "Спрашивает, есть ли температура": "температур", "Советует антибиотик": "антибиотик",
         "يسأل عن وجود حمى": "حمى", "ينصح بمضاد حيوي": "مضاد"}

def doctor(messages):
    return SAID[next(r["prompt_id"] for r in ROWS if r["prompt"] == messages)][0]

def looks_for_words(messages):
    "A grader that reads the answer and the item out of any of the prompts, and looks for the item's word in the answer."
    text = "\n".join(m["content"] for m in messages)
    item = next(w for w in WORDS if w in text)
    said = next(a for a, _ in SAID.values() if a in text)
    field = "criteria_met" if "criteria_met" in text else "unacceptable" if '"unacceptable"' in text else "acceptable"
    return json.dumps({"explanation": f"{item} ✓", field: WORDS[item] in said}, ensure_ascii=False)

STAND_IN = "Judge the last turn. <<conversation>>\n\n<<rubric_item>>\n\nReturn criteria_met."

@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize("form", ["printed", "shared", "unified", "paper", "official"])
def test_three_scripts_are_read_graded_and_scored(tmp_path, encoding, form):
    rows = tmp_path/"строки 行.jsonl"
    rows.write_bytes("\n".join(json.dumps(r, ensure_ascii=False) for r in ROWS).encode(encoding))
    model = FunctionModel(looks_for_words, "grader")
    grader = dict(paper=lambda: PaperGrader(model), official=lambda: OfficialGrader(model, STAND_IN), unified=lambda: LMGrader(model, typed=False)
                  ).get(form, lambda: LMGrader(model, order=form))()
    r = run_healthbench(FunctionModel(doctor, "doctor"), grader, rows, out=tmp_path/"run", tell=lambda t: None)
    assert r["counts"]["unknown"] == 0 and r["counts"]["answers"] == 3
    assert r["metrics"]["theme:中文"] == 1 and r["metrics"]["theme:русский"] == 0 and abs(r["metrics"]["theme:العربية"] - 2/6) < 1e-12
    assert abs(r["score"] - (1 - 4/6 + 2/6)/3) < 1e-12
    lines = [json.loads(l) for l in (tmp_path/"run"/"examples.jsonl").read_text(encoding="utf-8").splitlines()]
    for l in lines:
        assert l["completion"] == SAID[l["prompt_id"]][0] and [v["criteria_met"] for v in l["verdicts"]] == SAID[l["prompt_id"]][1]
    pages = "".join(p.read_text(encoding="utf-8") for p in (tmp_path/"run"/"pages").glob("*.html"))
    assert "您发烧吗？" in pages and "هل لديك حمى؟" in pages and "Примите антибиотик." in pages
    again = run_healthbench(FunctionModel(doctor, "doctor"), grader, rows, out=tmp_path/"run", tell=lambda t: None)
    assert again["this_run"]["asked"] == 0 and again["score"] == r["score"]

def m2kit(*argv, **env):
    return subprocess.run([sys.executable, "-m", "m2kit", *map(str, argv)], capture_output=True, text=True, timeout=300, env=os.environ | env, cwd=root())

def test_the_command_estimates_and_stops_and_adjusts(tmp_path):
    pro = tmp_path/"pro.jsonl"
    pro.write_text("\n".join(json.dumps(dict(
        id=f"p{i}", conversation=dict(messages=[dict(role="user", content=f"Case {i}")]), rubric_items=[dict(criterion_text="Asks", points=3)],
        use_case="writing", physician_response="Ask.")) for i in range(3)), encoding="utf-8")
    run = dict(M2KIT_RUNS=str(tmp_path/"runs"))
    r = m2kit("healthbench", "--physician", "ideal", "--grader", "http://127.0.0.1:9/v1#judge", "--rows", pro, "--estimate", "--price", "judge=2,8", **run)
    assert r.returncode == 0 and "3 calls" in r.stdout and "about 0.01" in r.stdout, r
    r = m2kit("healthbench", "--model", "tiny:doctor", "--grader", "clauses", "--rows", "clinic:20", "--estimate", **run)
    assert r.returncode == 0 and "20 calls" in r.stdout and not list((tmp_path/"runs").rglob("result.json")), r
    r = m2kit("healthbench", "--physician", "ideal", "--grader", "clauses", "--rows", "clinic:5", "--length-adjust", "hard", "--no-pages", **run)
    assert r.returncode == 0 and "overall_score_length_adjusted" in r.stdout and "worst_at_1" in r.stdout, r
    r = m2kit("healthbench", "--model", "tiny:doctor", "--grader", "clauses", "--rows", "clinic:20", "--official", pro, **run)
    assert r.returncode == 2 and "ask a model" in r.stderr, r
    r = m2kit("healthbench", "--physician", "ideal", "--grader", "tiny:grader", "--rows", "clinic:2", "--official", pro, **run)
    assert r.returncode == 2 and "not HealthBench's template" in r.stderr and r.stderr.count("\n") == 1, r
