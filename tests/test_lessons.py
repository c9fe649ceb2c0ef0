"""Every lesson, as a student gets it and as a student leaves it.

As shipped, each check fails with a message and nothing else fails; with the solutions every check passes. The knob changes the picture. A lesson
runs twice in one process of the fork server; its heavy cells run once.
"""
import json, os, subprocess, sys
from pathlib import Path
import pytest
from m2kit.core.lesson import Knob, Quiz, drawn, exercises, lesson_faults, read_lesson, read_solutions, run_lesson, with_solutions
from m2kit.reproduce.touched import fork_server

ROOT = Path(__file__).resolve().parents[1]
LESSONS = sorted((ROOT/"nbs/lessons").glob("[0-9]*.ipynb"))
name = lambda p: p.stem


def both_runs(path, folder, pipe):
    "What the process of a lesson does: run it as shipped and solved, and tell what the test wants to know."
    import tempfile
    tempfile.tempdir = os.environ["TMPDIR"] = str(folder)
    os.chdir(Path(path).parent)
    cells = read_lesson(path)
    answers = read_solutions(Path(path).parent/"solutions"/f"{Path(path).stem}.py")
    shipped = run_lesson(cells)
    solved = run_lesson(with_solutions(cells, answers), shipped)
    errors = lambda ran: {n: e and (type(e).__name__, str(e)) for n, e in ran.checks.items()}
    knobs = [k for k in shipped.shown if isinstance(k, Knob) and k.ranges]
    ends = {n: [drawn(f) for f in pair] for k in knobs for n, pair in k.ends().items()}
    quizzes = [len(q.questions) for q in shipped.shown if isinstance(q, Quiz)]
    shows = [k._repr_mimebundle_() for k in knobs]
    pipe.send(dict(shipped=errors(shipped), solved=errors(solved), faults=[(i, repr(e)) for r in (shipped, solved) for i, e in r.faults],
                   ends=ends, knobs=len(knobs), quizzes=quizzes, pictures=["image/png" in s for s in shows]))


@pytest.fixture(scope="module", params=LESSONS, ids=name)
def told(request, tmp_path_factory):
    context = fork_server()
    here, there = context.Pipe(False)
    p = context.Process(target=both_runs, args=(str(request.param), str(tmp_path_factory.mktemp("lesson")), there))
    p.start(); there.close()
    try: answer = here.recv() if here.poll(300) else None
    except EOFError: answer = None
    p.join(10)
    assert answer, f"{request.param}: the lesson's process ended without an answer"
    return answer


def test_as_shipped_and_solved(told):
    assert told["faults"] == []
    assert len(told["shipped"]) == 3
    for n, error in told["shipped"].items():
        assert error, f"{n}: its check passes although the gap is open"
        assert error[0] == "AssertionError" and len(error[1]) > 10, f"{n}: {error}; a check fails with a message for the student"
    assert told["solved"] == dict.fromkeys(told["shipped"]), "a solution does not pass its check"


def test_knob_and_quiz(told):
    assert told["knobs"] == 1 and told["ends"], "one knob"
    for n, (low, high) in told["ends"].items(): assert low and low != high, f"turning {n} all the way changes nothing"
    assert told["pictures"] == [True], "the knob's picture at its defaults"
    assert len(told["quizzes"]) == 1 and 3 <= told["quizzes"][0] <= 4


@pytest.mark.parametrize("path", LESSONS, ids=name)
def test_lesson_is_complete(path):
    cells = read_lesson(path)
    assert lesson_faults(cells) == []
    title = cells[0].source.splitlines()[0]
    assert title.startswith(f"# {int(path.stem[:2])}. "), title
    text = "".join(c.source for c in cells if c.kind == "markdown")
    for near in LESSONS:
        if abs(int(near.stem[:2]) - int(path.stem[:2])) == 1: assert f"({near.name})" in text, f"no link to {near.name}"
    assert f"(solutions/{path.stem}.py)" in text, "the instructor's note links to the solutions"


@pytest.mark.parametrize("path", LESSONS, ids=name)
def test_a_message_does_not_tell_the_answer(path):
    cells, answers = read_lesson(path), read_solutions(path.parent/"solutions"/f"{path.stem}.py")
    for n, (gap, check) in exercises(cells).items():
        mine = [line.strip() for line in answers[n].splitlines() if line.strip() and line not in cells[gap].source]
        told = [line for line in mine if len(line) > 8 and line in cells[check].source]
        assert mine and not told, f"{n}: the check has the solution's {told}"


def test_lessons_are_numbered_without_a_gap():
    assert [int(p.stem[:2]) for p in LESSONS] == list(range(1, len(LESSONS) + 1)) and LESSONS
    assert {p.stem for p in (ROOT/"nbs/lessons/solutions").glob("*.py")} == {p.stem for p in LESSONS}


@pytest.mark.long
@pytest.mark.parametrize("path", LESSONS, ids=name)
def test_in_a_kernel_as_a_student_runs_it(path, tmp_path):
    "The real thing: nbclient, a kernel, from top to bottom as shipped; git sees no change."
    import nbformat
    from nbclient import NotebookClient
    before = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True).stdout
    nb = nbformat.read(path, as_version=4)
    NotebookClient(nb, timeout=300, resources=dict(metadata=dict(path=str(path.parent)))).execute()
    failed = [c for c in nb.cells if c.cell_type == "code" and any(o.output_type == "error" for o in c.outputs)]
    assert len(failed) == 3 and all("check" in c.metadata.tags for c in failed)
    assert subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True).stdout == before
