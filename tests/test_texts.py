"""What stands in a user's file, or in a model's reply, is shown and does nothing: not in a terminal, not on a page, not in a notebook."""
import contextlib, io, json, random
from html.parser import HTMLParser

import pytest
from m2kit.clinic.case import Case
from m2kit.clinic.persona import Script, draw_script
from m2kit.core.errors import markdown_text, visible
from m2kit.evaluate.pages import render
from m2kit.lm.chat import FunctionModel
from m2kit.reproduce.cli import main
from m2kit.rubrics.rubric import Criterion, Rubric, Verdict, as_markdown
from m2kit.service.consult import Consultation, page
from m2kit.simulator.patient import PatientSimulator

EVIL = "\x1b[2J\x1b]0;owned\x07<script>alert(1)</script><img src=x onerror=alert(1)>|a*b*_c_`d`[e](javascript:alert(1))$z$\u202e\\|~~f~~ <!-- &amp; {{ 7*7 }}\n# head\n- item"
GOOD = "a harmless text of some words"


def answers(text, name="m"):
    "A model that says the text in every place where something is asked."
    reply = dict(explanation=text, acceptable=True, criteria_met=True, preferred="A", winner="A", trigger="none", faults=[], criteria=[dict(dimension="treatment rationality", text=text, points=5)])
    return FunctionModel(lambda m: json.dumps(reply) if "JSON" in str(m) or '"trigger"' in str(m) else text, name)


