"""What a tracking server has on record of our runs and models, asked for page by page, deleted runs among them.

Each question is one filter that the server evaluates, however many runs there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import server, trust
from pipeline.delivery import CHAMPION
from pipeline.errors import UserError
from pipeline.outbox import Refused, Unreachable
from pipeline.server import Address
from pipeline.tracking import EXPERIMENT

if TYPE_CHECKING:
    from pipeline.server import LoggedModel, MlflowRun, ModelVersion

PAGE = 200
FEW = 12  # values that are asked for one by one; of more, all runs that have the tag are read

Page = Callable[[str | None], Any]


class Records:
    """The records of one tracking address.

    Args:
        where: Server or sqlite file. A file that does not exist is not created.
        experiment: Where our runs are.

    Raises:
        UserError: It does not answer.
    """

    def __init__(self, where: str | Address, experiment: str = EXPERIMENT) -> None:
        self.address = where if isinstance(where, Address) else Address.parse(where)
        self.client = server.check(self.address, may_create=False)
        found = self._ask(lambda: self.client.get_experiment_by_name(experiment))
        self.experiments: list[str] = [found.experiment_id] if found is not None else []

    def run(self, run_id: str) -> MlflowRun | None:
        """A run, also one that is deleted but not yet for good; None where there is none of this id."""
        try:
            return self._ask(lambda: self.client.get_run(run_id))
        except Refused:
            return None

    def runs(self, condition: str) -> Iterator[MlflowRun]:
        """All runs that meet a condition of MLflow's search syntax, the newest first."""
        if self.experiments:
            yield from self._pages(lambda at: server.search_runs(self.client, self.experiments, condition, PAGE, at))

    def has_deleted_runs(self) -> bool:
        """Whether there are runs that are deleted but not yet for good."""
        page = self._ask(lambda: server.search_runs(self.client, self.experiments, "", 1, None, "DELETED_ONLY"))
        return bool(self.experiments) and len(page) > 0

    def runs_tagged(self, key: str, values: set[str]) -> Iterator[MlflowRun]:
        """All runs whose tag has one of these values."""
        yield from _tagged(self.runs, key, values, lambda run: run.data.tags)

    def versions(self, condition: str) -> Iterator[ModelVersion]:
        """All registered versions that meet a condition. Their aliases are not filled in: see `aliases`."""

        def page(at: str | None) -> Any:
            return self.client.search_model_versions(condition, max_results=PAGE, page_token=at)

        yield from self._pages(page)

    def versions_tagged(self, key: str, values: set[str]) -> Iterator[ModelVersion]:
        """All registered versions whose tag has one of these values."""
        yield from _tagged(self.versions, key, values, lambda version: version.tags)

    def logged_models(self, condition: str) -> Iterator[LoggedModel]:
        """All models that runs have logged, registered or not, that meet a condition."""

        def page(at: str | None) -> Any:
            found = self.client.search_logged_models(self.experiments, condition, max_results=50, page_token=at)
            return found

        if self.experiments:
            yield from self._pages(page)

    def aliases(self, name: str) -> dict[str, str]:
        """Alias to version number of a registered model; none where the model is gone."""
        try:
            model = self._ask(lambda: self.client.get_registered_model(name))
        except Refused:
            return {}
        return {alias: str(version) for alias, version in model.aliases.items()}

    def aliases_of(self, version: ModelVersion) -> list[str]:
        """The aliases that mean a version now."""
        return sorted(alias for alias, number in self.aliases(version.name).items() if number == str(version.version))

    def history(self, run_id: str, metric: str) -> list[tuple[float, float]]:
        """(step, value) of a run's metric, in the order of its steps; of a step that was repeated, the last value."""
        measured = self._ask(lambda: self.client.get_metric_history(run_id, metric))
        last = {point.step: point.value for point in sorted(measured, key=lambda point: point.timestamp)}
        return [(float(step), float(value)) for step, value in sorted(last.items())]

    def artifacts(self, run_id: str, folder: str, into: Path) -> Path | None:
        """A copy of a folder of a run's artifacts; None where it has none.

        Raises:
            UserError: They cannot be fetched, or the server names a place that is not its own.
        """
        run = self.run(run_id)
        if run is None or not any(
            file.path == folder for file in self._ask(lambda: self.client.list_artifacts(run_id))
        ):
            return None
        trust.require_own_store(run.info.artifact_uri, self.address)
        try:
            return server.download(f"runs:/{run_id}/{folder}", into, self.address)
        except (Refused, Unreachable) as error:
            raise UserError(f"the {folder} of run {run_id} cannot be fetched: {error}") from None

    def addresses(self, name: str) -> list[str]:
        """Addresses of a registered model's champion and of its newest version, as far as there are such."""
        newest = max((int(version.version) for version in self.versions(f"name = {quoted(name)}")), default=None)
        champion = [f"models:/{name}@{CHAMPION}"] if CHAMPION in self.aliases(name) else []
        return [*champion, f"models:/{name}/{newest}"] if newest is not None else []

    def _ask(self, question: Callable[[], Any]) -> Any:
        return server.ask(self.address, question)

    def _pages(self, page: Page) -> Iterator[Any]:
        token: str | None = None
        while True:
            try:
                found = self._ask(partial(page, token))
            except Refused as error:
                raise UserError(
                    f"{self.address.uri} does not take a search of ours ({error}); is it MLflow 3?"
                ) from None
            yield from found
            token = found.token
            if not token:
                return


def quoted(text: str) -> str:
    """A value for a condition. No value that we look for has a quote in it; one that does finds nothing."""
    return f"""'{text.replace("'", "").replace('"', "")}'"""


def _tagged(
    search: Callable[[str], Iterator[Any]], key: str, values: set[str], tags_of: Callable[[Any], Any]
) -> Iterator[Any]:
    if len(values) <= FEW:
        for value in sorted(values):
            yield from search(f"tags.`{key}` = {quoted(value)}")
        return
    for record in search(f"tags.`{key}` LIKE '%'"):
        if tags_of(record)[key] in values:
            yield record
