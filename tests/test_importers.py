"Real records become cases: AgentClinic's exam cases and Synthea's FHIR bundles. Skipped where the files are not."
import json, os, re, sys
from pathlib import Path

import pytest
from m2kit.clinic.case import Case
from m2kit.clinic.fhir import read_fhir
from m2kit.clinic.importers import from_agentclinic, from_fhir, load_agentclinic, load_cases, load_fhir, phrases, review
from m2kit.core.errors import UserError

INPUTS = Path(os.environ.get("M2KIT_INPUTS") or Path(__file__).resolve().parents[2]/"shared"/"data")
OSCE = INPUTS/"agentclinic_medqa_30.jsonl"
BUNDLES = sorted((INPUTS/"fhir").glob("*.json"))
needs_osce = pytest.mark.skipif(not OSCE.exists(), reason="no AgentClinic cases (set M2KIT_INPUTS)")
needs_fhir = pytest.mark.skipif(not BUNDLES, reason="no FHIR bundles (set M2KIT_INPUTS)")


def leaves(x):
    "Every text in nested JSON."
    if isinstance(x, dict): return [v for y in x.values() for v in leaves(y)]
    if isinstance(x, list): return [v for y in x for v in leaves(y)]
    return [str(x).strip()]


def squeeze(s): return "".join(ch for ch in s.lower() if ch.isalnum())


@pytest.fixture(scope="module")
def rows(): return [json.loads(line)["OSCE_Examination"] for line in OSCE.read_text(encoding="utf-8").splitlines() if line.strip()]


@pytest.fixture(scope="module")
def cases(): return load_agentclinic(OSCE)


@needs_osce
def test_every_exam_case_imports(rows, cases):
    assert len(cases) == len(rows) == 30
    assert len({c.id for c in cases}) == 30
    for r, c in zip(rows, cases):
        assert c.medical.condition == r["Correct_Diagnosis"].strip()
        assert c.medical.complaint == r["Patient_Actor"]["Symptoms"]["Primary_Symptom"].strip()
        assert c.medical.symptoms and c.medical.story and c.medical.vitals and c.medical.tests
        assert c.medical.age is not None and c.medical.sex in ("female", "male"), c.id
        assert not c.secrets() and c.psychological.mbti is None          # nothing invented


@needs_osce
def test_ages_and_sexes(rows, cases):
    "Against the phrase itself, read in another way than the importer reads it."
    for r, c in zip(rows, cases):
        words = r["Patient_Actor"]["Demographics"].lower().replace(",", " ").replace("-", " ").split()
        years = int(words[0]) if words[0].isdigit() and words[1].startswith("year") else 0
        assert c.medical.age == years, words
        assert c.medical.sex == ("female" if {"female", "woman", "girl"} & set(words) else "male"), words


@needs_osce
def test_nothing_about_the_patient_is_lost(rows, cases):
    for r, c in zip(rows, cases):
        told = squeeze(c.dump()), squeeze(" ".join(leaves(json.loads(c.dump()))))
        for key in ("Patient_Actor", "Physical_Examination_Findings", "Test_Results", "Correct_Diagnosis"):
            parts = dict(r[key]) if isinstance(r[key], dict) else {key: r[key]}
            parts.pop("Demographics", None)
            cut = review(parts.pop("Review_of_Systems", "") or "")                                        # what it has, and what it has not
            parts["review"] = [*cut[0], *cut[1]]
            for text in leaves(parts):
                for sentence in [s for s in text.replace(";", ".").split(". ") if phrases(s)]:
                    assert squeeze(sentence) in told[0] or squeeze(sentence) in told[1], f"{c.id}: {sentence}"


@needs_osce
def test_the_review_of_systems_keeps_its_words(rows):
    "Cut into clauses, no word of it is lost but the conjunctions where it is cut."
    words = lambda text: re.findall(r"[a-z]+", text.lower())
    for r in rows:
        text = " ".join(phrases(r["Patient_Actor"].get("Review_of_Systems")))
        has, has_not = review(text)
        assert sorted(words(" ".join([*has, *has_not]))) == sorted(words(text)) or set(words(text)) - set(words(" ".join([*has, *has_not]))) <= {"but", "and"}, text
        assert not [c for c in has if re.search(r"denie[sd]", c)], has


