"The lecture of 45 minutes, by the clock: its plan adds up, it runs in one go, the policy learns, and the machine needs little of it."
import os, re
from pathlib import Path
import pytest
from m2kit.core.lesson import Knob, drawn, read_lesson, run_lesson
from m2kit.reproduce.touched import fork_server

LECTURE = Path(__file__).resolve().parents[1]/"nbs/lessons/rubric_rl_in_45_minutes.ipynb"


def lecture(folder, pipe):
    "What the lecture's process does: run it, and tell what the tests want to know."
    import tempfile
    tempfile.tempdir = os.environ["TMPDIR"] = str(folder)
    os.chdir(LECTURE.parent)
    ran = run_lesson(read_lesson(LECTURE))
    names = ran.names
    knobs = [k for k in ran.shown if isinstance(k, Knob) and k.ranges]
    ends = {n: [drawn(f) for f in pair] for k in knobs for n, pair in k.ends().items()}
    pipe.send(dict(faults=[(i, repr(e)) for i, e in ran.faults], plan=names.get("PLAN"), rows=names.get("rows"), ends=ends, said=ran.said,
                   gain=float(names["scores_after"].mean() - names["scores_before"].mean()) if "scores_after" in names else None))


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    context = fork_server()
    here, there = context.Pipe(False)
    p = context.Process(target=lecture, args=(str(tmp_path_factory.mktemp("lecture")), there))
    p.start(); there.close()
    try: answer = here.recv() if here.poll(600) else None
    except EOFError: answer = None
    p.join(10)
    assert answer, "the lecture's process ended without an answer"
    return answer


def test_it_runs_and_learns(told):
    assert told["faults"] == [] and told["gain"] > .1


def test_the_knob_turns(told):
    assert set(told["ends"]) == {"coef", "thresh"}
    for low, high in told["ends"].values(): assert low != high


def test_the_table_is_the_plan(told):
    "The minutes that a reader sees are those that the clock is held against."
    text = "\n".join(c.source for c in read_lesson(LECTURE) if c.kind == "markdown")
    table = {what: int(n) for n, what in re.findall(r"(?m)^\| (\d+) \| ([^|]+?) \|", text)}
    assert table == told["plan"] and sum(table.values()) == 45
    at = 0
    for what, minutes in table.items():
        assert f"## {what}\n*Minutes {at} to {at + minutes}.*" in text, what
        at += minutes


def test_the_machine_needs_little_of_it(told):
    "Under three minutes of CPU, and each part less than half of its minutes."
    print(told["said"][told["said"].rindex("part  "):])
    assert sum(cpu for _, _, cpu, _ in told["rows"]) < 180
    for part, minutes, cpu, _ in told["rows"]: assert cpu < 30*minutes, (part, cpu)
