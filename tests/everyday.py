"""How well a simulated patient is talked to in everyday English: 200 questions and 60 closings to 20 patients, each as the second turn of a consultation.

`nice python tests/everyday.py` prints the table for the tiny models; `python tests/everyday.py 5` asks 5 patients. The rows are data/everyday_questions.jsonl, written before
any code that is to pass them, and never read by a training: a row has `text`; `topic`, what of the knowledge base it asks for (an act of `clinic.interview`, null where the clinic knows nothing of it)
and its `item`; `also`, kinds of replies that are right as well; `sex`, where only such patients are asked.

- rightly: the reply tells what a truthful and discreet patient tells (`clinic.interview.content`), and nothing false. That may be "I cannot say", where the script holds nothing of a symptom.
- not understood: the patient says so, or that he does not know, where he could have told more; nothing else.
- wrongly ended: gate or patient ended the consultation at a question.
- wrongly: everything else: another topic's answer, something false or private, a word that cannot be read.
"""
import json, random, sys
from collections import Counter
from pathlib import Path

ROWS = Path(__file__).with_name("data")/"everyday_questions.jsonl"
CLOSES = ("diagnose", "leave")
OUTCOMES = ("rightly", "wrongly", "not understood", "wrongly ended")
NOT_UNDERSTOOD = ("I did not understand that.", "I am sorry, could you ask me that in another way?")
BESIDE = ("asks_treatment", "hurt", "soothed", "plans", "resists_cost", "wants_evidence", "asks_word", "asks_family", "hello")   # of character, beside an answer
SLOT = dict(ask_history="history", ask_medicines="medicines", ask_allergies="allergies")

def rows(): return [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]

def asked_of(row, script): return "sex" not in row or row["sex"] == script.case.medical.sex

def due(row, script):
    "The (kind, item) pairs of which a right reply holds one."
    from m2kit.clinic.interview import DoctorTurn, content
    act, item = row["topic"], row["item"]
    if act in SLOT and item:      # whether this patient has, takes or is allergic to one thing
        kind, known = SLOT[act], script.items(SLOT[act])
        one = dict(history="history", medicines="medicine", allergies="allergy")[kind]
        if item in known: return {(one, item), ("affirm", item)}
        return {("deny", item)} | (set() if known else {(f"no_{one}", "")})
    said = content(script, DoctorTurn(act, item)) if act else []
    found = {("affirm" if k == "complaint" else k, "" if k == "unsure" else x) for k, x in said}
    if act == "ask_symptom" and item not in script.items("symptoms"): found |= {("deny", item)}    # the script says nothing of it
    return found

def outcome(row, script, reply, ended):
    "What became of a question, in a word of `OUTCOMES`; for a closing, whether it ended."
    from m2kit.clinic.interview import read_reply
    from m2kit.simulator.fidelity import leaks, statement_fault
    if row["topic"] in CLOSES: return "ended" if ended else "went on"
    if ended or reply is None: return "wrongly ended"
    said, want = [s for s in read_reply(reply) if s.sentence not in NOT_UNDERSTOOD], due(row, script)
    if leaks(script, row["text"], reply) or any(s.kind == "other" or statement_fault(script, s) for s in said): return "wrongly"
    is_due = lambda s: (s.kind, s.item) in want or s.kind in row.get("also", ())
    told = [s for s in said if s.kind not in BESIDE or is_due(s)]
    if any(map(is_due, told)): return "rightly" if all(is_due(s) or s.kind in BESIDE for s in told) else "wrongly"
    return "not understood" if all(s.kind == "unsure" for s in told) and (told or len(said) < len(read_reply(reply))) else "wrongly"

def measured(sim, patients=20, seed=0, some=None):
    "A Counter of (group, outcome), and examples of what went wrong."
    from m2kit.clinic.persona import draw_script
    scripts = [draw_script(random.Random(f"everyday {seed}/{i}")) for i in range(patients)]
    found, examples = Counter(), []
    for script in scripts:
        from m2kit.clinic.interview import DoctorTurn, reply
        ask = [r for r in some or rows() if asked_of(r, script)]
        first = reply(script, [], DoctorTurn("open"), random.Random(script.id))
        talk = [dict(role="assistant", content="What brings you here today?"), dict(role="user", content=first)]
        for at in range(0, len(ask), 64):
            part = ask[at:at + 64]
            records = sim.replies([script]*len(part), [[*talk, dict(role="assistant", content=r["text"])] for r in part], list(range(at, at + len(part))))
            for row, r in zip(part, records, strict=True):
                what = outcome(row, script, r.reply, r.gate.stop or r.ended)
                found[row["group"], what] += 1
                if what in ("wrongly", "wrongly ended", "went on"): examples.append((what, row["text"], r.reply, r.gate.trigger))
    return found, examples

def table(found):
    "Lines of a Markdown table: shares by group, and of all questions; then the closings."
    groups = list(dict.fromkeys(r["group"] for r in rows()))
    of = lambda g, o: sum(n for (h, p), n in found.items() if p == o and (g is None or h == g))
    out = ["| questions | asked | " + " | ".join(OUTCOMES) + " |", "| --- "*6 + "|"]
    for g in [*groups, None]:
        total = sum(of(g, o) for o in OUTCOMES)
        if total: out.append(f"| {g or '**all**'} | {total} | " + " | ".join(f"{100*of(g, o)/total:.1f}%" for o in OUTCOMES) + " |")
    for g in groups:
        if total := of(g, "ended") + of(g, "went on"): out.append(f"| {g}: ended | {total} | {100*of(g, 'ended')/total:.1f}% |")
    return out

if __name__ == "__main__":
    import torch
    from m2kit.simulator.patient import open_simulator
    torch.set_num_threads(1)
    found, examples = measured(open_simulator(), int((sys.argv[1:] or [20])[0]))
    print(*table(found), "", *map(str, random.Random(0).sample(examples, min(40, len(examples)))), sep="\n")
