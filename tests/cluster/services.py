"""The services of a cluster's users: PostgreSQL, an S3 store (SeaweedFS), MLflow with passwords on both of them."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import boto3
import psycopg
from botocore.config import Config
from programs import LOOPBACK, Program, answers, free_ports

BIN = Path(sys.executable).parent
REGION = "us-east-1"


class Postgres(Program):
    """PostgreSQL of the system's packages with a cluster of its own; as root it runs as user postgres."""

    name = "postgres"
    user, password = "mlflow", "the-database's-password"

    def __init__(self) -> None:
        super().__init__()
        (self.port,) = free_ports(1)
        self.data = self.folder / "data"
        self._own_user()
        secret = self.folder / "password"
        secret.write_text(self.password)
        initdb = [_postgres_binary("initdb"), "--auth=scram-sha-256", "--username", self.user, "--no-sync"]
        command = [*initdb, "--pwfile", str(secret), "--pgdata", str(self.data), "--encoding=UTF8", "--no-locale"]
        subprocess.run([*self._as_user(), *command], check=True, cwd=self.folder, capture_output=True, text=True)

    def _own_user(self) -> None:
        if os.geteuid() == 0:
            shutil.chown(self.folder, "postgres", "postgres")

    def _as_user(self) -> list[str]:
        if os.geteuid() != 0:
            return []
        account = pwd.getpwnam("postgres")
        return ["setpriv", f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}", "--clear-groups"]

    def command(self) -> Sequence[str]:
        """The server itself, on loopback only and without a socket file."""
        settings = {"listen_addresses": LOOPBACK, "port": str(self.port), "unix_socket_directories": ""}
        options = [option for key, value in settings.items() for option in ("-c", f"{key}={value}")]
        return [*self._as_user(), _postgres_binary("postgres"), "-D", str(self.data), *options]

    def is_ready(self) -> bool:
        """Whether it lets its user in."""
        try:
            self.connect("postgres").close()
        except psycopg.OperationalError:
            return False
        return True

    def connect(self, database: str) -> psycopg.Connection[Any]:
        """A connection that commits each statement."""
        return psycopg.connect(
            host=LOOPBACK,
            port=self.port,
            user=self.user,
            password=self.password,
            dbname=database,
            connect_timeout=20,
            autocommit=True,
        )

    def create(self, database: str) -> str:
        """Makes a database; returns its address without the password, which libpq takes from PGPASSWORD."""
        with self.connect("postgres") as connection:
            connection.execute(f"CREATE DATABASE {database}")
        return self.address(database)

    def address(self, database: str) -> str:
        """A database's address without the password."""
        return f"postgresql://{self.user}@{LOOPBACK}:{self.port}/{database}"


def _postgres_binary(name: str) -> str:
    places = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: int(path.parts[-3]))
    found = str(places[-1]) if places else shutil.which(name)
    assert found, f"{name} is not there; run tests/cluster/need_services.sh"
    return found


