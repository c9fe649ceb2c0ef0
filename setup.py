"""Packaging: settings.ini is the one place where names, versions and requirements stand."""
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

cfg = ConfigParser(delimiters=["="])
cfg.read("settings.ini", encoding="utf-8")
cfg = cfg["DEFAULT"]
extras = {k.removesuffix("_requirements"): v.split() for k, v in cfg.items() if k.endswith("_requirements")}

setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"], keywords=cfg["keywords"].split(),
    author=cfg["author"], author_email=cfg["author_email"], url=cfg["git_url"], license="Apache-2.0",
    long_description=Path("README.md").read_text(encoding="utf-8"), long_description_content_type="text/markdown",
    python_requires=f">={cfg['min_python']},<{cfg['too_new_python']}", install_requires=cfg["requirements"].split(), extras_require=extras,
    # The top-level data/ folder travels inside the wheel as m2kit/_data: the clinic, published numbers, the tiny models. The evidence
    # behind the figures does not; only a clone draws them.
    packages=[*find_packages(include=["m2kit", "m2kit.*"]), "m2kit._data"], package_dir={"m2kit._data": "data"},
    package_data={"m2kit._data": ["**/*"]}, exclude_package_data={"m2kit._data": ["evidence/*", "evidence/**/*"]},
    entry_points={"console_scripts": [cfg["console_scripts"]]},
    zip_safe=False,
    # An editable install as a line of sys.path: with setuptools' own finder, a folder called m2kit beside a script (the
    # clone itself) would be imported in the package's stead, as an empty namespace.
    options={"editable_wheel": {"mode": "compat"}},
)