@needs_osce
def test_the_report_of_thirty_rows():
    found = load_cases(OSCE)
    read = [report.read["Patient_Actor"] for _, report in found]
    left = {key for _, report in found for key in report.left_out}
    assert read == [1]*30 and ("Objective_for_Doctor", "an instruction to the doctor") in left


@needs_osce
def test_round_trip_and_markdown(cases, tmp_path):
    for c in cases:
        c.dump(tmp_path/f"{c.id}.json")
        assert Case.load(tmp_path/f"{c.id}.json") == c
        assert c.medical.condition in c._repr_markdown_()


@needs_osce
def test_a_bad_line_among_good_ones_is_named(tmp_path):
    lines = OSCE.read_text(encoding="utf-8").splitlines()
    bad = tmp_path/"bad.jsonl"
    for line, why in [("{", "not JSON"), ("[]", "OSCE_Examination"), ('{"OSCE_Examination": {"Patient_Actor": 3}}', "Patient_Actor is int"), ('{"OSCE_Examination": {"Patient_Actor": {}}}', "neither Symptoms nor History")]:
        bad.write_text("\n".join([*lines[:6], line, *lines[6:]]), encoding="utf-8")
        with pytest.raises(UserError) as e: load_agentclinic(bad)
        assert f"{bad}:7: " in str(e.value) and why in str(e.value) and "\n" not in str(e.value)


@needs_fhir
@pytest.mark.parametrize("path", BUNDLES, ids=lambda p: p.stem)
def test_every_bundle_imports(path, tmp_path):
    pytest.importorskip("fhir.resources")
    c = load_fhir(path)
    raw = [e["resource"] for e in json.loads(path.read_text(encoding="utf-8"))["entry"]]
    of = lambda kind: [r for r in raw if r["resourceType"] == kind]
    patient, m = of("Patient")[0], c.medical
    assert m.sex == patient["gender"] and c.private.birth_date == patient["birthDate"]
    last = max(r["effectiveDateTime"] for r in of("Observation"))
    assert m.age in (int(last[:4]) - int(patient["birthDate"][:4]) - 1, int(last[:4]) - int(patient["birthDate"][:4]))
    assert len(m.encounters) == len(of("Encounter"))
    assert m.complaint == ""                     # both came for a check-up: the kind of the visit is no complaint
    assert len([h for h in m.history if "since" in h]) == len(of("Condition"))
    found = set(m.vitals) | set(m.tests) | {h.split(": ")[0] for h in c.social.habits}
    assert {r["code"]["text"] for r in of("Observation")} <= found
    latest = max((r for r in of("Observation") if r["code"]["text"] == "Body Weight"), key=lambda r: r["effectiveDateTime"])
    assert abs(float(m.vitals["Body Weight"].split()[0]) - latest["valueQuantity"]["value"]) < 0.1
    drugs = {r["medicationCodeableConcept"]["text"]: r["status"] for r in of("MedicationRequest")}
    for name, status in drugs.items(): assert (name in m.medications) == (status == "active") and (name in m.medications or any(name in h for h in m.history))
    assert Case.load((c.dump(tmp_path/"c.json"), tmp_path/"c.json")[1]) == c


@needs_fhir
@pytest.mark.parametrize("path", BUNDLES, ids=lambda p: p.stem)
def test_every_resource_is_read_or_reported(path):
    "Taken together, what was read and what was left out is the bundle."
    pytest.importorskip("fhir.resources")
    raw = [e["resource"]["resourceType"] for e in json.loads(path.read_text(encoding="utf-8"))["entry"]]
    report = read_fhir(json.loads(path.read_text(encoding="utf-8")))[1]
    told = report.read.copy()
    for (kind, _), names in report.left_out.items(): told[kind] += len(names)
    assert told == {k: raw.count(k) for k in set(raw)}
    assert [n for n in report.notes if n.startswith("no complaint: the visit of ")]


@needs_fhir
@pytest.mark.parametrize("path", BUNDLES, ids=lambda p: p.stem)
def test_private_values_stay_private(path):
    pytest.importorskip("fhir.resources")
    c, patient = load_fhir(path), json.loads(path.read_text(encoding="utf-8"))["entry"][0]["resource"]
    secrets = c.secrets()
    assert {"name", "birth_date", "contact", "address", "insurance"} <= set(secrets)
    assert patient["name"][0]["family"] in secrets["name"] and patient["address"][0]["city"] in secrets["address"]
    assert {i["value"] for i in patient["identifier"]} <= set(secrets.values())
    others = c.model_dump_json(exclude={"private", "id"})
    assert not [k for k, v in secrets.items() if k != "insurance" and v in others]


