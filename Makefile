.PHONY: test quality style

test:
	python -m pytest

quality:
	ruff check .
	ruff format --check .

style:
	ruff check --fix .
	ruff format .
