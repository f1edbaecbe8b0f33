"""The files under infra/ without a cluster: against schemas and against each other."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
from infra_files import (
    CLUSTER,
    CORE,
    DOCKERFILES,
    FILES,
    INFRA,
    JOB,
    LAUNCHER,
    PINS,
    PROJECT,
    README,
    ROOT,
    SERVICES,
    Manifest,
    commands,
    containers,
    instructions,
    joined,
    named,
    ray_templates,
    templates,
    understood,
)
from sqlalchemy.engine import make_url

from jobs import termination
from jobs.submission import GRACE_S

# --- against schemas


def test_rays_own_validator_takes_the_launchers_file() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(LAUNCHER)
    validate_config(prepared)
    (node_type,) = prepared["available_node_types"].values()
    assert node_type["min_workers"] == node_type["max_workers"] == len(LAUNCHER["provider"]["worker_ips"])


@pytest.mark.parametrize("manifest", CORE, ids=lambda manifest: f"{manifest['kind']}-{manifest['metadata']['name']}")
def test_manifests_fit_kubernetes_schemas(manifest: Manifest) -> None:
    kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("manifest", [CLUSTER, JOB], ids=["raycluster", "rayjob"])
def test_ray_manifests_have_kuberays_fields_and_no_others(manifest: Manifest) -> None:
    schema = json.loads((ROOT / "tests" / "kuberay.schema.json").read_text())
    (definition,) = (key for key, value in schema["$defs"].items() if key.lower() == manifest["kind"].lower())
    jsonschema.validate(manifest, {"$ref": f"#/$defs/{definition}", "$defs": schema["$defs"]})


def test_ray_pods_fit_kubernetes_schemas() -> None:
    for template in ray_templates():
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "ray"}, "template": template}
        kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)


# --- against KubeRay's rules, which no schema holds


def test_the_cluster_grows_and_is_guarded_by_a_token() -> None:
    spec = CLUSTER["spec"]
    assert spec["authOptions"]["mode"] == "token"
    assert spec["enableInTreeAutoscaling"]
    assert all(template["spec"]["restartPolicy"] == "Never" for template in ray_templates())  # as autoscaler v2 demands
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    assert all(group["minReplicas"] <= group["replicas"] < group["maxReplicas"] for group in groups.values())
    for name, group in groups.items():
        (container,) = group["template"]["spec"]["containers"]
        assert ("nvidia.com/gpu" in container["resources"]["limits"]) == (name == "gpu")
        assert container["image"].endswith("-gpu") == (name == "gpu")


def test_a_job_is_repeated_on_the_same_cluster_with_a_command_that_goes_on() -> None:
    spec = JOB["spec"]
    assert spec["rayClusterSpec"] == CLUSTER["spec"]
    assert spec["backoffLimit"] > 0
    assert "clusterSelector" not in spec  # with it KubeRay repeats nothing
    assert spec["shutdownAfterJobFinishes"]
    words = spec["entrypoint"].split()
    assert words[0] == "latentrl"
    options = understood(words[1:])
    assert options.resume_if_any
    assert options.home.startswith("/shared/")
    assert not options.encoder or "@" not in options.encoder  # an alias may mean another version at the next attempt


# --- against each other


def test_versions_agree() -> None:
    version, python = PROJECT["project"]["version"], PROJECT["tool"]["mypy"]["python_version"]
    assert CLUSTER["spec"]["rayVersion"] == PINS["ray"]
    for dockerfile in DOCKERFILES:
        assert instructions(dockerfile, "FROM") == [f"python:{python}-slim"]
    assert set(re.findall(r"python(3\.\d+)", "\n".join(LAUNCHER["setup_commands"]))) == {python}
    assert re.search(r"Python (3\.\d+) and", README)[1] == python
    everything = "\n".join(path.read_text() for path in FILES)
    tags = re.findall(r"(?<![\w/.-])latentrl(?:-tracking)?:(\d+\.\S+)", everything)
    assert {tag.removesuffix("-gpu") for tag in tags} == {version}


def test_ports_and_addresses_agree() -> None:
    def port_of(template: Manifest, name: str) -> int:
        (container,) = template["spec"]["containers"]
        return int({port["name"]: port["containerPort"] for port in container["ports"]}[name])

    head = CLUSTER["spec"]["headGroupSpec"]["template"]
    start, join = LAUNCHER["head_start_ray_commands"][-1], LAUNCHER["worker_start_ray_commands"][-1]
    gcs, dashboard = port_of(head, "gcs"), port_of(head, "dashboard")
    assert f"--port={gcs} " in start
    assert f"--dashboard-port={dashboard} " in start
    assert join.endswith(f":{gcs}")
    assert f":{gcs}" in (INFRA / "slurm" / "latentrl.sbatch").read_text()
    assert f"service/{CLUSTER['metadata']['name']}-head-svc {dashboard}:{dashboard}" in README

    for name, service in named("Service").items():
        (backend,) = (named(kind)[name] for kind in ("Deployment", "StatefulSet") if name in named(kind))
        template, (port,) = backend["spec"]["template"], service["spec"]["ports"]
        assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
        assert port_of(template, port["targetPort"]) == port["port"]
    (tracking,) = named("Service")["latentrl-tracking"]["spec"]["ports"]
    image = INFRA / "docker" / "Dockerfile.tracking"
    assert instructions(image, "EXPOSE") == [str(tracking["port"])]
    assert json.loads(instructions(image, "ENTRYPOINT")[0])[-1] == str(tracking["port"])
    assert SERVICES["latentrl-tracking"]["ports"] == [f"127.0.0.1:{tracking['port']}:{tracking['port']}"]
    uris = re.findall(r"--tracking-uri (\S+)", joined(README) + JOB["spec"]["entrypoint"])
    assert set(uris) == {f"http://{host}:{tracking['port']}" for host in ("latentrl-tracking", "localhost")}


def test_the_database_has_one_address() -> None:
    addresses = {uri for path in FILES for uri in re.findall(r"postgresql://[^\s\"}]+", path.read_text())}
    (port,) = named("Service")["latentrl-database"]["spec"]["ports"]
    assert addresses == {f"postgresql://mlflow@latentrl-database:{port['port']}/mlflow"}
    assert "latentrl-database" in SERVICES


def test_what_is_referred_to_exists() -> None:
    made = {
        name: set(re.findall(r"--from-literal=([\w-]+)=", line))
        for name, line in re.findall(r"^kubectl create secret generic (\S+) (.*)$", joined(README), re.MULTILINE)
    }
    assert "auth_token" in made[CLUSTER["spec"]["authOptions"]["secretName"]]  # the key that KubeRay looks for
    for container in containers():
        for variable in container.get("env", []):
            if reference := variable.get("valueFrom", {}).get("secretKeyRef"):
                assert reference["key"] in made[reference["name"]]
    (database,) = named("StatefulSet").values()
    own = {claim["metadata"]["name"] for claim in database["spec"]["volumeClaimTemplates"]}
    for template in templates():
        claims = {v["name"]: v["persistentVolumeClaim"]["claimName"] for v in template["spec"].get("volumes", [])}
        assert set(claims.values()) <= named("PersistentVolumeClaim").keys()
        for container in template["spec"]["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= claims.keys() | own


def test_our_images_are_built_and_others_are_pinned() -> None:
    built = dict(re.findall(r"docker build -f infra/docker/(\S+) -t (\S+) \.", README))
    assert built.keys() == {path.name for path in DOCKERFILES}
    for dockerfile in DOCKERFILES:
        assert f"docker build -f infra/docker/{dockerfile.name} -t {built[dockerfile.name]} ." in dockerfile.read_text()
    used = {container["image"] for container in containers()} | {service["image"] for service in SERVICES.values()}
    assert set(built.values()) <= used
    assert all(re.search(r":v?\d", image) for image in used)


def test_environments_are_made_by_the_same_line() -> None:
    places = {path.name: path.read_text() for path in (ROOT / "Makefile", INFRA / "README.md", *DOCKERFILES[:2])}
    places["cluster.yaml"] = "\n".join(LAUNCHER["setup_commands"])
    for name, text in places.items():
        lines = re.findall(r"pip install (.+)$", text, re.MULTILINE)
        assert lines, name
        for line in lines:
            words = [word for word in shlex.split(line) if word not in ("-q", "-e") and not word.startswith("--")]
            assert words[:2] == ["-c", "constraints.txt"], name
            assert [re.sub(r"\[.*\]$", "", word) for word in words[2:]] == ["."], name


def test_images_hold_rays_dashboard() -> None:
    """Without it there is no job submission, and KubeRay's probes find no pod healthy."""
    (ray,) = (line for line in PROJECT["project"]["dependencies"] if line.startswith("ray["))
    assert "default" in ray.partition("]")[0].removeprefix("ray[").split(",")


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_images_copy_what_exists_and_do_not_run_as_root(dockerfile: Path) -> None:
    for line in instructions(dockerfile, "COPY"):
        sources = [word for word in line.split() if not word.startswith("--")][:-1]
        assert all((ROOT / source).exists() for source in sources), line
    assert instructions(dockerfile, "USER")[-1] not in ("root", "0")


