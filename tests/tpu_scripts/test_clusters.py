"""The scripts that hand a run to a scheduler: xpk, GKE, SkyPilot, Slurm."""

import json
import re
import shlex
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.tpu_scripts.cloud import SCRIPTS, ZONE, Cloud, option

WORDS = ["--prompt", 'it\'s $(HOME) $$ "x" \\ a: b #c {{NAME}} &']
TRAIN = ["llmlab", "train", "experiments/quickstart.py", *WORDS, "--out", "/llmlab-buckets/bucket/runs/nano"]
RUN = ["nano", "experiments/quickstart.py", *WORDS]


def expand_as_kubernetes_does(text: str) -> str:
    """$(NAME) is a variable of the container (none is defined here: it stays), $$ is a $."""
    return re.sub(r"\$\$|\$\([^)]*\)", lambda found: "$" if found.group() == "$$" else found.group(), text)


def test_xpk_submits_a_workload_that_restarts_after_42(cloud: Cloud):
    settings = {"CLUSTER": "pool", "IMAGE": "registry/llmlab", "SLICES": "2", "PROJECT": "lab"}
    assert cloud.run("xpk.sh", *RUN, **settings).returncode == 0
    (call,) = cloud.calls()
    assert call[:-1] == [
        *["xpk", "workload", "create", "--workload", "nano", "--cluster", "pool", *ZONE],
        *["--project", "lab", "--tpu-type", "v6e-16", "--num-slices", "2", "--docker-image", "registry/llmlab"],
        *["--max-restarts", "10", "--termination-grace-period-seconds", "120", "--storage", "llmlab-bucket"],
        "--command",
    ]
    assert shlex.split(expand_as_kubernetes_does(call[-1])) == TRAIN


def test_xpk_refuses_what_its_yaml_cannot_carry(cloud: Cloud):
    result = cloud.run("xpk.sh", "nano", "e.py", "two\nlines", CLUSTER="pool", IMAGE="registry/llmlab")
    assert (result.returncode, cloud.calls()) == (2, [])


def test_xpk_deletes_the_run_alone(cloud: Cloud):
    assert cloud.run("xpk.sh", "--delete", "nano", CLUSTER="pool").returncode == 0
    assert cloud.calls() == [["xpk", "workload", "delete", "--workload", "nano", "--cluster", "pool", *ZONE]]


def test_xpk_attaches_the_bucket_where_workloads_look_for_it(cloud: Cloud):
    assert cloud.run("xpk.sh", "--attach", CLUSTER="pool", BUCKET="gs://my_lab.bucket/runs").returncode == 0
    settings = {"CLUSTER": "pool", "IMAGE": "registry/llmlab", "BUCKET": "gs://my_lab.bucket/runs"}
    assert cloud.run("xpk.sh", *RUN, **settings).returncode == 0
    attach, create = cloud.calls()
    assert attach[:4] == ["xpk", "storage", "attach", "llmlab-my-lab-bucket"]
    assert (option(attach, "--type"), option(attach, "--bucket")) == ("gcsfuse", "my_lab.bucket")
    assert (option(attach, "--readonly"), option(attach, "--auto-mount")) == ("false", "false")
    assert option(attach, "--mount-options") == "implicit-dirs,metadata-cache:ttl-secs:0"
    assert option(create, "--storage") == attach[3]
    assert option(create, "--command").endswith(f" --out {option(attach, '--mount-point')}/runs/nano")


def test_xpk_mounts_a_storage_of_the_users_own(cloud: Cloud):
    settings = {"CLUSTER": "pool", "IMAGE": "i", "XPK_STORAGE": "filestore"}
    assert cloud.run("xpk.sh", "nano", "e.py", "--out", "/shared/a b", **settings).returncode == 0
    assert option(cloud.calls()[0], "--storage") == "filestore"
    assert option(cloud.calls()[0], "--command") == "llmlab train e.py --out '/shared/a b'"


def test_xpk_mounts_nothing_without_a_bucket(cloud: Cloud):
    assert cloud.run("xpk.sh", *RUN, CLUSTER="pool", IMAGE="i", BUCKET="/shared").returncode == 0
    assert "--storage" not in cloud.calls()[0]


