"""Whatever stands in a file, a reader gives it rightly or says in one line what is wrong: no traceback, no message of several lines, nothing that a terminal obeys.

Seeded and derandomized, so a failure is the same on every machine. `make test` draws some dozens of files for each reader; `-m long` thousands.
"""
import contextlib, gzip, io, json, random, tempfile
from pathlib import Path

import pytest
from m2kit.clinic.case import Case
from m2kit.clinic.importers import load_cases
from m2kit.clinic.persona import Script, draw_script
from m2kit.core.errors import UserError
from m2kit.core.run import fingerprint
from m2kit.core.files import json_values
from m2kit.evaluate.healthbench import aggregate, read_rows
from m2kit.evaluate.meta import read_judged
from m2kit.evaluate.pairwise import LMPairJudge, run_pairwise
from m2kit.evaluate.source import Source
from m2kit.infer.serve import describe_plan, serve_plan
from m2kit.lm.chat import FunctionModel
from m2kit.lm.log import CallLog
from m2kit.reproduce.cli import main
from m2kit.rubrics.generate import read_sources
from m2kit.rubrics.rubric import load_rubrics
from m2kit.rubrics.typed import read_labelled
from m2kit.simulator.patient import load_transcripts

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings, strategies as st

QUICK = settings(max_examples=40, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
LONG = settings(QUICK, max_examples=2500)
FILE = Path(tempfile.mkdtemp())/"file"

# --- one good file of each kind

WHO = dict(reference="Patient/p1")
TEXT = lambda t: dict(text=t, coding=[dict(system="http://snomed.info/sct", code="1", display=f"{t} (finding)")])
RESOURCES = [
    dict(resourceType="Patient", id="p1", gender="female", birthDate="1980-05-02", name=[dict(use="official", family="Example", given=["Ana", None])], deceasedDateTime="2021-01-01",
         address=[dict(line=["1 Road"], city="Ely")], identifier=[dict(type=TEXT("MRN"), system="s", value="7")], contact=[dict(name=dict(text="Dan"), telecom=[dict(value="555")])]),
    dict(resourceType="Encounter", id="e1", status="finished", subject=WHO, period=dict(start="2020-03-01T09:00:00Z"), reasonCode=[TEXT("Cough")], **{"class": dict(code="AMB")}),
    dict(resourceType="Condition", id="c1", subject=WHO, code=TEXT("Gout"), onsetAge=dict(value=40, unit="a"), clinicalStatus=dict(coding=[dict(code="active")])),
    dict(resourceType="AllergyIntolerance", id="a1", patient=WHO, code=TEXT("Egg"), reaction=[dict(manifestation=[TEXT("Rash")])], verificationStatus=dict(coding=[dict(code="confirmed")])),
    dict(resourceType="MedicationRequest", id="m1", status="active", intent="order", subject=WHO, medicationReference=dict(reference="Medication/d1"), authoredOn="2020"),
    dict(resourceType="Medication", id="d1", code=TEXT("Warfarin")),
    dict(resourceType="Observation", id="o1", status="final", subject=WHO, code=TEXT("Blood pressure"), effectiveDateTime="2020-03-01", category=[dict(coding=[dict(code="vital-signs")])],
         component=[dict(code=TEXT("Systolic"), valueQuantity=dict(value=120.5, unit="mmHg", comparator="<"))]),
    dict(resourceType="Observation", id="o2", status="final", subject=WHO, code=TEXT("Titre"), effectivePeriod=dict(start="2020-03-01"), valueRatio=dict(numerator=dict(value=1), denominator=dict(value=128))),
    dict(resourceType="FamilyMemberHistory", id="f1", status="completed", patient=WHO, relationship=TEXT("father"), condition=[dict(code=TEXT("Gout"), onsetRange=dict(low=dict(value=40)))])]
OSCE = dict(OSCE_Examination=dict(Patient_Actor=dict(Demographics="8-month-old boy", History="Cried.", Symptoms=dict(Primary_Symptom="Crying", Secondary_Symptoms=["Fever"]), Review_of_Systems="Feels hot but denies pain. No rash provided."),
            Physical_Examination_Findings=dict(Vital_Signs=dict(Temperature="39 C")), Test_Results=dict(Blood=dict(CRP="high")), Correct_Diagnosis="Otitis"))
NEJM = dict(question="A 50-year-old man presented with a blue toe. What is it?", image_url="x", patient_info="For your role as a patient, you are a man. Your toe is blue.", physical_exams="crystals", answers=[dict(text="Gout", correct=True), dict(text="No", correct=False)], type=["x"])
PROFILE = dict(hadm_id=1, age="67", gender="M", chiefcomplaint="Pain", present_illness_positive="pain; fever", pain=8, allergies="None", cefr="B", personality="distrust", dazed_level="high", diagnosis="Gout")
RUBRIC = dict(id="r1", criteria=[dict(points=5, text="Says rest", dimension="treatment rationality", tags=["a"]), dict(points=-3, text="Bleeds")])
ROW = dict(prompt_id="p1", prompt=[dict(role="user", content="hm")], rubrics=[dict(criterion="Asks", points=5, tags=["axis:a"]), dict(criterion="Bleeds", points=-4, tags=[])], example_tags=["theme:t"],
           completion="Why?", verdicts=[dict(criteria_met=True, explanation=""), dict(criteria_met=None, explanation="?")], ideal_completions_data=dict(ideal_completion="x", ideal_completions_group="Group 1", ideal_completions_ref_completions=["y"]))
LABELLED = dict(conversation=[dict(role="user", content="hi")], answer="a", criteria=[dict(points=5, text="x")], met=[True])
PAIR = dict(id="c1", prompt=[dict(role="user", content="I cough.")])
JUDGED = dict(prompt_id="p", prompt=[dict(role="user", content="hm")], completion="Why?", rubric="[5] Asks", binary_labels=[True, False], anonymized_physician_ids=["a", "b"], category="cluster:x")
CONFIG = dict(model_type="qwen2", architectures=["Qwen2ForCausalLM"], hidden_size=5120, intermediate_size=27648, num_hidden_layers=64, num_attention_heads=40, num_key_value_heads=8, vocab_size=152064, max_position_embeddings=131072, tie_word_embeddings=False)
SERVE = dict(model="Qwen2.5-32B", weights="W4A16", kv="fp8", context=20000, card="RTX 4090", requests=1, config=CONFIG)
CALL = dict(key="k", model="m", messages=[dict(role="user", content="hi")], sampling={}, sample=0, text="a", prompt_tokens=1, completion_tokens=1, finish="stop")
CALL["key"] = fingerprint(*(CALL[k] for k in ("model", "messages", "sampling", "sample")), n=32)
CASE = json.loads(draw_script(random.Random(1)).case.dump())
BUNDLE = dict(resourceType="Bundle", type="collection", entry=[dict(fullUrl=f"urn:uuid:{r['id']}", resource=r) for r in RESOURCES])

# --- what is done to it

WORDS = st.sampled_from(["", "x", "\x1b[2J\x1b]0;owned\x07", "a\nb\n\nc", "\u2028", "\u202e", "\ud800", "é家", "0", "2020", "2020-13-45", "9" * 400, "1e999", "urn:uuid:p1", "#", "entered-in-error", "Patient/p1", "|" * 9])
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(-10**30, 10**30), st.floats(), WORDS, st.text(max_size=8))
ANY = st.recursive(LEAVES, lambda x: st.one_of(st.lists(x, max_size=3), st.dictionaries(WORDS | st.text(max_size=5), x, max_size=3)), max_leaves=6)


