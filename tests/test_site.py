"""The site as a reader gets it: its search finds, nothing leads nowhere; and in a real browser, where there is one, no error and no barrier.

Quick: a site of one room. Long: the whole one, in the Chromium of this machine (with `pip install -c constraints.txt -e '.[browser]'`, which brings
the axe-core that looks for barriers, inside axe-playwright-python). Where Sphinx or a Chromium is absent the browser's tests say so.
"""
import functools, http.server, importlib.util, json, os, re, shutil, threading
from pathlib import Path
import pytest
from m2kit.core.errors import UserError
from m2kit.core.run import atomic_write
from m2kit.reproduce.claims import book_of, counts_sentence
from m2kit.reproduce.site import broken_links, build_site, front_path, front_summary, write_front

ROOT = Path(__file__).resolve().parents[1]
FIGURES = ROOT/"figures"
SPHINX = importlib.util.find_spec("sphinx") and importlib.util.find_spec("myst_nb")
PAGES = ("index.html", "map.html", "claims.html", "live.html", "consult.html", "consult_alone.html", "train/grpo.html", "train/rewards.html", "exhibits/fig05_length.html",
         "lessons/03_rewards.html", "figures/report.html", "api/rubrics.html")
needs_sphinx = pytest.mark.skipif(not SPHINX, reason="Sphinx is not installed: pip install -c constraints.txt -e '.[site]'")


def test_the_first_page_is_of_the_ledger_and_of_the_notebooks():
    text = "".join("".join(c["source"]) for c in json.loads((ROOT/"nbs/index.ipynb").read_text(encoding="utf-8"))["cells"])
    readme = (ROOT/"README.md").read_text(encoding="utf-8")
    assert counts_sentence(book_of(FIGURES)["counts"]) in readme
    assert front_summary(FIGURES) in text and front_path() in text, "the first page is older than ledger or notebooks; run: make readme"
    assert front_summary(FIGURES).replace("../", "") in readme


