# Thin: `uv run dvc repro` and `uv run pytest`. Where there is no uv, one is put into .uv/ (Debian's pip refuses to
# install outside a venv).
.PHONY: repro test lint

# Many containers set this. Thirty processes would then each compile PyTorch's sources anew.
unexport PYTHONDONTWRITEBYTECODE
# Nor would it find `stages`.
unexport PYTHONSAFEPATH

UV := $(shell command -v uv 2>/dev/null || echo .uv/bin/uv)

repro: $(UV)
	$(UV) run dvc repro

test: $(UV)
	$(UV) run pytest --numprocesses 2 --dist loadfile

lint: $(UV)
	$(UV) run ruff check
	$(UV) run ruff format --check
	$(UV) run mypy

.uv/bin/uv:
	python3 -m venv .uv || { echo "python3 cannot make a venv: apt install python3-venv, or install uv" >&2; exit 1; }
	.uv/bin/pip install --quiet "uv>=0.9,<1"