def paths(x, at=()):
    "Every place in nested JSON."
    yield at
    for k, v in x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list) else (): yield from paths(v, (*at, k))


def changed(x, at, new, how):
    "A copy of `x` in which the place `at` is replaced, deleted, doubled, put in a list, or has a new neighbour."
    x = json.loads(json.dumps(x))
    if not at: return new if how == "replace" else [x, new]
    *up, last = at
    parent = x
    for k in up: parent = parent[k]
    if how == "delete": del parent[last]
    elif how == "double" and isinstance(parent, list): parent.insert(last, parent[last])
    elif how == "list": parent[last] = [parent[last]]
    elif how == "neighbour" and isinstance(parent, dict): parent[str(new)[:20]] = parent[last]
    else: parent[last] = new
    return x


@st.composite
def mutated(draw, *samples):
    "Rows of which some places are changed."
    rows = [draw(st.sampled_from(samples)) for _ in range(draw(st.integers(1, 3)))]
    for _ in range(draw(st.integers(0, 3))):
        i = draw(st.integers(0, len(rows) - 1))
        places = list(paths(rows[i]))
        rows[i] = changed(rows[i], draw(st.sampled_from(places)), draw(ANY), draw(st.sampled_from(["replace", "delete", "double", "list", "neighbour"])))
    return rows