@pytest.fixture
def files(tmp_path):
    def write(text):
        verdicts = [dict(criteria_met=True, explanation=text), dict(criteria_met=False, explanation=text)]
        criteria = [dict(criterion=text, points=5, tags=[f"axis:{text}"]), dict(criterion=f"{text} 2", points=-4, tags=[text])]
        row = lambda id: dict(prompt_id=id, prompt=[dict(role="user", content=text)], rubrics=criteria, example_tags=[f"theme:{text}"], completion=text, verdicts=verdicts)
        found = dict(
            rows=[row(text), row(text), row("b")], once=[row(text)], sources=[dict(id=text, text=text), dict(id="x", text=text)], pairs=[dict(id=text, prompt=[dict(role="user", content=text)])],
            generated=[dict(id=text, criteria=[dict(points=5, text=text, dimension="treatment rationality", tags=[text])])], other=[dict(id="other", criteria=[dict(points=5, text=text, dimension="treatment rationality")])],
            labelled=[dict(conversation=[dict(role="user", content=text)], answer=text, criteria=[dict(points=5, text=text)], met=[True])],
            case=[dict(id=text, source=text, medical=dict(age=40, complaint=text, story=text, condition=text, tests={text: text}, symptoms=[text]), private=dict(name=text, identifiers={text: text}))],
            osce=[dict(OSCE_Examination={"Patient_Actor": {"Demographics": f"35-year-old female {text}", "History": text, text: text, "Symptoms": {"Primary_Symptom": text}}, "Correct_Diagnosis": text, text: text})])
        for name, rows in found.items(): (tmp_path/f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        return lambda name: tmp_path/f"{name}.jsonl"
    return write


def said(*words, lines=""):
    "Status, standard output and standard error."
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.MonkeyPatch.context() as m:
        m.setattr("sys.stdin", io.StringIO(lines))
        status = main([str(w) for w in words])
    return status, out.getvalue(), err.getvalue()


COMMANDS = dict(
    check="check rows", check_once="check once", check_case="check case osce generated", score="score rows", recorded="healthbench --model recorded --grader recorded --rows rows --out new",
    asked="healthbench --model http://localhost:9/v1#m --grader http://localhost:8/v1#m --rows rows --out new", rubrics="rubrics --model http://localhost:9/v1#m --sources sources --out new.jsonl",
    agreement="agreement --generated generated --experts other", typed="typed-prompts --model http://localhost:9/v1#m --items labelled", pairwise="pairwise http://localhost:9/v1#m http://localhost:8/v1#m --judge http://localhost:7/v1#m --rows pairs",
    consult="consult --case case --model http://localhost:9/v1#m --save talk.jsonl", exam="consult --case osce --model http://localhost:9/v1#m")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_terminal_shows_it_and_obeys_nothing(name, files, tmp_path, monkeypatch):
    "Models are ours; what they say and what the files hold is not."
    for place in ("lm.open", "simulator.patient"):
        monkeypatch.setattr(f"m2kit.{place}.open_model", lambda spec, *a, **k: answers(EVIL, spec))
    at = files(EVIL)
    words = [at(w) if at(w).exists() else tmp_path/w if w.startswith(("new", "talk")) else w for w in COMMANDS[name].split()]
    status, out, err = said(*words, lines=f"{EVIL}\n:script\n:scores\n:{EVIL}\n")
    assert status in (0, 2) and not [x for x in (out + err).replace("\r", "").split("\n") if not x.isprintable()], (out, err)
    assert status == 0 or (len(err.splitlines()) == 1 and err.startswith("m2kit: ")), err
    assert (status == 2) == (name in ("check", "agreement")), (status, err)              # an id twice; ids that do not meet


WORDS = [["check", EVIL], [EVIL], [f"--{EVIL}"], ["reproduce", "--only", EVIL], ["reproduce", "--set", f"{EVIL}=1"], ["consult", "--condition", EVIL], ["train", EVIL], ["doctor", "--scale", EVIL], ["healthbench", "--model", EVIL, "--grader", "recorded"], ["exhibits", "--out", EVIL]]


@pytest.mark.parametrize("words", WORDS, ids=lambda w: " ".join(w[:2]).replace(EVIL, "EVIL"))
def test_what_was_typed_is_quoted_in_one_line(words):
    status, out, err = said(*words)
    assert status == 2 and not out and err.count("\n") == 1 and err[:-1].isprintable() and "owned" in err


class Tags(HTMLParser):
    "The tags of a page with their attributes, and its text."
    def __init__(self, html): super().__init__(); self.tags, self.text = [], ""; self.feed(html); self.close()
    def handle_starttag(self, tag, attrs): self.tags.append((tag, *sorted(k for k, _ in attrs)))
    def handle_comment(self, data): self.tags.append(("comment",))
    def handle_data(self, data): self.text += data


def from_markdown(text):
    "As a notebook, or its export, shows it."
    filters = pytest.importorskip("nbconvert.filters")
    return filters.markdown2html(text)


def case_of(text): return Case(id=text, source=text, medical=dict(complaint=text, tests={text: text}, symptoms=[text, text]), private=dict(name=text, identifiers={text: text}))
def rubric_of(text): return Rubric(id=text, criteria=[Criterion(points=5, text=text, dimension=text, tags=[text]), Criterion(points=-5, text=f"not {text}", dimension=text)])
def consultation_of(text):
    sim = PatientSimulator(answers(text), gate=answers(text), checker=answers(text))
    done = Consultation(Script.of(case_of(text), 0), sim)
    done.say(text)
    return done


SHOWN = {
    "a case": lambda t: from_markdown(case_of(t)._repr_markdown_()), "a rubric": lambda t: from_markdown(rubric_of(t)._repr_markdown_()),
    "a graded rubric": lambda t: from_markdown(as_markdown(rubric_of(t), [Verdict(met=True, explanation=t), Verdict(met=False, explanation=t)])),
    "a transcript in Markdown": lambda t: from_markdown(consultation_of(t).transcript._repr_markdown_()), "a transcript": lambda t: consultation_of(t).transcript._repr_html_(),
    "a consultation": lambda t: page(consultation_of(t), t), "any template": lambda t: render("<p title=\"{{ x }}\">{{ x }}</p>", x=t)}


@pytest.mark.parametrize("what", SHOWN)
def test_a_notebook_shows_it_as_text(what):
    "The page has the tags that it has with harmless words, and the text can be read on it."
    evil, good = Tags(SHOWN[what](EVIL)), Tags(SHOWN[what](GOOD))
    assert evil.tags == good.tags and len(good.tags) > 0
    assert GOOD in good.text and "<script>alert(1)</script><img src=x onerror=alert(1)>" in evil.text and "{{ 7*7 }}" in evil.text


@pytest.mark.parametrize("page", ["index.html", "pages/00001.html"])
def test_the_pages_of_a_run_show_it_as_text(page, files, tmp_path, monkeypatch):
    tags = []
    for text in (EVIL, GOOD):
        out = tmp_path/f"out {len(text)}"
        assert said("healthbench", "--model", "recorded", "--grader", "recorded", "--rows", files(text)("once"), "--out", out)[0] == 0
        tags.append(Tags((out/page).read_text(encoding="utf-8")))
    assert tags[0].tags == tags[1].tags and "<script>alert(1)</script>" in tags[0].text and GOOD in tags[1].text


@pytest.mark.parametrize("text", ["|", "\\|", "\\\\|", "a|b", "`|`", "\\`|\\`", "*a*", "__a__", "<b>", "&lt;b&gt;", "[a](b)", "![a](b)", "$a$", "$$a$$", "~~a~~", "# a", "- a", "1. a", "a\n\nb", "> a", "<!-- a", "a\\", "\x1b[2J"])
def test_markdown_of_awkward_bits(text):
    "In a table's cell, where most of them are met: the cell's text is what `visible` makes of it."
    made = Tags(from_markdown(f"| x | y |\n| --- | --- |\n| {markdown_text(text)} | end |\n"))
    assert [t[0] for t in made.tags if t[0] not in ("thead", "tbody")] == ["table", "tr", "th", "th", "tr", "td", "td"]
    assert made.text.split() == ["x", "y", *visible(text).split(), "end"]