def test_xpk_refuses_a_bucket_whose_name_is_too_long_for_a_storage(cloud: Cloud):
    result = cloud.run("xpk.sh", *RUN, CLUSTER="pool", IMAGE="i", BUCKET=f"gs://{'b' * 60}/runs")
    assert (result.returncode, cloud.calls()) == (2, [])
    assert "LLMLAB_XPK_STORAGE" in result.stderr


# A name with a space, one that a shell would expand, one that leaves the mount, an address of another store.
NO_BUCKETS = ["gs://two words/runs", "gs://$HOME/runs", "gs://../runs", "gs:///runs", "s3://bucket/runs"]


@pytest.mark.parametrize("script", ["gke.sh", "xpk.sh", "sky.sh"])
@pytest.mark.parametrize("address", NO_BUCKETS)
def test_what_is_no_bucket_is_refused(cloud: Cloud, script: str, address: str):
    result = cloud.run(script, "nano", "e.py", "--out", address, CLUSTER="pool", IMAGE="i")
    assert (result.returncode, cloud.calls()) == (2, [])
    assert "gs://BUCKET/PATH" in result.stderr


@pytest.mark.parametrize("out", [["--out", "gs://lab/a $b/it's"], ["--out=gs://lab/a $b/it's"]])
def test_a_path_in_the_bucket_arrives_as_it_is(cloud: Cloud, out: list[str]):
    elsewhere = ["--initialize-from", "gs://lab/a $b/it's", "--name", "gs://lab/x"]
    settings = {"CLUSTER": "pool", "IMAGE": "i"}
    assert cloud.run("xpk.sh", "nano", "e.py", *elsewhere, *out, **settings).returncode == 0
    words = shlex.split(expand_as_kubernetes_does(option(cloud.calls()[0], "--command")))
    mounted = [word.replace("gs://", "/llmlab-buckets/") for word in out]
    assert words == ["llmlab", "train", "e.py", *elsewhere, *mounted]


def manifest(cloud: Cloud, *words: str, **settings: str) -> str:
    (cloud.fake / "kubectl").mkdir(exist_ok=True)
    (cloud.fake / "kubectl" / "1").write_text("0\n\n")
    result = cloud.run("gke.sh", *words, **{"IMAGE": "registry/llmlab:1", **settings})
    assert result.returncode == 0, result.stderr
    assert cloud.calls()[-1] == ["kubectl", "create", "--filename", "-"]
    return (cloud.fake / "stdin").read_text()


def parsed(text: str) -> Any:
    return pytest.importorskip("yaml", reason="PyYAML comes with optuna (the dev extra)").safe_load(text)


def test_gke_creates_a_jobset_with_one_pod_per_host(cloud: Cloud):
    whole = parsed(manifest(cloud, "--spot", *RUN, SLICES="2", GKE_TOPOLOGY="4x8", NAMESPACE="no: 1"))
    assert whole["metadata"]["name"] == whole["metadata"]["labels"]["llmlab-run"] == "nano"
    assert whole["metadata"]["namespace"] == "no: 1"  # quoted, so it stays a string
    (slices,) = whole["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    assert (slices["replicas"], job["parallelism"], job["completions"]) == (2, 8, 8)
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "4x8",
        "cloud.google.com/gke-spot": "true",
    }
    (container,) = pod["containers"]
    assert [expand_as_kubernetes_does(word) for word in container["command"]] == TRAIN
    assert container["image"] == "registry/llmlab:1"
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}


def pod_template(text: str) -> Any:
    (slices,) = parsed(text)["spec"]["replicatedJobs"]
    return slices["template"]["spec"]["template"]