def test_what_the_tracking_image_installs_is_pinned() -> None:
    (line,) = (run for run in instructions(INFRA / "docker" / "Dockerfile.tracking", "RUN") if "pip install" in run)
    packages = {re.sub(r"\[.*\]$", "", word) for word in shlex.split(line.partition("-c constraints.txt")[2])}
    assert packages <= PINS.keys()
    assert make_url("postgresql://").get_dialect().driver in packages  # what SQLAlchemy takes where no driver is named


# --- the commands


KUBERNETES = README[README.index("\n## Kubernetes") : README.index("\n## Machines")]
COMMANDS = [*commands(README), *commands(README, "latentrl.sbatch"), *commands(JOB["spec"]["entrypoint"])]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_line_takes_every_command(command: str) -> None:
    understood(shlex.split(command))


def cpus_of(command: str) -> int:
    options = understood(shlex.split(command))
    room = int(options.driver_room) if "driver_room" in options else 0
    if "settings" in options and "num_env_runners" not in options:
        return room + int(options.settings.train.num_workers) + 1  # one for Ray Data
    return room + int(
        options.num_workers if "num_workers" in options else options.num_env_runners + options.num_learners
    )


def test_the_time_to_write_a_checkpoint_is_the_same_everywhere() -> None:
    assert {template["spec"]["terminationGracePeriodSeconds"] for template in ray_templates()} == {GRACE_S}
    assert set(re.findall(r'"RAY_JOB_STOP_WAIT_TIME_S": "(\d+)"', README)) == {str(GRACE_S)}
    assert re.findall(r"They are granted\s(\d+): by `latentrl submit`", README) == [str(GRACE_S)]
    assert termination.REACH_S < GRACE_S  # for what is written then


