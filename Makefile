# Two commands on a fresh machine with Python >= 3.11, make and a C compiler: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint bench tiny tiny-vision tiny-vision-report tiny-audio tiny-audio-report clean

demo: $(VENV)/.base            ## what the shipped model does: out/gallery.png
	$(BIN)/plait demo --out out/

test: $(VENV)/.test            ## all tests, real two-process runs included
	$(BIN)/python -m pytest

lint: $(VENV)/.test            ## style, types, import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.test           ## speed beside a peer, in one run
	$(BIN)/python tests/benchmarks/decoder.py
	$(BIN)/python tests/benchmarks/training.py
	$(BIN)/python tests/benchmarks/loss.py
	$(BIN)/python tests/benchmarks/generate.py
	$(BIN)/python tests/benchmarks/quantization.py
	$(BIN)/python tests/benchmarks/emu3.py --width 64
	$(BIN)/python tests/benchmarks/vqgan.py
	$(BIN)/python tests/benchmarks/encodec.py
	$(BIN)/python tests/benchmarks/mimi.py

tiny: $(VENV)/.test            ## train weights/plait-tiny again, from the data on (about an hour on 2 cores)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash launch/tiny_cpu.sh

tiny-vision: $(VENV)/.test     ## train weights/tiny-vision again, from the data on (an hour and a half on 2 cores)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash launch/tiny_vision.sh

tiny-vision-report: $(VENV)/.test  ## tiny-vision's figures on held-out pictures and clips
	PATH="$(CURDIR)/$(BIN):$$PATH" bash launch/tiny_vision_report.sh

tiny-audio: $(VENV)/.test      ## train a tokenizer like weights/tiny-audio, from the data on (an hour and a half on 2 cores)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash launch/tiny_audio.sh

tiny-audio-report: $(VENV)/.test  ## tiny-audio's figures on held-out sentences and on a voice it never heard
	PATH="$(CURDIR)/$(BIN):$$PATH" bash launch/tiny_audio_report.sh

clean:
	rm -rf $(VENV) build out .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "plait needs Python >= 3.11; set PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip

$(VENV)/.base: pyproject.toml | $(BIN)/pip
	$(BIN)/pip install --quiet --editable .
	@touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/pip
	$(BIN)/pip install --quiet --editable '.[test]'
	@touch $@ $(VENV)/.base