def test_gke_mounts_the_bucket_of_the_run(cloud: Cloud):
    template = pod_template(manifest(cloud, *RUN, GKE_SERVICE_ACCOUNT="no: 1", BUCKET="gs://my_lab.bucket/runs"))
    assert template["metadata"]["annotations"] == {
        "gke-gcsfuse/volumes": "true",  # strings, as annotations must be
        "gke-gcsfuse/cpu-limit": "0",
        "gke-gcsfuse/memory-limit": "0",
        "gke-gcsfuse/ephemeral-storage-limit": "0",
    }
    pod = template["spec"]
    assert pod["serviceAccountName"] == "no: 1"
    (volume,) = pod["volumes"]
    assert volume["csi"] == {
        "driver": "gcsfuse.csi.storage.gke.io",
        "volumeAttributes": {
            "bucketName": "my_lab.bucket",
            "mountOptions": "implicit-dirs,metadata-cache:ttl-secs:0",
            "hostNetworkPodKSA": "true",
        },
    }
    (container,) = pod["containers"]
    assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": "/llmlab-buckets/my_lab.bucket"}]
    assert container["command"][-2:] == ["--out", "/llmlab-buckets/my_lab.bucket/runs/nano"]


def test_gke_pods_without_an_account_reach_the_bucket_as_their_node(cloud: Cloud):
    pod = pod_template(manifest(cloud, *RUN))["spec"]
    assert pod["volumes"][0]["csi"]["volumeAttributes"]["bucketName"] == "bucket"
    assert "hostNetworkPodKSA" not in pod["volumes"][0]["csi"]["volumeAttributes"]
    assert "serviceAccountName" not in pod


def test_gke_mounts_nothing_without_a_bucket(cloud: Cloud):
    text = manifest(cloud, *RUN, BUCKET="/shared")
    template = pod_template(text)
    assert "annotations" not in template["metadata"]
    assert not {"volumes", "serviceAccountName"} & set(template["spec"])
    (container,) = template["spec"]["containers"]
    assert "volumeMounts" not in container
    assert container["command"][-2:] == ["--out", "/shared/nano"]
    assert "" not in [line.strip() for line in text.splitlines()]


def test_gke_restarts_after_42_and_not_after_1_or_2(cloud: Cloud):
    spec = parsed(manifest(cloud, *RUN, MAX_RESTARTS="7"))["spec"]
    (rule,) = spec["failurePolicy"]["rules"]
    assert spec["failurePolicy"]["maxRestarts"] == 7
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    job = spec["replicatedJobs"][0]["template"]["spec"]
    evicted, failed = job["podFailurePolicy"]["rules"]
    assert (evicted["action"], failed["action"], job["backoffLimit"]) == ("Count", "FailJob", 0)
    (container,) = job["template"]["spec"]["containers"]
    assert failed["onExitCodes"]["containerName"] == container["name"]
    assert {1, 2} <= set(failed["onExitCodes"]["values"])
    assert not {0, 42, 137, 143} & set(failed["onExitCodes"]["values"])
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # podFailurePolicy demands it


def test_gke_fills_every_place_of_its_template_also_without_a_yaml_parser(cloud: Cloud):
    text = manifest(cloud, *RUN, "line\nbreak")
    line = next(line for line in text.splitlines() if line.strip().startswith("command: "))
    words = [expand_as_kubernetes_does(word) for word in json.loads(line.split("command: ", 1)[1])]
    assert words == [*TRAIN[:-2], "line\nbreak", *TRAIN[-2:]]
    assert re.findall(r"\{\{[A-Z_]+\}\}", text.replace(line, "")) == []


def test_gke_dry_run_prints_what_would_be_created(cloud: Cloud):
    printed = cloud.run("gke.sh", "--dry-run", *RUN, IMAGE="registry/llmlab:1").stdout
    assert cloud.calls() == []
    (cloud.fake / "kubectl").mkdir()
    (cloud.fake / "kubectl" / "1").write_text("0\n\n")
    subprocess.run(["bash", "-c", printed], env=cloud.environment, check=True)
    pasted = (cloud.fake / "stdin").read_text()
    assert pasted == manifest(cloud, *RUN)


@pytest.mark.parametrize(("topology", "chips"), [("4x4; x", "4"), ("2x3", "4"), ("16", "4"), ("4x4", "0")])
def test_gke_refuses_a_topology_that_hosts_do_not_fill(cloud: Cloud, topology: str, chips: str):
    result = cloud.run("gke.sh", *RUN, IMAGE="i", GKE_TOPOLOGY=topology, GKE_CHIPS_PER_HOST=chips)
    assert (result.returncode, cloud.calls()) == (2, [])
    assert "LLMLAB_GKE_TOPOLOGY" in result.stderr