def test_clusters_can_grow_to_the_room_of_their_commands() -> None:
    groups = [group for group in CLUSTER["spec"]["workerGroupSpecs"] if group["groupName"] == "cpu"]
    room = sum(
        group["maxReplicas"] * int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
        for group in groups
    )
    submitted = commands("\n".join(re.findall(r"^latentrl submit .*$", joined(KUBERNETES), re.MULTILINE)))
    assert len(submitted) == 3
    assert all(cpus_of(command) <= room for command in [*submitted, *commands(JOB["spec"]["entrypoint"])])
    script = (INFRA / "slurm" / "latentrl.sbatch").read_text()
    nodes, cpus = (int(re.search(rf"#SBATCH --{name}=(\d+)", script)[1]) for name in ("nodes", "cpus-per-task"))
    batch = commands(README, "latentrl.sbatch")
    assert batch
    assert all(cpus_of(command) <= nodes * cpus for command in batch)


# --- secrets, and who can reach what

SECRET_NAME = re.compile(r"password|secret|token|csrf|_key", re.IGNORECASE)
LEAKS = (
    re.compile(r"://[^/\s:@]+:[^/\s@]+@"),  # an address with a password
    re.compile(r"\b[0-9a-f]{32,}\b"),
    re.compile(r"-----BEGIN"),
    # A value behind a secret's name; names of Kubernetes' secrets and of their keys are none.
    re.compile(r"(?i)\b(?!secretName)\w*(password|token|secret|_key)\w*['\"]?\s*[=:]\s*['\"]?[\w+/-]{6,}"),
)


