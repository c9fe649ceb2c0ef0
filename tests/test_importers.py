"Real records become cases: AgentClinic's exam cases and Synthea's FHIR bundles. Skipped where the files are not."
import json, os, sys
from pathlib import Path

import pytest
from m2kit.clinic.case import Case
from m2kit.clinic.importers import from_agentclinic, from_fhir, load_agentclinic, load_fhir, phrases
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
            for text in leaves(parts):
                for sentence in [s for s in text.replace(";", ".").split(". ") if phrases(s)]:   # the review of systems is split by sentence
                    assert squeeze(sentence) in told[0] or squeeze(sentence) in told[1], f"{c.id}: {sentence}"


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
    assert len(m.encounters) == len(of("Encounter")) and m.complaint
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