@needs_fhir
def test_bad_bundles_are_named(tmp_path):
    pytest.importorskip("fhir.resources")
    good = json.loads(BUNDLES[0].read_text(encoding="utf-8"))
    def broken(edit):
        b = json.loads(json.dumps(good)); edit(b)
        (tmp_path/"b.json").write_text(json.dumps(b))
        with pytest.raises(UserError) as e: load_fhir(tmp_path/"b.json")
        assert "b.json: " in str(e.value) and "\n" not in str(e.value)
        return str(e.value)
    assert "entry.0.resource.birthDate" in broken(lambda b: b["entry"][0]["resource"].update(birthDate="yesterday"))
    assert "no resource type 'Patiant'" in broken(lambda b: b["entry"][0]["resource"].update(resourceType="Patiant"))
    assert "0 Patient" in broken(lambda b: b["entry"].pop(0))
    assert "2 Patient" in broken(lambda b: b["entry"].append(b["entry"][0]))
    assert "not a FHIR Bundle" in broken(lambda b: b.update(resourceType="Patient"))
    assert "type" in broken(lambda b: b.pop("type"))


@needs_fhir
def test_a_parsed_bundle_gives_the_same_case():
    Bundle = pytest.importorskip("fhir.resources.R4B.bundle").Bundle
    raw = json.loads(BUNDLES[0].read_text(encoding="utf-8"))
    assert from_fhir(Bundle.model_validate(raw), id="x") == from_fhir(raw, id="x")


def test_without_the_extra_it_is_named(monkeypatch):
    for name in [m for m in sys.modules if m == "fhir" or m.startswith("fhir.")]: monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fhir", None)
    with pytest.raises(UserError, match=r"pip install 'm2kit\[fhir\]'"): from_fhir({"resourceType": "Bundle", "type": "collection"})


@pytest.mark.parametrize("row", [None, [], "x", {}, {"OSCE_Examination": None}, {"OSCE_Examination": []}])
def test_rows_that_are_no_rows(row):
    with pytest.raises(UserError, match="f.jsonl:9"): from_agentclinic(row, where="f.jsonl:9")


@pytest.mark.parametrize("actor", [
    {"Symptoms": "cough"}, {"Symptoms": ["cough"]}, {"Symptoms": {"Primary_Symptom": ["cough"]}}, {"History": ["cough"]}, {"Symptoms": {"Primary_Symptom": "cough", "Secondary_Symptoms": {"night": "worse"}}}])
def test_shapes_a_field_may_take(actor):
    row = {"OSCE_Examination": {"Patient_Actor": {**actor, "Past_Medical_History": {"Heart": ["murmur"]}}, "Physical_Examination_Findings": "normal", "Test_Results": ["none done"], "Correct_Diagnosis": ["Cold"]}}
    c = from_agentclinic(row)
    assert c.medical.complaint == "cough" and c.medical.history == ["Heart: murmur"] and c.medical.condition == "Cold"
    assert c.medical.exam == {"Examination": "normal"} and c.medical.tests == {"Tests": "none done"}


# --- what a record says beside its values: bundles written by hand

WHO = dict(reference="Patient/p1")
PATIENT = dict(resourceType="Patient", id="p1", gender="female", birthDate="1980-05-02", name=[dict(family="Example", given=["Ana"])])


def text(t): return dict(coding=[dict(system="http://example.org", code="1", display=t)], text=t)
def coded(c): return dict(coding=[dict(code=c)])


def visit(day="2020-03-01", why="Cough", status="finished", **more):
    return dict(resourceType="Encounter", status=status, subject=WHO, period=dict(start=day), reasonCode=[text(why)], **{"class": dict(code="AMB")}) | more


def lab(name="Glucose", day="2020-03-01", status="final", **value):
    return dict(resourceType="Observation", status=status, code=text(name), subject=WHO, effectiveDateTime=day, **value)


def drug(kind="MedicationRequest", status="active", name="Warfarin", **more):
    need = dict(intent="order") if kind == "MedicationRequest" else {}
    return dict(resourceType=kind, status=status, subject=WHO, medicationCodeableConcept=text(name)) | need | more


