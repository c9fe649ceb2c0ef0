"""The rules of evaluate.crosscheck against the packages' own code, each in a folder of its own: `pytest -m peers` (asks the package index).

A package is installed without what it depends on; what it imports and does not find is stood in for, since the lines that score need none of
it. When a package is mended upstream, its test fails here first: change the rule, its version and the chapter's "Today's divergences".
"""
import importlib.util, json, os, random, subprocess, sys
from pathlib import Path
import pytest
from m2kit.core.run import root, runs_dir
from m2kit.evaluate.crosscheck import HEALTHBENCH_RULES, axis_scores
from m2kit.evaluate.healthbench import Row
from m2kit.rubrics.rubric import Criterion, Verdict

RULE = {r.name: r for r in HEALTHBENCH_RULES}
peers = pytest.mark.peers

STAND_INS = r"""
import asyncio, importlib.abc, importlib.machinery, json, logging, sys, types
logging.disable(logging.CRITICAL)
class Anything:
    "Whatever a package that is not here would have given: a base class, an annotation, a decorator."
    def __new__(cls, *a, **k): return a[0] if len(a) == 1 and not k and isinstance(a[0], types.FunctionType) else object.__new__(cls)
    def __init__(self, *a, **k): self.__dict__.update(k)
    def __call__(self, *a, **k): return a[0] if a else self
    def __class_getitem__(cls, k): return cls
    def __getattr__(self, n):
        if n.startswith("__"): raise AttributeError(n)
        return Anything()
class Module(types.ModuleType):
    __path__ = []
    def __getattr__(self, n):
        if n.startswith("__"): raise AttributeError(n)
        return type(n, (Anything,), {})
class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    "Only for what the package itself imports: its neighbours find their own way around what is not there."
    def find_spec(self, name, path=None, target=None):
        f = sys._getframe(1)
        while f.f_code.co_filename.startswith("<frozen"): f = f.f_back
        asks = f.f_code.co_filename.startswith(HOME) and name.split(".")[0] not in OURS
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if asks else None
    def create_module(self, spec): return Module(spec.name)
    def exec_module(self, module): pass
sys.meta_path.append(Finder())
cases = json.load(sys.stdin)
"""

OWN = {
"simple-evals": ("", "", r"""
import importlib.util, os
sys.path.insert(0, os.path.dirname(os.environ["M2KIT_SIMPLE_EVALS"].rstrip("/")))
m = importlib.import_module(os.path.basename(os.environ["M2KIT_SIMPLE_EVALS"].rstrip("/")) + ".healthbench_eval")
def one(points, met):
    if None in met: return None
    return m.calculate_score([m.RubricItem("", p, []) for p in points], [dict(criteria_met=x) for x in met])
"""),
"medhelm": ("medhelm==0.8.0", "helm", r"""
from helm.benchmark.annotation.health_bench_annotator import calculate_score
def one(points, met):
    return calculate_score([dict(points=p) for p in points], [dict(criteria_met=x) for x in met if x is not None])
"""),
"inspect_evals": ("inspect-evals==0.26.0", "inspect_evals", r"""
from inspect_evals.healthbench.scorer import _calculate_score_metadata, _evaluate_criterion
class Judge:
    "Says what it is told to say."
    def __init__(self, met): self.text = "I cannot say." if met is None else json.dumps(dict(criteria_met=met, explanation=""))
    async def generate(self, **k): return types.SimpleNamespace(completion=self.text)
async def grade(points, met):
    return [await _evaluate_criterion(Judge(x), dict(criterion="", points=p), "") for p, x in zip(points, met)]
def one(points, met):
    graded = asyncio.run(grade(points, met))
    got = sum(c["points"] for c in graded if c["met"])
    return _calculate_score_metadata(graded, sum(p for p in points if p > 0), got)["healthbench_score"]
"""),
"autorubric": ("autorubric==1.6.1", "autorubric", r"""
from autorubric.scoring import score_reports
from autorubric.types import CannotAssessConfig, CriterionReport, CriterionVerdict as V
def one(points, met):
    told = {True: V.MET, False: V.UNMET, None: V.CANNOT_ASSESS}
    return score_reports([CriterionReport(requirement="x", weight=float(p), verdict=told[x], reason="")
                          for p, x in zip(points, met)], CannotAssessConfig())
"""),
"rubric": ("rubric==2.2.0", "rubric", r"""
from rubric.autograders.per_criterion_grader import PerCriterionGrader
from rubric.types import Criterion
async def says(**k):
    met = QUEUE.pop(0)
    if met is None: raise ValueError("the reply does not fit the schema")
    from rubric.autograders.schemas import PerCriterionOutput
    return PerCriterionOutput(criterion_status="MET" if met else "UNMET", explanation="")
def one(points, met):
    global QUEUE
    QUEUE = list(met)
    async def run():
        g = PerCriterionGrader(generate_fn=says)
        reports = [await g._judge_single_criterion(Criterion(weight=p, requirement="x"), "") for p in points]
        return (await g.aggregate(reports)).score
    try: return asyncio.run(run())
    except ValueError: return None
"""),
"verifiers": ("verifiers==0.4.0", "verifiers", r"""
import importlib.util, pathlib, re, tempfile
place = pathlib.Path(HOME)/"verifiers/v1/judges/rubric.py"     # alone: the rest of the package wants other versions than ours
for name in re.findall(r"^from (verifiers[.\w]+) import", place.read_text(), re.M):
    for k in range(1, name.count(".") + 2): sys.modules.setdefault(n := ".".join(name.split(".")[:k]), Module(n))
spec = importlib.util.spec_from_file_location("their_rubric", place)
r = importlib.util.module_from_spec(spec); sys.modules["their_rubric"] = r; spec.loader.exec_module(r)
def load(points):
    with tempfile.TemporaryDirectory() as d:
        f = pathlib.Path(d)/"r.json"
        f.write_text(json.dumps([dict(name=str(i), text="x", weight=p) for i, p in enumerate(points)]))
        return r.load_criteria(f)
def one(points, met):
    if any(p < 0 for p in points):
        try: load(points); raise SystemExit("negative weights are admitted now")
        except ValueError: pass
    good = [(p, x) for p, x in zip(points, met) if p > 0]
    criteria, told = load([p for p, _ in good]), {True: "yes", False: "no", None: "I cannot say"}
    async def batch(task, trace, some):
        said = [r.CriterionVerdict(name=c.name, reason="", verdict=told[good[int(c.name)][1]]) for c in some]
        return r.score_verdicts(said, some, "the batch's")
    me = types.SimpleNamespace(criteria=criteria, grade_batch=batch, reward_name="r", config=types.SimpleNamespace(max_criteria=None))
    try: return asyncio.run(r.RubricJudge.score(me, None, types.SimpleNamespace(record_metric=lambda *a: None)))
    except ValueError: return None
"""),
}

