"Which exhibits an edit makes stale: lists written by hand, against what the closures say."
import re, shutil
import pytest
from m2kit.core.closure import closure_of_code, forget_code, package_dir
from m2kit.reproduce.pipeline import notebooks

REST_ON_THE_WRITER = {"fig04", "agreement"}               # of rubrics: the ladder's rubric stage, and the writer itself
DO_NOT = {"fig08", "table2", "speculation"}

@pytest.fixture(scope="module")
def books(): return {n: nb.source for n, nb in notebooks().items() if n in REST_ON_THE_WRITER | DO_NOT}

def closures(books, folder):
    "The name of each exhibit's closure, with the package as it is in `folder`."
    forget_code()
    return {n: closure_of_code(source, folder=folder).name for n, source in books.items()}

@pytest.fixture
def edited(books, tmp_path):
    "Which exhibits change when a text in rubrics/generate does."
    folder = tmp_path/"m2kit"
    shutil.copytree(package_dir(), folder, ignore=shutil.ignore_patterns("__pycache__"))
    before, file = closures(books, folder), folder/"rubrics"/"generate.py"
    def edit(pattern, new):
        text = file.read_text(encoding="utf-8")
        changed, n = re.subn(pattern, new, text, count=1, flags=re.S)
        assert n == 1 and changed != text, f"nothing of rubrics/generate looks like {pattern}"
        file.write_text(changed, encoding="utf-8")
        return {n for n, name in closures(books, folder).items() if name != before[n]}
    yield edit
    forget_code()

def test_an_operator_in_the_rubrics_writer(edited):
    changed = edited(r"\[writing_prompt\(s\) for s in sources\]", "[writing_prompt(s) for s in sources[::1]]")
    assert REST_ON_THE_WRITER <= changed and not DO_NOT & changed

def test_a_docstring_changes_nothing(edited):
    assert edited(r'"A rubric for each source, ', '"In other words: a rubric for each source, ') == set()