def read(*resources, patient=PATIENT, urls=None):
    pytest.importorskip("fhir.resources")
    entries = [dict(resource=r, **(dict(fullUrl=urls[i]) if urls else {})) for i, r in enumerate((patient, *resources))]
    return read_fhir(dict(resourceType="Bundle", type="collection", entry=entries))


def reasons(report): return sorted(why for _, why in report.left_out)


@pytest.mark.parametrize("status, why", [("planned", "planned, not held"), ("cancelled", "cancelled"), ("entered-in-error", "entered in error"), ("unknown", "its author does not know its state")])
def test_visits_that_were_not(status, why):
    case, report = read(visit(), visit("2031-03-01", "Check-up", status))
    assert (case.medical.complaint, case.medical.age, len(case.medical.encounters)) == ("Cough", 39, 1)
    assert reasons(report) == [why]


@pytest.mark.parametrize("status", ["registered", "cancelled", "entered-in-error", "unknown"])
def test_values_that_are_none(status):
    case, report = read(visit(), lab(status=status, valueString="300"))
    assert case.medical.tests == {} and len(report.left_out) == 1


@pytest.mark.parametrize("status", ["preliminary", "final", "amended", "corrected"])
def test_values_that_are(status): assert read(lab(status=status, valueString="300"))[0].medical.tests == {"Glucose": "300"}


@pytest.mark.parametrize("order, why", [
    (dict(doNotPerform=True), "an order not to give it"), (dict(intent="proposal"), "a proposal, no order"), (dict(intent="plan"), "a plan, no order"), (dict(intent="option"), "an option, no order"),
    (dict(status="draft"), "a draft"), (dict(status="cancelled"), "withdrawn before it was taken"), (dict(status="entered-in-error"), "entered in error"),
    (dict(kind="MedicationStatement", status="not-taken"), "not taken"), (dict(kind="MedicationStatement", status="intended"), "intended, not taken yet"),
    (dict(modifierExtension=[dict(url="http://x/not", valueBoolean=True)]), "a modifier extension that is not known here (http://x/not)"),
    (dict(subject=dict(reference="Patient/other")), "about Patient/other, not the patient")])
def test_medicines_that_are_not_taken(order, why):
    case, report = read(visit(), drug(**order))
    assert case.medical.medications == [] and case.medical.history == [] and report.left_out == {(order.get("kind", "MedicationRequest"), why): ["Warfarin"]}


@pytest.mark.parametrize("status, history", [("stopped", ["took Warfarin (stopped)"]), ("completed", ["took Warfarin (completed)"]), ("on-hold", ["took Warfarin (on-hold)"])])
def test_medicines_of_the_past(status, history):
    assert read(drug(status=status))[0].medical.history == history
    assert read(drug("MedicationStatement", "active"))[0].medical.medications == ["Warfarin"]


def test_allergies():
    allergy = lambda **k: dict(resourceType="AllergyIntolerance", patient=WHO, code=text("Penicillin")) | k
    sure = lambda v: dict(verificationStatus=coded(v))
    got = lambda **k: read(allergy(**k))[0].medical
    assert got(**sure("refuted")).allergies == got(**sure("entered-in-error")).allergies == []
    assert got(**sure("unconfirmed")).allergies == ["Penicillin (unconfirmed)"]
    past = got(clinicalStatus=coded("resolved"), **sure("confirmed"))
    assert (past.allergies, past.history) == ([], ["allergy to Penicillin, resolved"])
    none = got(code=dict(coding=[dict(code="716186003", display="No known allergy (situation)")]))
    assert (none.allergies, none.denies) == ([], ["allergies"])


@pytest.mark.parametrize("reference, found", [
    ("Medication/m1", True), ("Medication/m1/_history/3", True), ("http://a.org/fhir/Medication/m1", True), ("http://b.org/fhir/Medication/m1", False), ("Medication/none", False)])
def test_references(reference, found):
    medication = dict(resourceType="Medication", id="m1", code=text("Warfarin 5 mg"))
    order = drug(medicationReference=dict(reference=reference)); del order["medicationCodeableConcept"]
    base = "http://a.org/fhir/"
    case, report = read(order, medication, urls=[base + "Patient/p1", base + "MedicationRequest/r1", base + "Medication/m1"])
    assert case.medical.medications == ["Warfarin 5 mg"]*found and bool(report.left_out) != found


