.PHONY: test fuzz quality style compatibility speculators-check serve-check

test:
	python -m pytest

# Random calls of `generate` against plain decoding; a failing case is printed, and tried first in the next run.
fuzz:
	CONFU_FUZZ_CASES=$${CONFU_FUZZ_CASES:-2000} python -m pytest -q tests/test_fuzz.py --hypothesis-show-statistics

quality:
	ruff check .
	ruff format --check .

style:
	ruff check --fix .
	ruff format .

# The whole test suite on every supported version of Transformers, each in a virtual environment of its own.
compatibility:
	.ci/compatibility

# The package `speculators` beside what we write in its form, in a virtual environment of its own.
speculators-check:
	.ci/speculators

# vLLM serves the exported EAGLE-3 draft; its texts and acceptance beside our own loop's (examples/serving.md). Installs vLLM's CPU
# build in a virtual environment of its own: several GB.
serve-check:
	.ci/serve-check
