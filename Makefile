.PHONY: test quality style compatibility

test:
	python -m pytest

quality:
	ruff check .
	ruff format --check .

style:
	ruff check --fix .
	ruff format .

# The whole test suite on every supported version of Transformers, each in a virtual environment of its own.
compatibility:
	.ci/compatibility