def test_a_changed_verdict_changes_the_first_page(tmp_path):
    figures, index = tmp_path/"figures", tmp_path/"index.ipynb"
    shutil.copytree(FIGURES, figures, ignore=shutil.ignore_patterns("*.png", "*.svg", "*.html"))
    shutil.copytree(ROOT/"nbs"/"core", tmp_path/"core", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    shutil.copy(ROOT/"nbs/index.ipynb", index)
    write_front(index, figures)
    before = index.read_text(encoding="utf-8")
    made = json.loads((figures/"table2.json").read_text())
    claim = next(c for c in made["claims"] if c["verdict"] == "reproduced")
    claim["untested"], claim["verdict"] = "taken out", "not tested here"
    atomic_write(figures/"table2.json", json.dumps(made))
    assert write_front(index, figures) and index.read_text(encoding="utf-8") != before


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    "A site of one room and one exhibit, of this book's own notebooks."
    d = tmp_path_factory.mktemp("site")
    for name in ("core/errors", "core/stats", "exhibits/fig08_pareto"):
        (d/"nbs"/name).parent.mkdir(parents=True, exist_ok=True)
        nb = json.loads((ROOT/f"nbs/{name}.ipynb").read_text(encoding="utf-8"))
        for c in nb["cells"]:                       # links to rooms that are not there
            if c["cell_type"] == "markdown": c["source"] = re.sub(r"\[([^\]]*)\]\([^)\s]*\.ipynb[^)\s]*\)", r"\1", "".join(c["source"]))
        atomic_write(d/"nbs"/f"{name}.ipynb", json.dumps(nb))
    cells = [dict(cell_type="markdown", id="a", metadata={}, source="# m2kit\n\n> small\n\n$\\frac{1}{2}$ and ![8](../figures/fig08.png)"),
             dict(cell_type="code", id="b", metadata={}, execution_count=None, source="#| export\nprint(6*7)",
                  outputs=[dict(output_type="stream", name="stdout", text="forty-two")])]
    atomic_write(d/"nbs/index.ipynb", json.dumps(dict(cells=cells, metadata=dict(kernelspec=dict(name="python3", language="python", display_name="python3")), nbformat=4, nbformat_minor=5)))
    shutil.copytree(FIGURES, d/"figures")
    return build_site(d/"out", d/"figures", d/"nbs", tell=print).parent


def words(site):
    "The stems that the search index knows."
    text = (site/"searchindex.js").read_text(encoding="utf-8")
    return json.loads(text[text.index("(") + 1:text.rindex(")")])


@needs_sphinx
def test_a_small_site(small):
    assert broken_links(small) == []
    front = (small/"index.html").read_text(encoding="utf-8")
    assert "#|" not in front and "forty-two" in front and "<mfrac>" in front and not re.search("<script[^>]*mathjax", front, re.I)
    page = (small/"core/errors.html").read_text(encoding="utf-8")
    assert "You are here: 1 of 2" in page and 'aria-current="location"' in page and "UserError" in page
    exhibit = (small/"exhibits/fig08_pareto.html").read_text(encoding="utf-8")
    assert "m2kit reproduce --only fig08" in exhibit and "claims.html#fig08.front" in exhibit and ".ipynb?plain=1#L" in exhibit


@needs_sphinx
def test_search_finds(small):
    index = words(small)
    def at(word):
        found = index["terms"].get(word, [])
        return {index["docnames"][i] for i in ([found] if isinstance(found, int) else found)}
    assert "core/errors" in at("usererror") and "exhibits/fig08_pareto" in at("pareto")
    assert any("UserError" in str(v) for v in index["objects"].values())          # the API is found by name


@needs_sphinx
def test_a_broken_link_stops_the_build(small, tmp_path):
    for part in ("nbs", "figures"): shutil.copytree(small.parent/part, tmp_path/part)
    file = tmp_path/"nbs/core/errors.ipynb"
    nb = json.loads(file.read_text())
    nb["cells"].append(dict(cell_type="markdown", id="z", metadata={}, source="[gone](no_such_chapter.ipynb)"))
    file.write_text(json.dumps(nb))
    said = []
    with pytest.raises(UserError, match="faults in the site"): build_site(tmp_path/"out", tmp_path/"figures", tmp_path/"nbs", said.append)
    assert any("no_such_chapter" in line for line in said)


@needs_sphinx
def test_a_folder_with_something_else_is_left_alone(tmp_path):
    atomic_write(tmp_path/"mine.txt", "precious")
    with pytest.raises(UserError, match="name another folder"): build_site(tmp_path, FIGURES)
    assert (tmp_path/"mine.txt").exists()


# In a browser

@pytest.fixture(scope="module")
def whole(browser, tmp_path_factory):
    "The whole site; M2KIT_SITE names one that is built already."
    if os.environ.get("M2KIT_SITE"): return Path(os.environ["M2KIT_SITE"])
    if not SPHINX: pytest.fail("there is a Chromium, and no Sphinx to build the site with: pip install -c constraints.txt -e '.[site]'")
    return build_site(tmp_path_factory.mktemp("whole")/"out", tell=lambda line: None).parent


@pytest.fixture(scope="module")
def served(whole):
    "Its address on this machine."
    quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), dict(log_message=lambda *a: None))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(quiet, directory=str(whole)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def visited(browser, url, width=1280, **how):
    "A page that has been opened, with what went wrong in it."
    page = browser.new_page(viewport=dict(width=width, height=900), **how)
    page.set_default_timeout(120_000)
    page.wrong = []
    page.on("console", lambda m: page.wrong.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: page.wrong.append(str(e)))
    page.on("requestfailed", lambda r: page.wrong.append(f"failed: {r.url}"))
    page.on("request", lambda r: page.wrong.append(f"from elsewhere: {r.url}") if not r.url.startswith((url.split("/", 3)[0], "data:")) else None)
    page.goto(url)
    return page


@pytest.mark.long
@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("name", PAGES)
def test_a_page_in_a_browser(browser, served, name, width):
    page = visited(browser, f"{served}/{name}", width)
    assert page.wrong == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "wider than the screen"
    lost = page.evaluate("[...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)")
    assert lost == []
    from axe_playwright_python.sync_playwright import Axe
    found = [f"{v['id']}: {v['nodes'][0]['html'][:200]}" for v in Axe().run(page).response["violations"] if v["impact"] in ("serious", "critical")]
    assert found == []
    page.close()


@pytest.mark.long
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_contrast_in_both_themes(browser, served, theme):
    page = visited(browser, f"{served}/claims.html", color_scheme=theme)
    assert page.evaluate("document.documentElement.dataset.theme") == theme
    from axe_playwright_python.sync_playwright import Axe
    assert [v["nodes"][0]["html"][:200] for v in Axe().run(page).response["violations"] if v["id"] == "color-contrast"] == []
    page.close()


@pytest.mark.long
def test_search_in_a_browser(browser, served):
    page = visited(browser, f"{served}/search.html?q=LengthReward")
    page.wait_for_selector("#search-results li a")
    found = page.eval_on_selector_all("#search-results li a", "as => as.map(a => a.getAttribute('href'))")
    assert any("train/rewards" in f for f in found) and page.wrong == []
    page.close()


@pytest.mark.long
def test_it_opens_from_a_disk(browser, whole):
    page = visited(browser, f"file://{whole}/train/rewards.html")
    page.click("a.right-next")
    assert page.url.startswith("file://") and page.title() and page.wrong == []
    page.close()