def test_gke_refuses_control_characters(cloud: Cloud):
    result = cloud.run("gke.sh", *RUN, "bell\a", IMAGE="i")
    assert (result.returncode, cloud.calls()) == (2, [])


def test_gke_deletes_by_the_label_of_the_run(cloud: Cloud):
    assert cloud.run("gke.sh", "--delete", "nano", NAMESPACE="lab").returncode == 0
    assert cloud.calls() == [["kubectl", "delete", "jobset", "--namespace", "lab", "--selector", "llmlab-run=nano"]]


@pytest.mark.parametrize(
    ("accelerators", "flags", "task"),
    [("tpu-v6e-16", [], "tpu.yaml"), ("H100:8", ["--num-nodes", "2"], "gpu.yaml")],
)
def test_sky_launches_a_managed_job(cloud: Cloud, accelerators: str, flags: list[str], task: str):
    assert cloud.run("sky.sh", "--sky-accelerators", accelerators, "--sky-nodes", "2", *RUN).returncode == 0
    (call,) = cloud.calls()
    head = ["sky", "jobs", "launch", "--name", "nano", "--yes", "--detach-run", "--workdir", str(SCRIPTS.parent)]
    bucket = ["--env", "LLMLAB_BUCKET_NAME=bucket"]
    assert call[:-2] == [*head, "--gpus", accelerators, *flags, *bucket, "--env"]
    assert call[-1] == str(SCRIPTS / "sky" / task)
    variable, command = call[-2].split("=", 1)
    assert (variable, shlex.split(command)) == ("LLMLAB_COMMAND", TRAIN)


def test_sky_cancels_the_run_alone(cloud: Cloud):
    cloud.run("sky.sh", "--delete", "nano")
    assert cloud.calls() == [["sky", "jobs", "cancel", "--name", "nano", "--yes"]]


@pytest.mark.parametrize("task", ["tpu.yaml", "gpu.yaml"])
def test_sky_tasks_recover_from_42_alone(task: str):
    resources = parsed((SCRIPTS / "sky" / task).read_text())["resources"]
    assert resources["job_recovery"]["recover_on_exit_codes"] == [42]
    assert resources["job_recovery"]["max_restarts_on_errors"] == 0
    assert resources["use_spot"] is True


@pytest.mark.parametrize("task", ["tpu.yaml", "gpu.yaml"])
def test_sky_tasks_mount_the_bucket_that_the_run_is_written_to(cloud: Cloud, task: str):
    accelerators = "tpu-v6e-16" if task == "tpu.yaml" else "H100:8"
    cloud.run("sky.sh", "--sky-accelerators", accelerators, *RUN, BUCKET="gs://my_lab.bucket/runs")
    (call,) = cloud.calls()
    variables = dict(word.split("=", 1) for flag, word in pairwise(call) if flag == "--env")
    whole = parsed((SCRIPTS / "sky" / task).read_text())
    assert set(whole["envs"]) == set(variables)  # null: SkyPilot insists that the launch sets them
    name = variables["LLMLAB_BUCKET_NAME"]
    # SkyPilot fills the variables of envs into file_mounts, and nowhere else.
    (mount,) = json.loads(json.dumps(whole["file_mounts"]).replace("${LLMLAB_BUCKET_NAME}", name)).items()
    place, bucket = mount
    assert bucket == {"source": "gs://my_lab.bucket", "mode": "MOUNT"}
    assert shlex.split(variables["LLMLAB_COMMAND"])[-2:] == ["--out", f"{place}/runs/nano"]


def test_sky_refuses_to_write_a_run_to_a_disk_that_goes_with_the_machine(cloud: Cloud):
    result = cloud.run("sky.sh", *RUN, BUCKET="/data")
    assert (result.returncode, cloud.calls()) == (2, [])
    assert "LLMLAB_SKY_TASK" in result.stderr
    assert cloud.run("sky.sh", "--sky-task", "my own.yaml", *RUN, BUCKET="/data").returncode == 0
    (call,) = cloud.calls()
    assert call[-1] == "my own.yaml"
    assert [word.split("=")[0] for flag, word in pairwise(call) if flag == "--env"] == ["LLMLAB_COMMAND"]