@st.composite
def files(draw, *samples):
    "The bytes of a file: rows in some layout, encoding and packing, perhaps torn or with bytes changed."
    rows = draw(mutated(*samples))
    text = {"lines": lambda: "".join(json.dumps(r) + "\n" for r in rows), "crlf": lambda: "\r\n".join(json.dumps(r) for r in rows), "list": lambda: json.dumps(rows, indent=1), "one": lambda: json.dumps(rows[0])}[draw(st.sampled_from(["lines", "lines", "one", "crlf", "list"]))]()
    if draw(st.booleans()): text = text.encode().decode("unicode_escape", "replace") if draw(st.integers(0, 9)) == 0 else text
    data = text.encode(draw(st.sampled_from(["utf-8"]*5 + ["utf-8-sig", "utf-16", "utf-16-be", "utf-32"])), "replace")
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 3]))):
        i = draw(st.integers(0, len(data)))
        data = data[:i] + draw(st.sampled_from([b"", b"\0", b"\xff", b"\n", b'"', b"}", b"\xe9"])) + data[i + draw(st.integers(0, 2)):]
    if draw(st.integers(0, 9)) == 0: data = data[:draw(st.integers(0, len(data)))]
    return gzip.compress(data) if draw(st.integers(0, 9)) == 0 else data


# --- what must hold

def one_line(e): text = str(e); assert text and "\n" not in text and text.isprintable(), repr(text); return text


def told_or_read(reader, data, suffix):
    "What the reader gives, or None when it says in one line what is wrong."
    path = FILE.with_suffix(suffix)
    path.write_bytes(data)
    try: return reader(path)
    except UserError as e: one_line(e)


def said(*words):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err): status = main([str(w) for w in words])
    assert status in (0, 2) and all(line.isprintable() for line in (*out.getvalue().split("\n"), *err.getvalue().split("\n"))), (status, out.getvalue(), err.getvalue())
    lines = [line for line in err.getvalue().splitlines() if "every command reads it so" not in line and "left out, since" not in line]
    assert len(lines) == (status == 2) and all(line.startswith("m2kit: ") for line in lines), (status, err.getvalue())


def cases(path):
    for case, report in load_cases(path):
        assert Case.model_validate_json(case.dump()) == case
        assert all(line.isprintable() for line in report.lines())
        case._repr_markdown_(), Script.of(case, 0).text()


def scored(path):
    rows = [r for r in read_rows(path, repeated=lambda line: None) if r.verdicts]
    if rows: assert 0 <= aggregate(rows, bootstrap=2).get("overall_score", 0) <= 1


def paired(path):
    both = [FunctionModel(lambda m: "Drink.", name) for name in ("a", "b")]
    judge = LMPairJudge(FunctionModel(lambda m: json.dumps(dict(explanation="x", winner="A")), "judge"))
    run_pairwise(*both, judge, [row for _, row in json_values(path)])


def judged(path):
    source = Source(path)
    for i in range(len(source)):
        found, faults = read_judged(source, i)
        for f in faults: one_line(f["fault"])


def served(path): assert describe_plan(serve_plan(path))


def logged(path):
    log = CallLog(path)
    for row in list(log.rows()): log.get(row["key"])


