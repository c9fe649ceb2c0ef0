"""What the exhibits claim, and what they rest on: verdicts follow from stored numbers, and nothing stale is shown as if it were fresh."""
import json, re, shutil
from pathlib import Path
import pytest
from PIL import Image
from m2kit.core.errors import UserError
from m2kit.core.plot import stamp, unstamp
from m2kit.core.stats import UNTESTED, VERDICTS, Freshness
from m2kit.reproduce.claims import WHOSE, book_of, counts_sentence, gather, read_claim, read_exhibits
from m2kit.reproduce.exhibits import relabel
from m2kit.reproduce.report import write_report

FIGURES = Path(__file__).resolve().parents[1]/"figures"
REPORT = FIGURES/"report.html"

def mislabelled(figures):
    "Every place in a folder of figures where something stale is shown as if it were fresh, or the other way round."
    found, exhibits = [], read_exhibits(figures)
    ledger = json.loads((figures/"claims.json").read_text(encoding="utf-8"))
    page = (figures/"report.html").read_text(encoding="utf-8")
    sections = dict(re.findall(r'<section id="([^"]+)">(.*?)</section>', page, re.S))
    for name, e in exhibits.items():
        stale = (e["freshness"] or {}).get("state") == "stale"
        if e["label"] == "measured" and not e["freshness"]: found.append(f"{name}.json: measured, and says nothing of its evidence")
        if (b'id="stale"' in (figures/f"{name}.svg").read_bytes()) != stale: found.append(f"{name}.svg")
        with Image.open(figures/f"{name}.png") as png:
            if ("banner" in png.info) != stale: found.append(f"{name}.png")
        if ("STALE: made by older code" in sections.get(name, "")) != stale: found.append(f"{name} in the report")
        rows = [r for r in ledger["claims"] if r["exhibit"] == name]
        if stale and any(r["verdict"] != UNTESTED for r in rows): found.append(f"{name} in the ledger")
        if {r["id"] for r in rows} != {c["id"] for c in e["claims"]}: found.append(f"{name}: the ledger lacks claims")
    return found

def test_nothing_stale_is_shown_as_fresh():
    assert mislabelled(FIGURES) == []

def test_ledger_and_report_are_of_the_figures():
    ledger = json.loads((FIGURES/"claims.json").read_text(encoding="utf-8"))
    assert ledger == book_of(FIGURES), "figures/claims.json is older than the exhibits; run: m2kit reproduce"
    assert REPORT.exists()

def test_every_claim_says_whose_it_is_and_why():
    rows = book_of(FIGURES)["claims"]
    assert len({r["id"] for r in rows}) == len(rows) > 80
    for r in rows:
        assert r["whose"] in WHOSE and r["verdict"] in VERDICTS and r["exhibit"].startswith(r["id"].split(".")[0])
        assert (r["verdict"] == UNTESTED) == bool(r["untested"])
    labels = {r["label"] for r in rows if r["computed"] != UNTESTED}
    assert "redrawn" not in labels, "the paper agreeing with itself is no reproduction"

@pytest.fixture
def folder(tmp_path):
    "Two exhibits of the book: a stale one and a fresh one."
    for name in ("length_gate", "typed_prompts"):
        for kind in ("json", "png", "svg"): shutil.copy(FIGURES/f"{name}.{kind}", tmp_path)
    relabel("length_gate", Freshness("stale", "train.grpo changed"), tmp_path)
    relabel("typed_prompts", Freshness("fresh"), tmp_path)
    gather(tmp_path); write_report(tmp_path)
    assert mislabelled(tmp_path) == []
    return tmp_path

@pytest.mark.parametrize("part", ["png", "svg", "json", "claims", "report"])
def test_a_stale_exhibit_shown_as_fresh_is_named(folder, part):
    files = {k: (folder/f"length_gate.{k}").read_bytes() for k in ("png", "svg")}
    if part in files: (folder/f"length_gate.{part}").write_bytes(unstamp(files)[part])
    elif part == "json":
        made = json.loads((folder/"length_gate.json").read_text())
        (folder/"length_gate.json").write_text(json.dumps(made | dict(freshness=dict(state="fresh", why=""))))
    elif part == "claims":
        ledger = json.loads((folder/"claims.json").read_text())
        for r in ledger["claims"]: r["verdict"] = r["computed"]
        (folder/"claims.json").write_text(json.dumps(ledger))
    else: (folder/"report.html").write_text((folder/"report.html").read_text().replace("STALE: made by older code", ""))
    assert any("length_gate" in m for m in mislabelled(folder))

def test_a_fresh_one_with_a_banner_is_named_too(folder):
    files = {k: (folder/f"typed_prompts.{k}").read_bytes() for k in ("png", "svg")}
    (folder/"typed_prompts.png").write_bytes(stamp(files, "nothing")["png"])
    assert mislabelled(folder) == ["typed_prompts.png"]

def test_a_verdict_that_its_numbers_do_not_give_is_refused(folder):
    path = folder/"length_gate.json"
    made = json.loads(path.read_text())
    claim = next(c for c in made["claims"] if c["findings"])
    claim["findings"][0]["low"], claim["findings"][0]["high"] = -9., 9.
    claim["verdict"] = claim["findings"][0]["verdict"] = "reproduced"
    path.write_text(json.dumps(made))
    with pytest.raises(UserError, match="its numbers say 'cannot tell'"): gather(folder)
    with pytest.raises(UserError, match="run its exhibit again"): read_claim(claim)

def test_the_first_page_says_what_came_out():
    words = counts_sentence(book_of(FIGURES)["counts"])
    assert words in (FIGURES.parent/"README.md").read_text(encoding="utf-8"), f"write into nbs/index.ipynb, then make readme: {words}"
