"""Packaging: everything is read from settings.ini."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

parser = ConfigParser(delimiters=["="])
parser.read("settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
readme = Path("README.md")

setup(
    name=cfg["dist_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    author=cfg["author"],
    url=cfg["git_url"],
    keywords=cfg["keywords"].split(),
    license="MIT",
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=["circuitgraph", "circuitgraph.*"]),
    package_data={"circuitgraph": ["texts/*", "explorer/*", "*.pyi"]},
    install_requires=cfg["requirements"].split(),
    extras_require={"sae": cfg["sae_requirements"].split(), "dev": cfg["dev_requirements"].split()},
    entry_points={
        "console_scripts": ["circuitgraph=circuitgraph.cli:app"],
        "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
    },
    zip_safe=False,
)