def leaks(text: str) -> list[str]:
    return [match[0] for pattern in LEAKS for match in pattern.finditer(text)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_file_holds_a_secret(path: Path) -> None:
    assert not leaks(path.read_text())


@pytest.mark.parametrize(
    "planted",
    [
        "postgresql://mlflow:hunter22@db:5432/mlflow",
        "MLFLOW_AUTH_ADMIN_PASSWORD: hunter22",
        "export RAY_AUTH_TOKEN=0123abcd",
        "ROOT_SECRET_ACCESS_KEY: 'abcdef12'",
        "admin_password = hunter22",
        "auth_token: 3f786850e387550fdab836ed7e6dc881de23001b",
    ],
)
def test_a_planted_secret_is_found(planted: str) -> None:
    assert leaks(f"a: b\n  {planted}\n")


def test_secrets_come_by_reference() -> None:
    assert not named("Secret")
    for variable in (variable for container in containers() for variable in container.get("env", [])):
        assert not SECRET_NAME.search(variable["name"]) or "secretKeyRef" in variable.get("valueFrom", {}), variable
    for service in SERVICES.values():
        for name, value in service.get("environment", {}).items():
            assert not SECRET_NAME.search(name) or re.fullmatch(r"\$\{LATENTRL_\w+:\?.+\}", value), name
    asked = set(re.findall(r"\$\{LATENTRL_(\w+):\?", (INFRA / "compose.yaml").read_text()))
    assert asked == set(re.search(r"for name in ([\w ]+);", README)[1].split())
    assert ".env" in (ROOT / ".gitignore").read_text().split("\n")


def test_nothing_listens_beyond_its_machine_or_cluster() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)
    assert "--dashboard-host=127.0.0.1 " in LAUNCHER["head_start_ray_commands"][-1]
    for service in named("Service").values():
        assert service["spec"].get("type", "ClusterIP") == "ClusterIP"
    assert CLUSTER["spec"]["headGroupSpec"]["serviceType"] == "ClusterIP"
    starts = (LAUNCHER["head_start_ray_commands"][-1], LAUNCHER["worker_start_ray_commands"][-1])
    assert all("RAY_AUTH_MODE=token " in command for command in starts)


def test_pods_have_no_more_rights_than_they_need() -> None:
    for template in templates():
        assert template["spec"]["securityContext"]["runAsNonRoot"]
    for container in containers():
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


# --- the page


def test_the_page_says_of_every_part_whether_it_has_been_run() -> None:
    rows = re.findall(r"^\| [^|]+ \| (`[^|]+) \| ([^|]+) \|$", README, re.MULTILINE)
    states = {name.strip("/").split("/")[-1]: state for cell, state in rows for name in re.findall(r"`([^`]+)`", cell)}
    parts = {path.relative_to(INFRA).parts for path in FILES}
    for part in parts - {("README.md",), ("docker", "mlflow-auth.ini"), ("docker", "add-user.py")}:
        assert states.get(part[-1], states.get(part[0], "")).startswith(("validated offline, not run", "run")), part
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert link.startswith("http") or (INFRA / link).exists(), link
