"What several test files share."
import importlib.util, os, shutil, socket, subprocess, sys, time, urllib.request
from pathlib import Path
import pytest

# One thread a process, as in the Makefile: tests run in as many processes as there are cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

def wait_for(ready, seconds=60.0):
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, f"not ready in {seconds} s"
        time.sleep(.005)

def healthy(p, port, out):
    assert p.poll() is None, out.read_text()[-2000:]
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try: return direct.open(f"http://127.0.0.1:{port}/health", timeout=5).status == 200
    except OSError: time.sleep(.2); return False

@pytest.fixture(scope="module")
def one_thread():
    "torch on one thread, as the trainings run."
    import torch
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

@pytest.fixture(scope="session")
def serve(tmp_path_factory):
    "A function from a checkpoint to a generator of one address: `transformers serve` runs until the generator ends."
    def run(checkpoint):
        pytest.importorskip("fastapi"); pytest.importorskip("uvicorn")
        with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
        tool, out = Path(sys.executable).with_name("transformers"), tmp_path_factory.mktemp("serve")/"log"
        with open(out, "w") as f:
            p = subprocess.Popen([tool, "serve", checkpoint, "--device", "cpu", "--host", "127.0.0.1", "--port", str(port)], stdout=f, stderr=f, env=dict(os.environ, HF_HUB_OFFLINE="1"))
        try:
            wait_for(lambda: healthy(p, port, out), 120)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            p.terminate()
            try: p.wait(10)
            except subprocess.TimeoutExpired: p.kill(); p.wait()
    return run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
DRIVER = importlib.util.find_spec("playwright") and importlib.util.find_spec("axe_playwright_python")

@pytest.fixture(scope="module")
def browser():
    "This machine's Chromium. Skipped, and told, where there is none; where there is one (or M2KIT_BROWSER=1 promises it) a skip would hide something, and fails."
    install = "pip install -c constraints.txt -e '.[browser]'"
    if not CHROMIUM and os.environ.get("M2KIT_BROWSER") == "1": pytest.fail("a Chromium was promised, and there is none")
    if not CHROMIUM: pytest.skip("no Chromium on this machine")
    if not DRIVER: pytest.fail(f"{CHROMIUM} is there, playwright and axe are not: {install}")
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield b
        b.close()
