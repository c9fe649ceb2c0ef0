"""Jobs on two machines of a Ray cluster, both of them this one: dealt out, refused where they cannot fit, and finished when a machine dies."""
import time
import pytest

pytestmark = pytest.mark.long
ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'm2kit[cluster]'")

from m2kit.core.cluster import RAY, look_everywhere, on_cluster
from m2kit.core.errors import UserError
from m2kit.core.run import data_dir
from m2kit.train.experiments import arm_step, train_arms

SMALL = dict(steps=12, prompts=2, group=4, max_new=48, l_max=48, save_every=4)
PLACE = "m2kit.train.experiments:train_arm"


@pytest.fixture
def cluster(monkeypatch):
    "Two nodes of one core each; this process sends to them."
    from ray.cluster_utils import Cluster
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    c = Cluster(initialize_head=True, head_node_args=dict(num_cpus=1))
    c.second = c.add_node(num_cpus=1)
    monkeypatch.setenv(RAY, c.address)
    yield c
    ray.shutdown(); c.shutdown()


def arms(base): return [dict(doctor=str(data_dir()/"tiny/pupil"), seed=s, base=str(base), **SMALL) for s in range(5)]


def test_a_machine_dies_and_every_arm_ends_as_it_would_here(cluster, tmp_path, monkeypatch):
    begun, told = arms(tmp_path/"there"), []
    def tell(line):
        told.append(line)
        some = sum(len(arm_step(**a).rows()) for a in begun)
        if some > 6 and cluster.second: cluster.remove_node(cluster.second, allow_graceful=False); cluster.second = None
    there = train_arms(begun, tell=tell, every=.5)
    assert cluster.second is None and len(told) > 3                # it was killed, and not before work had begun
    assert all(len(rows) == SMALL["steps"] for rows in there)
    monkeypatch.delenv(RAY)
    assert train_arms(arms(tmp_path/"here")) == there


def test_an_error_of_a_job_comes_back_as_itself(cluster):
    with on_cluster(cluster.address, "m2kit.core.run:atomic_write") as submit:
        with pytest.raises(TypeError): submit(dict(path="/nowhere", data=None)).result(60)


def test_a_machine_with_other_steps_is_refused(cluster, monkeypatch):
    with on_cluster(cluster.address, PLACE): pass                  # both see this machine's disk
    from m2kit.core import cluster as chapter
    monkeypatch.setattr(chapter, "look_around", lambda token, target: dict(host="b", sees=False, code="x"))
    with pytest.raises(UserError, match="machine b: it does not see .*M2KIT_RUNS=FOLDER"): look_everywhere(ray, PLACE)


def test_nobody_answers(monkeypatch):
    from m2kit.core.cluster import connected
    began = time.monotonic()
    with pytest.raises(UserError, match="no Ray cluster answers at 127.0.0.1:1; .*ray start --head"): connected("127.0.0.1:1")
    assert time.monotonic() - began < 60