def folder_of(package):
    "Where a package is installed, alone; skips where the index has none to give."
    to = runs_dir()/"peers"/package
    if not (to/"done").exists():
        r = subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(to), package], capture_output=True, text=True)
        if r.returncode: pytest.skip(f"{package} could not be installed: {r.stderr.strip().splitlines()[-1:]}")
        (to/"done").touch()
    return to

def own_scores(name, cases, script=None):
    "What the package's own code gives."
    package, module, own = OWN[name]
    path = [str(folder_of(package))] if package else []
    code = f"OURS, HOME = {{{module!r}}}, {(path or ['nowhere'])[0]!r}\n" + STAND_INS + (script or own + "\nprint(json.dumps([one(*c) for c in cases]))")
    env = os.environ | dict(PYTHONPATH=os.pathsep.join([*path, *filter(None, [os.environ.get("PYTHONPATH")])]))
    r = subprocess.run([sys.executable, "-c", code], input=json.dumps(cases), capture_output=True, text=True, env=env, cwd=root())
    assert r.returncode == 0, r.stderr[-3000:]
    return json.loads(r.stdout.splitlines()[-1])

def random_cases(n=400, seed=1):
    "Points and verdicts: a third with negative items alone left out, a third with unread verdicts."
    rng = random.Random(seed)
    def one(i):
        points = [rng.choice([-10, -9, -8, -5, -2, *range(1, 11)]) for _ in range(rng.randint(1, 12))] + [rng.randint(1, 9)]
        return points, [None if i % 3 == 0 and rng.random() < .15 else rng.random() < .5 for _ in points]
    return [one(i) for i in range(n)]

@peers
@pytest.mark.parametrize("name", OWN)
def test_a_rule_is_its_packages_own(name):
    if name == "simple-evals" and not os.environ.get("M2KIT_SIMPLE_EVALS"): pytest.skip("$M2KIT_SIMPLE_EVALS names no checkout")
    cases = random_cases()
    theirs, ours = own_scores(name, cases), [RULE[name].score(p, m) for p, m in cases]
    differ = [(c, a, b) for c, a, b in zip(cases, theirs, ours) if (a is None) != (b is None) or a is not None and abs(a - b) > 1e-12]
    assert not differ, f"{len(differ)} of {len(cases)}, the first: {differ[0]}"
    assert sum(x is not None for x in theirs) > 200

@peers
def test_inspect_evals_clips_axes_in_each_example():
    rows = [Row(str(i), (), tuple(Criterion(p, f"does {j}", tags=(f"axis:{'ab'[j % 2]}",)) for j, p in enumerate(points)), (),
                verdicts=tuple(map(Verdict, met))) for i, (points, met) in enumerate(random_cases(200)) if None not in met]
    cases = [[dict(criterion=c.text, points=c.points, tags=list(c.tags), met=v.met) for c, v in zip(r.rubrics, r.verdicts)] for r in rows]
    theirs = own_scores("inspect_evals", cases, r"""
from inspect_evals.healthbench.scorer import _process_category_data
scores = [types.SimpleNamespace(score=types.SimpleNamespace(metadata=dict(detailed_results=c), value=None)) for c in cases]
print(json.dumps({k: sum(v["sample_scores"])/len(v["sample_scores"]) for k, v in _process_category_data(scores, "axis:").items()}))
""")
    for axis, (reference, clipped) in axis_scores(rows).items():
        assert abs(theirs[axis.removeprefix("axis:")] - clipped) < 1e-12 and clipped > reference + .01

@peers
def test_the_template_is_the_same_in_two_programs():
    from hashlib import sha256
    text = own_scores("inspect_evals", [], "from inspect_evals.healthbench.scorer import GRADER_TEMPLATE as t\nprint(json.dumps(t))")
    assert sha256(text.strip().encode()).hexdigest() == "2adffd51fd259554ebcd036ad1072d4aa2b7ce3aec2bbffe36271f911632ed3c"

def test_every_rule_with_a_package_has_its_own_code_here():
    assert set(OWN) == set(RULE) - {"Baichuan-M3"}
    for name, (package, _, _) in OWN.items():
        if package: assert package.replace("==", " ") in RULE[name].where, "the chapter names another version"
