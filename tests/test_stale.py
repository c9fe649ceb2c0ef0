"Which exhibits and steps an edit makes stale: lists written by hand, against what the closures say."
import re, shutil
import pytest
from m2kit.core.closure import closure, closure_of_code, forget_code, package_dir
from m2kit.reproduce.pipeline import notebooks

REST_ON_THE_WRITER = {"fig04", "agreement"}               # of rubrics: the ladder's rubric stage, and the writer itself
DO_NOT = {"fig08", "table2", "speculation"}

# Of the steps that exhibits rest on: what an edit of one file makes stale. The others must stay as they are.
PLAY, EXAM, RUNS = "m2kit.tiny.play:", "m2kit.tiny.grader_exam:", "m2kit.evaluate.tiny_runs:"
CONSULTED, ATTACKED, REFERENCE = PLAY + "consulted", PLAY + "under_attack", PLAY + "reference_scores"
EXAMINED, ASKED = "m2kit.tiny.rubric_exam:examined", EXAM + "asked_both_ways"
TIMED, COUNTED = EXAM + "both_readings", EXAM + "tokens_to_read"
BENCHMARKED, BEFORE_AFTER = RUNS + "benchmarked", RUNS + "before_after"
STEPS = {CONSULTED, ATTACKED, REFERENCE, EXAMINED, ASKED, TIMED, COUNTED, BENCHMARKED, BEFORE_AFTER}
EDITS = {   # file -> what stands there, what shall stand there, which steps are stale then
    "rubrics/generate": (r"\[writing_prompt\(s\) for s in sources\]", "[writing_prompt(s) for s in sources[::1]]", {EXAMINED}),
    "simulator/facts": (r"range\(self\.resamples \+ 1\)", "range(self.resamples + 2)", {CONSULTED, ATTACKED}),
    "simulator/fidelity": (r'if said\.kind in _NONE: return "contradiction"', 'if said.kind in _NONE: return "fabrication"',
                           {CONSULTED, REFERENCE}),
    "simulator/attack": (r"if len\(w\) >= 3", "if len(w) >= 4", {CONSULTED, ATTACKED, REFERENCE}),    # a leak is read by the attacks' reader
    "train/grpo": (r"loss = -\(torch\.min", "loss = (torch.min", {BEFORE_AFTER}),
    "evaluate/harness": (r"len\(batch\.items\)\n", "len(batch.items) + 0\n", {BENCHMARKED}),
    "rubrics/typed": (r"not typed and not c\.positive", "not typed and c.positive", {ASKED}),
    "rubrics/affinity": (r"max\(1, len\(tokens\) - found\)", "max(0, len(tokens) - found)", {COUNTED}),
    "lm/fork": (r"key=prompts\.__getitem__", "key=lambda i: prompts[i]", {ASKED, TIMED})}

@pytest.fixture(scope="module")
def books(): return {n: nb.source for n, nb in notebooks().items() if n in REST_ON_THE_WRITER | DO_NOT}

def closures(books, folder):
    "The name of each exhibit's and step's closure, with the package as it is in `folder`."
    forget_code()
    return {n: closure_of_code(source, folder=folder).name for n, source in books.items()} | {
        s: closure(s, folder=folder).name for s in STEPS}

@pytest.fixture(scope="module")
def before(books): return closures(books, package_dir())

@pytest.fixture
def edited(books, before, tmp_path):
    "What changes when a text in a file of the package does."
    folder = tmp_path/"m2kit"
    shutil.copytree(package_dir(), folder, ignore=shutil.ignore_patterns("__pycache__"))
    def edit(module, pattern, new):
        file = folder/f"{module}.py"
        text = file.read_text(encoding="utf-8")
        changed, n = re.subn(pattern, lambda _: new, text, count=1, flags=re.S)
        assert n == 1 and changed != text, f"nothing of {module} looks like {pattern}"
        file.write_text(changed, encoding="utf-8")
        return {n for n, name in closures(books, folder).items() if name != before[n]}
    yield edit
    forget_code()

def test_an_operator_in_the_rubrics_writer(edited):
    changed = edited("rubrics/generate", *EDITS["rubrics/generate"][:2])
    assert REST_ON_THE_WRITER <= changed and not DO_NOT & changed

@pytest.mark.parametrize("module", EDITS)
def test_an_operator_makes_its_steps_stale_and_no_others(edited, module):
    pattern, new, stale = EDITS[module]
    assert edited(module, pattern, new) & STEPS == stale

def test_a_docstring_changes_nothing(edited):
    assert edited("rubrics/generate", r'"A rubric for each source, ', '"In other words: a rubric for each source, ') == set()
