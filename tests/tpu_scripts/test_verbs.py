"""The scripts that do one thing to the TPU of a run: the exact words they give to gcloud."""

import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.tpu_scripts.cloud import ABSENT, EVERY_WORKER, SCRIPTS, ZONE, Answer, Cloud, option, own

QUEUED = ["gcloud", "compute", "tpus", "queued-resources"]
MACHINE = ["--accelerator-type", "v6e-16", "--runtime-version", "v2-alpha-tpuv6e"]
QUOTA = "ERROR: RESOURCE_EXHAUSTED: Quota limit 'TPUV6EPreemptiblePerProjectPerZone' has been exceeded. Limit: 8."


@pytest.mark.parametrize(
    ("words", "flags"),
    [
        (["nano"], [*MACHINE, "--node-id", "nano"]),
        (["--spot", "nano"], [*MACHINE, "--node-id", "nano", "--spot"]),
        (["--reserved", "nano"], [*MACHINE, "--node-id", "nano", "--reserved"]),
        (["--slices", "3", "--spot", "nano"], [*MACHINE, "--node-count", "3", "--node-prefix", "nano", "--spot"]),
    ],
)
def test_create(cloud: Cloud, words: list[str], flags: list[str]):
    assert cloud.run("create.sh", *words).returncode == 0
    assert cloud.calls() == [[*QUEUED, "create", "nano", *flags, "--labels", "llmlab_run=nano", *ZONE]]


