"""The scorer held to the reference on real rows. The data stay outside the project; no row is ever printed (they carry a canary)."""
import contextlib, io, json, os
from pathlib import Path
import pytest
from m2kit.core.errors import UserError
from m2kit.core.run import root
from m2kit.evaluate.healthbench import aggregate, example_score, read_rows
from m2kit.reproduce.cli import main
from m2kit.rubrics.rubric import Verdict

INPUTS = Path(os.environ.get("M2KIT_INPUTS") or root().parent/"shared"/"data")
DATA, EXPECTED = INPUTS/"healthbench_21.jsonl", INPUTS/"healthbench_21_expected.json"
real = pytest.mark.skipif(not (DATA.exists() and EXPECTED.exists()), reason="healthbench_21.jsonl is not in $M2KIT_INPUTS")

@pytest.fixture(scope="module")
def rows(): return list(read_rows(DATA))

def differing(got, want):
    "The names whose values differ: what may be shown when a comparison fails."
    return sorted(k for k in set(got) | set(want) if got.get(k) != want.get(k))

@real
def test_equals_the_reference_exactly(rows):
    got, want = aggregate(rows, bootstrap=0), json.loads(EXPECTED.read_text())
    assert sorted(got) == sorted(want)
    assert differing(got, want) == []
    assert all(type(got[k]) is type(want[k]) for k in want)

def said(*argv):
    "What `m2kit` prints."
    out = io.StringIO()
    with contextlib.redirect_stdout(out): assert main(list(map(str, argv))) == 0
    return out.getvalue()

@real
def test_the_command_line_gives_the_same():
    got, want = json.loads(said("score", DATA)), json.loads(EXPECTED.read_text())
    assert differing({k: got[k] for k in want}, want) == []

@real
def test_every_input_is_recognised():
    pytest.importorskip("fhir.resources", reason="reading FHIR takes the extra [fhir]")
    bundles = sorted((INPUTS/"fhir").glob("*.json"))
    lines = said("check", DATA, INPUTS/"agentclinic_medqa_30.jsonl", *bundles).splitlines()
    heads = [l.split(": ")[1].removesuffix(", all well") for l in lines if l.startswith(str(INPUTS))]     # what is worth a look follows below
    assert heads == ["healthbench, 21 read", "agentclinic, 30 read", *["fhir, 1 read"]*len(bundles)]

@real
def test_bootstrap_adds_one_deviation_per_name_and_repeats(rows):
    a, b = aggregate(rows, bootstrap=200, seed=5), aggregate(rows, bootstrap=200, seed=5)
    want = json.loads(EXPECTED.read_text())
    assert differing(a, b) == []
    assert set(a) - set(want) == {f"{k}:bootstrap_std" for k in want if not k.endswith(":n_samples")}
    assert 0 < a["overall_score:bootstrap_std"] < .2
    assert differing(a, aggregate(rows, bootstrap=200, seed=6)) != []

@real
def test_negative_examples_are_kept(rows):
    scores = [example_score(r) for r in rows]
    assert len(scores) == 21 and min(scores) < 0
    assert aggregate(rows, bootstrap=0)["overall_score"] < sum(max(0, s) for s in scores) / 21

@real
def test_one_flipped_verdict_moves_the_score(rows):
    flip = [[Verdict(not v.met) if i == j == 0 else v for j, v in enumerate(r.verdicts)] for i, r in enumerate(rows)]
    assert "overall_score" in differing(aggregate(rows, flip, bootstrap=0), aggregate(rows, bootstrap=0))

@real
def test_unknown_verdicts_are_counted_not_zeros(rows):
    known = aggregate(rows, bootstrap=0)
    got = aggregate(rows, [[v._replace(met=None) for v in rows[0].verdicts], *(r.verdicts for r in rows[1:])], bootstrap=0)
    assert got["unknown_verdicts"] == len(rows[0].rubrics) and got["overall_score:n_samples"] == 20
    assert got["overall_score:lowest"] <= known["overall_score"] <= got["overall_score:highest"]

@real
@pytest.mark.parametrize("spoil, message", [
    (lambda d: d["rubrics"][0].update(points=11), "from -10 to 10"), (lambda d: d["rubrics"][0].update(points="5"), "write a whole number"),
    (lambda d: d["rubrics"][0].update(criterion=""), "say what the answer should do"), (lambda d: d["verdicts"].pop(), "verdicts for"),
    (lambda d: d.pop("rubrics"), "rubrics is missing"), (lambda d: [c.update(points=-1) for c in d["rubrics"]], "no positive points"),
    (lambda d: d["verdicts"][0].update(criteria_met="no"), "write true, false, or null")])
def test_a_spoilt_row_is_named(tmp_path, spoil, message):
    lines = DATA.read_text(encoding="utf-8").splitlines()[:3]
    d = json.loads(lines[2])
    spoil(d)
    f = tmp_path/"spoilt.jsonl"
    f.write_text("\n".join(lines[:2] + [json.dumps(d)]), encoding="utf-8")
    with pytest.raises(UserError) as e: list(read_rows(f))
    assert f"spoilt.jsonl:3 ({d['prompt_id']})" in str(e.value) and message in str(e.value)
    assert "\n" not in str(e.value)
