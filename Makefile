# One command each; CI runs the same ones.
.PHONY: install check test bench demo docs lock

install: ## make or update .venv
	./scripts/_env

check: ## lint, format, types, import rules
	./scripts/check

test: ## everything CI runs
	./scripts/test

bench: install ## the overhead table of the README (needs wrk: apt-get install wrk)
	.venv/bin/python -m benchmarks.request_cost.overhead

demo: ## a real model, many callers
	./scripts/demo

docs: install ## the documentation site, in benchmarks/out/site
	NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --quiet

lock: install ## bring requirements.lock up to date, keeping the comment at its head
	.venv/bin/python -m pip install -qq uv
	head -n 3 requirements.lock > .venv/lock
	.venv/bin/uv pip compile --quiet --upgrade --universal --python-version 3.11 --fork-strategy fewest \
		--extra demo --extra dev --no-header pyproject.toml >> .venv/lock
	mv .venv/lock requirements.lock
