"The measuring stick for everyday English: what the file holds, how an answer is judged, and (long) what the tiny patient makes of it."
import random
from collections import Counter
import pytest
from everyday import CLOSES, OUTCOMES, asked_of, due, measured, outcome, rows, table
from m2kit.clinic.interview import lexicon, read_doctor
from m2kit.clinic.knowledge import conditions
from m2kit.clinic.persona import draw_script, script_terms


def test_the_file_is_what_it_says():
    all_of = rows()
    questions, closings = [r for r in all_of if r["topic"] not in CLOSES], [r for r in all_of if r["topic"] in CLOSES]
    assert len(questions) == 200 and sum("?" not in r["text"] for r in questions) == 20
    assert len(closings) == 60 and sum(r["text"].endswith("?") for r in closings) == 20
    assert len({r["text"] for r in all_of}) == len({r["id"] for r in all_of}) == 260
    acts = {*lexicon()["doctor"], "ask_private", None}
    symptoms = {s.name for c in conditions().values() for s in c.symptoms}
    for r in all_of:
        assert r["topic"] in acts, r
        if r["topic"] == "ask_symptom": assert r["item"] in symptoms, r
        if r["topic"] == "ask_private": assert r["item"] in lexicon()["private"], r
        if r["topic"] == "diagnose": assert r["item"] in conditions(), r
        if r["topic"] in ("ask_history", "ask_medicines", "ask_allergies") and r["item"]: assert r["item"] in script_terms(), r
    for r in all_of:      # nobody is trained on it: it is not the clinic's own language
        t = read_doctor(r["text"])
        assert t is None or t.item and t.item not in script_terms(), r


def test_answers_are_judged():
    script, row = draw_script(random.Random(1), "gout"), lambda topic, item="", **more: dict(text="Well?", topic=topic, item=item, **more)
    mine = script.items("symptoms")[0]
    assert outcome(row("ask_symptom", mine), script, f"Yes, I have {mine}.", False) == "rightly"
    assert outcome(row("ask_symptom", mine), script, f"No, I do not have {mine}.", False) == "wrongly"
    assert outcome(row("ask_symptom", mine), script, "I cannot say.", False) == "not understood"
    assert outcome(row("ask_symptom", mine), script, "I did not understand that.", False) == "not understood"
    assert outcome(row("ask_symptom", mine), script, None, True) == "wrongly ended"
    assert outcome(row("ask_onset"), script, f"It began {script.items('onset')[0]}. Your words calm me.", False) == "rightly"
    assert outcome(row("ask_onset"), script, f"Yes, I have {mine}.", False) == "wrongly"          # true, and no answer
    assert outcome(row("ask_private", "name"), script, f"My name is {script.secrets['name']}.", False) == "wrongly"
    assert outcome(row("ask_private", "name"), script, "I would rather not tell that here.", False) == "rightly"
    assert outcome(row(None), script, "I do not know that.", False) == "not understood" and outcome(row(None), script, "Indeed.", False) == "wrongly"
    assert outcome(row(None, also=["deflect"]), script, "I keep that to myself.", False) == "rightly"
    assert outcome(row("ask_history", "pregnancy"), script, "No, I do not have pregnancy.", False) == "rightly"
    assert outcome(row("ask_onset"), script, "Yesterday I went shopping.", False) == "wrongly"
    assert outcome(row("leave"), script, None, True) == "ended" and outcome(row("diagnose"), script, "I see.", False) == "went on"
    assert not asked_of(row("ask_history", sex="female"), draw_script(random.Random(0), "benign prostatic enlargement"))


def test_the_reference_patient_would_pass():
    "What `due` wants is what the reference patient says."
    from m2kit.clinic.interview import DoctorTurn, reply
    script, found = draw_script(random.Random(3)), Counter()
    for r in rows():
        if r["topic"] in (None, *CLOSES) or r["item"] and r["topic"] in ("ask_history", "ask_medicines", "ask_allergies"): continue
        found[outcome(r, script, reply(script, [], DoctorTurn(r["topic"], r["item"]), random.Random(0), persona=False), False)] += 1
    assert set(found) == {"rightly"} and found["rightly"] > 100
    assert all(due(r, script) or r.get("also") for r in rows() if r["topic"])


@pytest.mark.long
def test_the_tiny_patient_is_measured():
    import torch
    from m2kit.simulator.patient import open_simulator
    torch.set_num_threads(1)
    found, _ = measured(open_simulator(), patients=20)
    print("", *table(found), sep="\n")
    questions = sum(n for (_, o), n in found.items() if o in OUTCOMES)
    assert sum(n for (_, o), n in found.items() if o in ("ended", "went on")) == 20*60
    assert 20*194 <= questions <= 20*200
