"""The services themselves: each keeps what it was given when it is killed and started again."""

from __future__ import annotations

from services import ObjectStore, Postgres


def test_postgres_keeps_what_it_acknowledged(postgres: Postgres) -> None:
    address = postgres.create("kept")
    assert postgres.password not in address
    with postgres.connect("kept") as connection:
        connection.execute("CREATE TABLE numbers AS SELECT generate_series(1, 1000) AS number")
    postgres.kill()
    postgres.start()
    with postgres.connect("kept") as connection:
        assert connection.execute("SELECT sum(number) FROM numbers").fetchone() == (500_500,)
    assert all(process.username() != "root" for process in postgres.family())


def test_the_store_keeps_what_it_acknowledged(store: ObjectStore) -> None:
    store.put("services/a", b"content")
    store.kill()
    store.start()
    assert store.client().get_object(Bucket=store.bucket, Key="services/a")["Body"].read() == b"content"
    assert store.keys("services/") == ["services/a"]