KINDS = dict(
    values=(json_values, ".json", [CASE, RUBRIC]), cases=(cases, ".json", [CASE, OSCE, NEJM, PROFILE]), bundles=(cases, ".json", [BUNDLE]), bulk=(cases, ".ndjson", RESOURCES),
    rubrics=(load_rubrics, ".jsonl", [RUBRIC]), rows=(scored, ".jsonl", [ROW]), labelled=(read_labelled, ".jsonl", [LABELLED]), sources=(read_sources, ".jsonl", [dict(id="q", text="What helps?"), dict(id="d", messages=[dict(role="user", content="hi")]), CASE]),
    pairs=(paired, ".jsonl", [PAIR]), judged=(judged, ".jsonl", [JUDGED, ROW]), serving=(served, ".json", [SERVE, CONFIG]),
    transcripts=(load_transcripts, ".jsonl", [dict(script="x", doctor="y")]), logs=(logged, ".jsonl", [CALL]))


def fuzz(kind, how):
    if kind in ("bundles", "bulk"): pytest.importorskip("fhir.resources")
    reader, suffix, samples = KINDS[kind]
    @how
    @given(files(*samples))
    def run(data): told_or_read(reader, data, suffix)
    run()


@pytest.mark.parametrize("kind", KINDS)
def test_read_or_told(kind): fuzz(kind, QUICK)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_read_or_told_at_length(kind): fuzz(kind, LONG)


def commands(how):
    pytest.importorskip("fhir.resources")
    samples = [CASE, OSCE, NEJM, PROFILE, BUNDLE, RUBRIC, ROW]
    @how
    @given(files(*samples), st.sampled_from([".json", ".jsonl", ".ndjson", ".gz", ""]))
    def run(data, suffix):
        path = FILE.with_suffix(suffix)
        path.write_bytes(data)
        said("check", path); said("score", path)
    run()


def test_commands_say_one_line(): commands(QUICK)


@pytest.mark.long
def test_commands_say_one_line_at_length(): commands(LONG)


# What the long run has found, each once.
AWKWARD = dict(
    cases=["{}", "[{}]", "[[]]", '{"a": {}}', "[null]"], bulk=["{}", "null", "[{}]"], bundles=["{}", '{"resourceType": "Bundle"}', '{"resourceType": "Bundle", "entry": []}'],
    serving=[json.dumps(SERVE | dict(config=CONFIG | dict(max_position_embeddings=x))) for x in ("x", [], {}, 0, 1.5)], pairs=[json.dumps(PAIR | x) for x in (dict(id=[]), dict(id={}), dict(prompt=None), dict(prompt="x"), dict(prompt=[]))] + ["3", "[[1]]"],
    labelled=[json.dumps(LABELLED | {k: v}) for k in LABELLED for v in (None, {}, 3, "x", [None], [[]])])


@pytest.mark.parametrize("kind", AWKWARD)
def test_what_the_long_run_found(kind):
    "None of these is a file of its kind: each is refused."
    if kind in ("bundles", "bulk"): pytest.importorskip("fhir.resources")
    reader, suffix, _ = KINDS[kind]
    for text in AWKWARD[kind]:
        if text == json.dumps(LABELLED | dict(answer="x")): continue
        path = FILE.with_suffix(suffix)
        path.write_text(text)
        with pytest.raises(UserError) as e: reader(path)
        one_line(e.value)


def test_the_good_files_are_read():
    "The fuzzer starts from files that are right."
    for kind, (reader, suffix, samples) in KINDS.items():
        if kind in ("transcripts", "bundles", "bulk"): continue
        for sample in samples:
            path = FILE.with_suffix(suffix)
            path.write_text(json.dumps(sample) + "\n")
            reader(path)
    path = FILE.with_suffix(".json")
    pytest.importorskip("fhir.resources")
    path.write_text(json.dumps(BUNDLE))
    (case, report), = load_cases(path)
    assert (case.medical.complaint, case.medical.medications, case.private.name, case.medical.age) == ("Cough", ["Warfarin"], "Ana Example", 39) and not report.left_out