@pytest.mark.parametrize(
    ("task", "nodes", "joined"),
    [
        ("tpu.yaml", "4", []),
        ("gpu.yaml", "1", []),
        ("gpu.yaml", "2", ["--coordinator", "10.0.0.1:8476", "--num-processes", "2", "--process-id", "1"]),
    ],
)
def test_sky_tasks_run_the_command_word_by_word(tmp_path: Path, task: str, nodes: str, joined: list[str]):
    run = parsed((SCRIPTS / "sky" / task).read_text())["run"]
    llmlab = tmp_path / "llmlab-venv" / "bin" / "llmlab"
    llmlab.parent.mkdir(parents=True)
    llmlab.write_text('#!/bin/sh\nprintf "%s\\0" llmlab "$@"\nexit 42\n')
    llmlab.chmod(0o755)
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "LLMLAB_COMMAND": shlex.join(TRAIN),
        "SKYPILOT_NUM_NODES": nodes,
        "SKYPILOT_NODE_RANK": "1",
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
    }
    result = subprocess.run(["bash", "-c", run], env=environment, capture_output=True, text=True)
    assert result.stdout.split("\0")[:-1] == [*TRAIN, *joined]
    assert result.returncode == 42


def test_slurm_submits_one_task_per_gpu(cloud: Cloud):
    settings = {"SLURM_NODES": "2", "SLURM_GPUS_PER_NODE": "4", "SLURM_PARTITION": "gpu", "SLURM_ACCOUNT": "lab"}
    assert cloud.run("slurm.sh", *RUN, **settings).returncode == 0
    (call,) = cloud.calls()
    assert call == [
        *["sbatch", "--job-name", "nano", "--nodes", "2", "--gpus-per-node", "4", "--ntasks-per-node", "4"],
        *["--cpus-per-task", "8", "--time", "24:00:00", "--output", "slurm-logs/%x-%j.out"],
        *["--export", "ALL,LLMLAB_MAX_RESTARTS=10", "--partition", "gpu", "--account", "lab"],
        *[str(SCRIPTS / "slurm" / "train.sbatch"), *TRAIN[:-1], "runs/nano"],
    ]
    assert (cloud.directory / "slurm-logs").is_dir()


@pytest.mark.parametrize(
    ("bucket", "out"), [("", "runs/nano"), ("gs://bucket/runs", "runs/nano"), ("/shared/a b", "/shared/a b/nano")]
)
def test_slurm_writes_to_the_shared_file_system(cloud: Cloud, bucket: str, out: str):
    cloud.run("slurm.sh", *RUN, BUCKET=bucket)
    assert option(cloud.calls()[0], "--out") == out


def test_slurm_refuses_a_bucket_that_nothing_mounts(cloud: Cloud):
    result = cloud.run("slurm.sh", *RUN, "--out", "gs://bucket/x")
    assert (result.returncode, cloud.calls()) == (2, [])
    assert "directory that they all see" in result.stderr


def test_the_sbatch_header_is_the_agreed_one():
    header = re.findall(r"^#SBATCH (.*)$", (SCRIPTS / "slurm" / "train.sbatch").read_text(), re.MULTILINE)
    assert header == ["--requeue", "--open-mode=append", "--signal=TERM@300"]


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [(0, None, False), (1, None, False), (2, None, False), (42, None, True), (42, "9", True), (42, "10", False)],
)
def test_a_slurm_job_queues_itself_again_after_42(cloud: Cloud, code: int, restarts: str | None, requeued: bool):
    (cloud.fake / "srun").mkdir()
    (cloud.fake / "srun" / "1").write_text(f"{code}\n\n")
    cloud.environment["SLURM_JOB_ID"] = "77"
    if restarts is not None:
        cloud.environment["SLURM_RESTART_COUNT"] = restarts
    result = cloud.run("slurm/train.sbatch", *TRAIN)
    assert result.returncode == code
    requeue = [["scontrol", "requeue", "77"]] if requeued else []
    assert cloud.calls() == [["srun", "--kill-on-bad-exit=0", "--wait=300", *TRAIN], *requeue]
