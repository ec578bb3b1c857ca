"""Scrapes of GET /metrics, parsed by Prometheus' own library."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client.parser import text_string_to_metric_families

from tests.support.http.serving import Answer, Served, get

Labels = tuple[tuple[str, str], ...]


class Scrape:
    """One scrape."""

    def __init__(self, text: str) -> None:
        self.families = {family.name: family for family in text_string_to_metric_families(text)}
        self._values: dict[tuple[str, Labels], float] = {}
        for family in self.families.values():
            for sample in family.samples:
                key = sample.name, _key(sample.labels)
                assert key not in self._values, f"{key} twice"
                self._values[key] = sample.value

    def value(self, name: str, /, **labels: str) -> float | None:
        """Return the value of one series, or None if it does not exist."""
        return self._values.get((f"cobatch_{name}", _key(labels)))

    def of(self, name: str) -> dict[Labels, float]:
        """Return all series of one name, by labels."""
        return {
            labels: value for (found, labels), value in self._values.items() if found == f"cobatch_{name}"
        }

    def buckets(self, name: str, /, **labels: str) -> dict[str, float]:
        """Return a histogram's buckets by upper bound."""
        found = {}
        for key, value in self.of(f"{name}_bucket").items():
            others = dict(key)
            bound = others.pop("le")
            if others == labels:
                found[bound] = value
        return found


def _key(labels: Mapping[str, str]) -> Labels:
    return tuple(sorted(labels.items()))


def scrape(served: Served) -> Scrape:
    """GET /metrics."""
    answer = served.ask(get("/metrics"))
    assert answer.status == 200, answer
    return scrape_of(answer)


def scrape_of(answer: Answer) -> Scrape:
    """Parse the answer to a scrape."""
    return Scrape(answer.body.decode())