class ObjectStore(Program):
    """SeaweedFS, a real object store with S3's interface: signatures are checked, keys have rights."""

    name = "store"
    stop_within_s = 2.0  # its streams between its own parts keep it from ending for 15 s
    owner = ("the-owner's-id", "the-owner's-key")
    reader = ("the-reader's-id", "the-reader's-key")

    def __init__(self, bucket: str = "latentrl") -> None:
        super().__init__()
        self.bucket = bucket
        self._ports = free_ports(8)
        self.port = self._ports[-1]
        self.endpoint = f"http://{LOOPBACK}:{self.port}"
        identities = [_identity("owner", self.owner, "Admin"), _identity("reader", self.reader, "Read", "List")]
        (self.folder / "s3.json").write_text(json.dumps({"identities": identities}))
        (self.folder / "data").mkdir()

    def command(self) -> Sequence[str]:
        """Master, volume server, filer and S3 gateway in one process, on loopback only."""
        names = (
            "master.port master.port.grpc volume.port volume.port.grpc filer.port filer.port.grpc s3.port.grpc s3.port"
        )
        settings = {
            "dir": self.folder / "data",
            "ip": LOOPBACK,
            "ip.bind": LOOPBACK,
            "master.electionTimeout": "1s",
            "master.telemetry": "false",
            "master.volumeSizeLimitMB": 64,
            "volume.max": 200,
            "volume.preStopSeconds": 0,
            "filer": "true",
            "filer.localSocket": self.folder / "filer.sock",
            "s3": "true",
            "s3.localSocket": self.folder / "s3.sock",
            "s3.config": self.folder / "s3.json",
            "s3.autoCreateBucket": "false",
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            **dict(zip(names.split(), self._ports, strict=True)),
        }
        return [
            str(BIN / "weed"),
            "-logtostderr=true",
            "server",
            *(f"-{key}={value}" for key, value in settings.items()),
        ]

    def is_ready(self) -> bool:
        """Whether a file can be stored."""
        try:
            self.put(".ready", b"content that a volume holds")
        except Exception:
            return False
        return True

    def put(self, key: str, content: bytes) -> None:
        """Stores an object in the bucket, which is made if need be."""
        if self.bucket not in [bucket["Name"] for bucket in self.client().list_buckets()["Buckets"]]:
            self.client().create_bucket(Bucket=self.bucket)
        self.client().put_object(Bucket=self.bucket, Key=key, Body=content)

    def get(self, key: str) -> bytes:
        """An object's content."""
        return bytes(self.client().get_object(Bucket=self.bucket, Key=key)["Body"].read())

    def keys(self, prefix: str = "") -> list[str]:
        """Names of the objects below a prefix."""
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
        return [entry["Key"] for page in pages for entry in page.get("Contents", [])]

    def client(self) -> Any:
        """A client with the owner's keys that does not wait long."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.owner[0],
            aws_secret_access_key=self.owner[1],
            region_name=REGION,
            config=Config(connect_timeout=20, read_timeout=10, retries={"total_max_attempts": 1}),
        )

    def variables(self, keys: tuple[str, str] | None = None) -> dict[str, str]:
        """What a user of the store has in the environment."""
        return {**self.place(), **self.keys_of(keys or self.owner)}

    def place(self) -> dict[str, str]:
        """The part of it that is no secret."""
        return {"AWS_ENDPOINT_URL_S3": self.endpoint, "AWS_DEFAULT_REGION": REGION}

    def keys_of(self, keys: tuple[str, str]) -> dict[str, str]:
        """The part of it that is."""
        return {"AWS_ACCESS_KEY_ID": keys[0], "AWS_SECRET_ACCESS_KEY": keys[1]}

    def uri(self, path: str) -> str:
        """Address of a path in the bucket."""
        return f"s3://{self.bucket}/{path}"

    def remove(self) -> None:
        """Also the sockets that it makes outside of its folder."""
        super().remove()
        for port in self._ports:
            for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                path.unlink(missing_ok=True)


def _identity(name: str, keys: tuple[str, str], *actions: str) -> dict[str, Any]:
    credentials = [{"accessKey": keys[0], "secretKey": keys[1]}]
    return {"name": name, "credentials": credentials, "actions": list(actions)}


class Mlflow(Program):
    """`mlflow server` with passwords; runs and users lie in PostgreSQL, artifacts go through it to the store."""

    name = "mlflow"
    admin_password = "the-admin's-password"
    user, password = "worker", "the-worker's-password"

    def __init__(self, database: Postgres, store: ObjectStore, *, workers: int = 1) -> None:
        super().__init__()
        (self.port,) = free_ports(1)
        self.address = f"http://{LOOPBACK}:{self.port}"
        self._database, self._store, self._workers = database, store, workers
        self._has_user = False
        for name in ("mlflow", "mlflow_auth"):
            database.create(name)
        settings = {
            "database_uri": database.address("mlflow_auth"),
            "default_permission": "READ",
            "admin_username": "admin",
            "authorization_function": "mlflow.server.auth:authenticate_request_basic_auth",
        }
        lines = "".join(f"{key} = {value}\n" for key, value in settings.items())
        (self.folder / "auth.ini").write_text(f"[mlflow]\n{lines}")

    def command(self) -> Sequence[str]:
        """The server, as infra/ starts it."""
        options = {
            "--app-name": "basic-auth",
            "--host": LOOPBACK,
            "--port": self.port,
            "--workers": self._workers,
            "--backend-store-uri": self._database.address("mlflow"),
            "--artifacts-destination": self._store.uri("mlflow"),
        }
        return [str(BIN / "mlflow"), "server", *(str(word) for option in options.items() for word in option)]

    def environment(self) -> Mapping[str, str]:
        """Passwords, and no waiting of its own for a store that is away."""
        return {
            **self._store.variables(),
            "MLFLOW_S3_ENDPOINT_URL": self._store.endpoint,
            "PGPASSWORD": self._database.password,
            "MLFLOW_AUTH_CONFIG_PATH": str(self.folder / "auth.ini"),
            "MLFLOW_AUTH_ADMIN_PASSWORD": self.admin_password,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "a-key-for-cookies",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }

    def is_ready(self) -> bool:
        """Whether it answers."""
        return answers(f"{self.address}/health")

    def start(self) -> None:
        """Starts it; the first time it also gets its user."""
        super().start()
        if not self._has_user:
            self._add_user()

    def _add_user(self) -> None:
        """As infra/docker/add-user.py does, which talks to port 5000."""
        from mlflow.server import get_app_client

        before = {name: os.environ.get(name) for name in self.variables()}
        os.environ |= {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": self.admin_password}
        try:
            get_app_client("basic-auth", self.address).create_user(self.user, self.password)
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                os.environ |= {name: value} if value is not None else {}
        self._has_user = True

    def variables(self) -> dict[str, str]:
        """What a user of the server has in the environment."""
        return {"MLFLOW_TRACKING_USERNAME": self.user, "MLFLOW_TRACKING_PASSWORD": self.password}