def test_create_waits_until_active(cloud: Cloud):
    cloud.answer("describe", *map(own, ["WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]))
    result = cloud.run("create.sh", "--wait", "nano")
    assert result.returncode == 0
    assert [call[4] for call in cloud.calls()] == ["create", *["describe"] * 4]
    assert result.stderr.count("nano: WAITING_FOR_RESOURCES") == 1


def test_a_quota_error_is_shown_and_nothing_else_is_tried(cloud: Cloud):
    cloud.answer("create", Answer(stderr=QUOTA, code=1))
    result = cloud.run("create.sh", "--wait", "nano")
    assert result.returncode == 1
    assert QUOTA in result.stderr
    assert [call[4] for call in cloud.calls()] == ["create"]


def test_a_request_that_fails_in_the_queue_is_explained(cloud: Cloud):
    cloud.answer("describe", own("WAITING_FOR_RESOURCES"), own("FAILED"))
    cloud.answer("failure", "no such reservation")
    result = cloud.run("create.sh", "--wait", "nano")
    assert result.returncode == 1
    assert "no such reservation" in result.stderr
    assert f"delete.sh {' '.join(ZONE)} nano" in result.stderr
    assert cloud.steps() == ["create"]


def test_waiting_ends_when_gcloud_stays_silent(cloud: Cloud):
    cloud.answer("describe", Answer(stderr="network is unreachable", code=1))
    result = cloud.run("create.sh", "--wait", "nano", MAX_ERRORS="3")
    assert result.returncode == 1
    assert "failed 3 times in a row" in result.stderr
    assert [call[4] for call in cloud.calls()] == ["create", *["describe"] * 3]


@pytest.mark.parametrize("during", ["create", "describe"])
def test_ctrl_c_says_what_exists_and_how_to_delete_it(cloud: Cloud, during: str):
    cloud.answer("create", Answer(hang=during == "create"))
    waiting = own("WAITING_FOR_RESOURCES")
    cloud.answer("describe", *([Answer(hang=True)] if during == "describe" else []), waiting)
    result = cloud.interrupt("create.sh", "--wait", "nano", during=during)
    assert result.returncode == 130
    assert "the queued resource nano exists (WAITING_FOR_RESOURCES) and is kept" in result.stderr
    assert f"{SCRIPTS}/delete.sh {' '.join(ZONE)} nano" in result.stderr
    assert cloud.steps() == ["create"]


def test_ctrl_c_before_anything_exists_says_so(cloud: Cloud):
    cloud.answer("create", Answer(hang=True))
    cloud.answer("describe", ABSENT)
    result = cloud.interrupt("create.sh", "nano", during="create")
    assert result.returncode == 130
    assert "there is no queued resource nano" in result.stderr


def test_setup_clones_on_all_workers(cloud: Cloud):
    assert cloud.run("setup.sh", "nano", REVISION="a branch$").returncode == 0
    clone = "bash llmlab-worker.sh setup clone https://example.org/llmlab.git 'a branch$'"
    assert cloud.calls() == [
        [*QUEUED, "scp", str(SCRIPTS / "worker.sh"), "nano:llmlab-worker.sh", *EVERY_WORKER, *ZONE],
        [*QUEUED, "ssh", "nano", *EVERY_WORKER, "--command", clone, *ZONE],
    ]


def test_setup_uploads_the_working_directory_as_git_sees_it(cloud: Cloud):
    source = cloud.directory / "my $source"
    source.mkdir()
    subprocess.run(["git", "init", "--quiet", str(source)], check=True)
    (source / ".gitignore").write_text("secret\n")
    for name in ("secret", "a b$c.py", "gone.py"):
        (source / name).write_text(name)
    subprocess.run(["git", "-C", str(source), "add", "gone.py"], check=True)
    (source / "gone.py").unlink()
    gcloud = cloud.directory / "bin" / "gcloud"  # the archive is a temporary file: keep what scp is given
    keep = '[[ ${5:-} != *.tar.gz ]] || cp "$5" "$FAKE/sent"\n'
    gcloud.write_text(gcloud.read_text().replace("[[ -d ", f"{keep}[[ -d ", 1))
    assert cloud.run("setup.sh", "nano", REPOSITORY="", SOURCE=str(source)).returncode == 0
    with tarfile.open(cloud.fake / "sent") as archive:
        assert sorted(archive.getnames()) == ["./.gitignore", "./a b$c.py"]
    commands = [option(call, "--command") for call in cloud.calls() if "--command" in call]
    assert commands == ["bash llmlab-worker.sh setup upload llmlab-upload.tar.gz"]
    assert cloud.calls()[1][6] == "nano:llmlab-upload.tar.gz"
    assert not list(cloud.directory.glob("tmp.*"))  # nothing is left behind


def test_run_starts_all_workers_with_the_bucket_as_out(cloud: Cloud):
    assert cloud.run("run.sh", "nano", "experiments/quickstart.py", "--train.steps", "5").returncode == 0
    command = (
        "bash llmlab-worker.sh start nano llmlab train experiments/quickstart.py --train.steps 5"
        " --out gs://bucket/runs/nano"
    )
    assert cloud.calls() == [[*QUEUED, "ssh", "nano", *EVERY_WORKER, "--command", command, *ZONE]]


@pytest.mark.parametrize("out", [["--out", "gs://b/a b$"], ["--out=gs://b/a b$"]])
def test_an_out_of_the_user_is_kept(cloud: Cloud, out: list[str]):
    assert cloud.run("run.sh", "nano", "e.py", *out).returncode == 0
    assert "gs://bucket" not in option(cloud.calls()[0], "--command")


def test_run_needs_a_place_that_all_workers_share(cloud: Cloud):
    result = cloud.run("run.sh", "nano", "e.py", BUCKET="")
    assert (result.returncode, cloud.calls()) == (2, [])
    assert "LLMLAB_BUCKET" in result.stderr


@pytest.mark.parametrize("file", ["/srv/e.py", "quickstart", "--train.steps"])
def test_what_is_no_experiment_of_the_repository_is_refused(cloud: Cloud, file: str):
    result = cloud.run("run.sh", "nano", "--", file)
    assert (result.returncode, cloud.calls()) == (2, [])
    assert "experiments/quickstart.py" in result.stderr


def test_logs_and_ssh_reach_one_worker(cloud: Cloud):
    cloud.run("logs.sh", "--follow", "--lines", "7", "--worker", "2", "--slice", "1", "nano")
    cloud.run("ssh.sh", "nano")
    cloud.run("ssh.sh", "--worker", "all", "--slice", "all", "nano", "ls", "-l", "my $file")
    there = [*QUEUED, "ssh", "nano", "--node"]
    assert cloud.calls() == [
        [*there, "1", "--worker", "2", "--command", "bash llmlab-worker.sh logs nano 7 follow", *ZONE],
        [*there, "0", "--worker", "0", *ZONE],
        [*there, "all", "--worker", "all", "--command", "ls -l 'my $file'", *ZONE],
    ]
    assert cloud.run("ssh.sh", "--worker", "all", "nano").returncode == 2


def test_status_of_one_run_and_of_all(cloud: Cloud):
    cloud.answer("describe", own("ACTIVE"), own("FAILED"))
    cloud.answer("failure", "the reason")
    assert cloud.run("status.sh", "nano").stdout.startswith("nano: ACTIVE\n")
    assert [call[3] for call in cloud.calls()] == ["queued-resources", "tpu-vm", "queued-resources"]
    assert cloud.run("status.sh", "nano").stdout == "nano: FAILED\nthe reason\n"
    cloud.run("status.sh")
    assert cloud.calls()[-1] == [*QUEUED, "list", "--filter", "tpu.nodeSpec[0].node.labels.llmlab_run:*", *ZONE]


def test_delete_deletes_its_own(cloud: Cloud):
    cloud.answer("describe", own("ACTIVE"))
    assert cloud.run("delete.sh", "nano").returncode == 0
    assert cloud.calls()[1:] == [[*QUEUED, "delete", "nano", "--force", *ZONE]]
    cloud.run("delete.sh", "--yes", "nano")
    assert cloud.calls()[-1] == [*QUEUED, "delete", "nano", "--quiet", "--force", *ZONE]


@pytest.mark.parametrize("described", ["ACTIVE\tother", "ACTIVE\t", "ACTIVE"])
def test_delete_refuses_what_is_not_its_own(cloud: Cloud, described: str):
    cloud.answer("describe", described)
    result = cloud.run("delete.sh", "--yes", "nano")
    assert result.returncode == 2
    assert "not llmlab_run=nano" in result.stderr
    assert cloud.steps() == []


def test_delete_of_nothing_and_of_the_unknown(cloud: Cloud):
    cloud.answer("describe", ABSENT, Answer(stderr="PERMISSION_DENIED: location is not found", code=1))
    result = cloud.run("delete.sh", "--yes", "nano")
    assert (result.returncode, "nothing to delete" in result.stderr) == (0, True)
    result = cloud.run("delete.sh", "--yes", "nano")
    assert (result.returncode, "PERMISSION_DENIED" in result.stderr) == (1, True)
    assert cloud.steps() == []


def test_paths_with_spaces_work(cloud: Cloud, tmp_path: Path):
    moved = tmp_path / "my $scripts dir"
    moved.symlink_to(SCRIPTS)
    result = subprocess.run(
        ["bash", str(moved / "setup.sh"), "nano"], env=cloud.environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert cloud.calls()[0][5] == str(moved / "worker.sh")