def test_references_within_and_by_identifier():
    inside = drug(medicationReference=dict(reference="#in"), contained=[dict(resourceType="Medication", id="in", code=text("Inside"))]); del inside["medicationCodeableConcept"]
    named = drug(medicationReference=dict(identifier=dict(system="s", value="7"))); del named["medicationCodeableConcept"]
    known = dict(resourceType="Medication", id="m7", identifier=[dict(system="s", value="7")], code=text("Seven"))
    assert read(inside, named, known)[0].medical.medications == ["Inside", "Seven"]


@pytest.mark.parametrize("first, last", [
    ("2020-03-01T08:00:00Z", "2020-03-01T20:00:00Z"), ("2020-03-01T08:00:00+02:00", "2020-03-01T07:00:00Z"), ("2020-03-01", "2020-03-01T00:00:01Z"), ("2020", "2020-03"), ("2020-02-29T23:30:00-05:00", "2020-03-01T05:00:00Z")])
def test_the_later_of_two(first, last):
    for values in ((first, "1"), (last, "2")), ((last, "2"), (first, "1")):
        assert read(*(lab(day=d, valueString=v) for d, v in values))[0].medical.tests == {"Glucose": "2"}


@pytest.mark.parametrize("value, shown", [
    (dict(valueQuantity=dict(value=9999.6, unit="mg/dL")), "10000 mg/dL"), (dict(valueQuantity=dict(value=5, comparator="<", code="mg/dL", system="http://unitsofmeasure.org")), "<5 mg/dL"),
    (dict(valueRange=dict(low=dict(value=3, unit="mg"), high=dict(value=5, unit="mg"))), "3 to 5 mg"), (dict(valueRatio=dict(numerator=dict(value=1), denominator=dict(value=128))), "1:128"),
    (dict(valueInteger=0), "0"), (dict(valueBoolean=False), "no"), (dict(valueCodeableConcept=text("Negative")), "Negative"), (dict(valuePeriod=dict(start="2020", end="2021")), "2020 to 2021"),
    (dict(valueString="lying", component=[dict(code=text("Systolic"), valueQuantity=dict(value=120, unit="mmHg"))]), "lying (Systolic 120 mmHg)")])
def test_values_of_every_kind(value, shown): assert read(lab(**value))[0].medical.tests == {"Glucose": shown}


@pytest.mark.parametrize("why, complaint", [
    (text("Cough"), "Cough"), (text("Cough (finding)"), "Cough"), (text("Viral sinusitis (disorder)"), ""), (text("Encounter for check up (procedure)"), ""), (text("Gout"), ""),
    (dict(coding=[dict(system="http://hl7.org/fhir/sid/icd-10", code="J01", display="Acute sinusitis")]), "")])
def test_complaints(why, complaint):
    gout = dict(resourceType="Condition", subject=WHO, code=text("Gout"))
    case, report = read(visit(reasonCode=[why], type=[text("Encounter for problem")]), gout)
    assert case.medical.complaint == complaint and bool(report.notes) == (not complaint)


def test_who_died_and_who_is_empty():
    dead, report = read(visit(), patient=PATIENT | dict(deceasedDateTime="2019-01-01"))
    assert dead.medical.age == 38 and "the patient has died on 2019-01-01; the case is as before" in report.notes
    case, report = read()
    assert not case.tells and "there is nothing medical in it" in report.notes


def test_a_mothers_values_of_her_child():
    case, _ = read(lab(focus=[dict(reference="Patient/child")], valueString="1"), dict(resourceType="FamilyMemberHistory", status="completed", patient=WHO, relationship=text("father"), condition=[dict(code=text("Gout"))]))
    assert case.medical.tests == {} and case.medical.history == ["father: Gout"]


def test_bulk_export(tmp_path):
    pytest.importorskip("fhir.resources")
    other = PATIENT | dict(id="p2")
    lines = [PATIENT, other, visit(), visit(why="Fall") | dict(subject=dict(reference="Patient/p2"))]
    (tmp_path/"all.ndjson").write_text("".join(json.dumps(r) + "\n" for r in lines))
    assert [c.medical.complaint for c, _ in load_cases(tmp_path/"all.ndjson")] == ["Cough", "Fall"]
    for r in lines:
        with open(tmp_path/f"{r['resourceType']}.ndjson", "a") as f: f.write(json.dumps(r) + "\n")
    (tmp_path/"all.ndjson").unlink()
    assert [c.id for c, _ in load_cases(tmp_path)] == ["fhir-p1", "fhir-p2"]
