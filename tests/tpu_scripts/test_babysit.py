"""babysit.sh as a state machine: scripted clouds in, the order of what it changed and its exit code out."""

import pytest

from tests.tpu_scripts.cloud import ABSENT, SCRIPTS, ZONE, Answer, Cloud, option, own, workers

RUN = ["nano", "experiments/quickstart.py", "--train.steps", "5"]
START = ["create", "setup", "start"]
QUEUE = ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
NEW = "llmlab-job new absent"
RUNNING = workers("running", "running")
DONE = workers("exited 0", "exited 0")


def states(*names: str) -> list[Answer | str]:
    return [ABSENT if name == "ABSENT" else own(name) for name in names]


def healthy(cloud: Cloud, *jobs: str) -> None:
    """A TPU that becomes ACTIVE and stays so, and what its job is seen to do."""
    cloud.answer("describe", *states("ABSENT", *QUEUE))
    cloud.answer("nodes", "READY")
    cloud.answer("start", workers("started", "started"))
    cloud.answer("state", NEW, *jobs)


def test_from_nothing_to_done(cloud: Cloud):
    healthy(cloud, RUNNING, RUNNING, DONE)
    result = cloud.run("babysit.sh", "--spot", *RUN)
    assert result.returncode == 0, result.stderr
    assert cloud.steps() == START
    assert "the training is done: gs://bucket/runs/nano" in result.stderr
    assert "exists (ACTIVE) and is kept" in result.stderr  # unless asked, nothing is deleted
    created = next(call for call in cloud.calls() if "create" in call)
    assert created[4:] == [
        *["create", "nano", "--accelerator-type", "v6e-16", "--runtime-version", "v2-alpha-tpuv6e"],
        *["--node-id", "nano", "--spot", "--labels", "llmlab_run=nano", *ZONE],
    ]


def test_preempted_then_recreated_then_resumed_from_the_same_bucket(cloud: Cloud):
    lost = ["ABSENT", *QUEUE, "ACTIVE", "SUSPENDING", "SUSPENDING", "SUSPENDED"]
    cloud.answer("describe", *states(*lost, "ABSENT", *QUEUE))
    cloud.answer("nodes", "READY")
    cloud.answer("start", workers("started", "started"))
    cloud.answer("state", NEW, RUNNING, NEW, RUNNING, DONE)
    result = cloud.run("babysit.sh", *RUN)
    assert result.returncode == 0, result.stderr
    assert cloud.steps() == [*START, "delete", *START]
    delete = next(call for call in cloud.calls() if "delete" in call)
    assert delete[4:] == ["delete", "nano", "--quiet", "--force", *ZONE]
    started = [call for call in cloud.calls() if "start nano" in " ".join(call)]
    assert started[0] == started[1]  # the same command, with the same --out, resumes
    assert option(started[0], "--command").endswith("--out gs://bucket/runs/nano")


@pytest.mark.parametrize("state", ["SUSPENDED", "A_STATE_OF_TOMORROW"])
def test_a_lost_resource_is_never_waited_for(cloud: Cloud, state: str):
    cloud.answer("describe", *states(state, "ABSENT", "ACTIVE"))
    cloud.answer("nodes", "READY")
    cloud.answer("start", workers("started"))
    cloud.answer("state", NEW, workers("exited 0"))
    assert cloud.run("babysit.sh", *RUN).returncode == 0
    assert cloud.steps() == ["delete", *START]


@pytest.mark.parametrize("nodes", ["READY\nPREEMPTED", "READY", ""])
def test_active_with_a_node_that_is_not_ready_is_lost(cloud: Cloud, nodes: str):
    cloud.answer("describe", *states(*["ACTIVE"] * 3, "ABSENT", "ACTIVE"))
    cloud.answer("nodes", "READY\nREADY", nodes, nodes, "READY\nREADY")
    cloud.answer("start", workers("started", "started"))
    cloud.answer("state", NEW, NEW, DONE)
    result = cloud.run("babysit.sh", "--slices", "2", *RUN)
    assert result.returncode == 0, result.stderr
    assert cloud.steps() == ["setup", "start", "delete", *START]


def test_one_bad_look_at_the_nodes_is_not_believed(cloud: Cloud):
    healthy(cloud, RUNNING, DONE)
    (cloud.fake / "nodes" / "1").unlink()
    (cloud.fake / "nodes").rmdir()
    cloud.answer("nodes", "READY", "", "READY")
    assert cloud.run("babysit.sh", *RUN).returncode == 0
    assert cloud.steps() == START


@pytest.mark.parametrize("code", [1, 2, 130, 3, 127])
def test_a_failure_is_not_repeated(cloud: Cloud, code: int):
    healthy(cloud, RUNNING, workers(f"exited {code}", f"exited {code}"))
    result = cloud.run("babysit.sh", *RUN)
    assert result.returncode == (code if code in (1, 2, 130) else 1)
    assert cloud.steps() == START
    assert "delete.sh" in result.stderr


@pytest.mark.parametrize(
    "ended",
    [
        workers("exited 42", "exited 42"),
        workers("exited 1", "exited 42"),  # the preempted worker took its peer down
        workers("exited 134", "exited 137"),
    ],
)
def test_preempted_or_killed_on_machines_that_are_well_starts_again_there(cloud: Cloud, ended: str):
    healthy(cloud, RUNNING, ended, RUNNING, DONE)
    assert cloud.run("babysit.sh", *RUN).returncode == 0
    assert cloud.steps() == [*START, "stop", "setup", "start"]


def test_a_worker_that_fails_alone_is_a_failure_once_its_peers_had_time_to_end(cloud: Cloud):
    healthy(cloud, workers("running", "exited 1"))
    assert cloud.run("babysit.sh", *RUN).returncode == 1
    assert cloud.steps() == START


def test_a_failure_seen_just_before_the_preemption_is_known_is_the_preemption(cloud: Cloud):
    cloud.answer("describe", *states("ACTIVE", "ACTIVE", "SUSPENDING", "SUSPENDED", "ABSENT", "ACTIVE"))
    cloud.answer("nodes", "READY")
    cloud.answer("start", workers("started", "started"))
    cloud.answer("state", NEW, workers("exited 1", "exited 1"), NEW, DONE)
    assert cloud.run("babysit.sh", *RUN).returncode == 0
    assert cloud.steps() == ["setup", "start", "delete", *START]


@pytest.mark.parametrize("message", ["RESOURCE_EXHAUSTED: Quota limit exceeded", "PERMISSION_DENIED: no"])
def test_a_refused_request_is_shown_and_not_repeated(cloud: Cloud, message: str):
    cloud.answer("describe", ABSENT)
    cloud.answer("create", Answer(stderr=message, code=1))
    result = cloud.run("babysit.sh", *RUN)
    assert result.returncode == 1
    assert message in result.stderr
    assert cloud.steps() == ["create"]


def test_a_quota_error_in_the_queue_is_shown_and_not_repeated(cloud: Cloud):
    cloud.answer("describe", *states("ABSENT", "WAITING_FOR_RESOURCES", "FAILED"))
    cloud.answer("failure", "You have reached your Quota of TPU v6e cores")
    result = cloud.run("babysit.sh", *RUN)
    assert result.returncode == 1
    assert "You have reached your Quota" in result.stderr
    assert cloud.steps() == ["create"]


def test_another_failure_in_the_queue_is_tried_again_but_not_for_ever(cloud: Cloud):
    cloud.answer("describe", *states("FAILED", "ABSENT", "FAILED", "ABSENT", "FAILED", "ABSENT", "FAILED"))
    cloud.answer("failure", "an internal error occurred")
    result = cloud.run("babysit.sh", *RUN, MAX_RESTARTS="2")
    assert result.returncode == 1
    assert cloud.steps() == ["delete", "create", "delete", "create"]
    assert "2 restarts without a checkpoint" in result.stderr


def test_a_hiccup_while_creating_is_tried_again(cloud: Cloud):
    healthy(cloud, DONE)
    cloud.answer("create", Answer(stderr="ERROR: UNAVAILABLE: try later", code=1), "")
    assert cloud.run("babysit.sh", *RUN).returncode == 0
    assert cloud.steps() == ["create", "create", "setup", "start"]


def test_restarts_are_counted_only_as_long_as_no_checkpoint_is_new(cloud: Cloud):
    preempted = workers("exited 42", "exited 42")
    healthy(cloud, *[preempted] * 4, DONE)
    checkpoints = [f"gs://bucket/runs/nano/checkpoints/{step}/" for step in (90, 100, 200)]
    cloud.answer("storage", "", *["\n".join(checkpoints[: n + 1]) for n in range(3)])
    result = cloud.run("babysit.sh", *RUN, MAX_RESTARTS="2")
    assert result.returncode == 0, result.stderr
    assert cloud.steps() == [*START, *["stop", "setup", "start"] * 4]
    assert "newest checkpoint: step 200" in result.stderr  # and not 90, which sorts last as text


def test_restarts_without_progress_end(cloud: Cloud):
    healthy(cloud, workers("exited 42", "exited 42"))
    cloud.answer("storage", "gs://bucket/runs/nano/checkpoints/10/")
    result = cloud.run("babysit.sh", *RUN, MAX_RESTARTS="2")
    assert result.returncode == 1
    assert cloud.steps() == [*START, *["stop", "setup", "start"] * 2]
    assert "2 restarts without a checkpoint after step 10" in result.stderr


def test_a_job_that_runs_already_is_taken_up_and_not_disturbed(cloud: Cloud):
    cloud.answer("describe", own("ACTIVE"))
    cloud.answer("nodes", "READY")
    cloud.answer("state", RUNNING, RUNNING, DONE)
    cloud.answer("start", RUNNING)
    assert cloud.run("babysit.sh", *RUN).returncode == 0
    assert cloud.steps() == ["start"]  # worker.sh: the same command again changes nothing


def test_a_job_of_another_command_is_left_alone(cloud: Cloud):
    cloud.answer("describe", own("ACTIVE"))
    cloud.answer("nodes", "READY")
    cloud.answer("state", RUNNING)
    cloud.answer("start", Answer(stderr="error: another command runs", code=3))
    assert cloud.run("babysit.sh", *RUN).returncode == 2
    assert cloud.steps() == ["start"]


@pytest.mark.parametrize("described", ["SUSPENDED\tother", "WAITING_FOR_RESOURCES\tother", "ACTIVE"])
def test_a_resource_of_somebody_else_is_left_alone(cloud: Cloud, described: str):
    cloud.answer("describe", described)
    result = cloud.run("babysit.sh", "--delete-on-exit", *RUN)
    assert result.returncode == 2
    assert cloud.steps() == []


@pytest.mark.parametrize("topic", ["describe", "nodes", "state", "setup", "start"])
def test_errors_in_a_row_end(cloud: Cloud, topic: str):
    replies: dict[str, list[Answer | str]] = {
        "describe": [own("ACTIVE")],
        "nodes": ["READY"],
        "state": [NEW],
        "setup": [""],
        "start": [workers("started")],
    }
    replies[topic] = [Answer(stderr="connection lost", code=255)]
    for key, answers in replies.items():
        cloud.answer(key, *answers)
    result = cloud.run("babysit.sh", *RUN, MAX_ERRORS="3")
    assert result.returncode == 1
    assert "giving up after 3 errors in a row" in result.stderr
    assert set(cloud.steps()) <= {"setup", "start"}  # a TPU that does not answer is not deleted


def test_a_worker_that_does_not_answer_is_not_taken_for_one_that_is_done(cloud: Cloud):
    healthy(cloud, RUNNING, workers("exited 0"), RUNNING, DONE)
    result = cloud.run("babysit.sh", *RUN)
    assert result.returncode == 0
    assert "not all workers answer (1 of 10)" in result.stderr


@pytest.mark.parametrize("during", ["create", "start nano", "state nano", "delete"])
def test_ctrl_c_keeps_the_tpu_and_says_so(cloud: Cloud, during: str):
    stuck = {during.split()[0]: Answer(workers("running"), hang=True)}
    if during == "delete":
        cloud.answer("describe", *states("SUSPENDED", "DELETING"))
    elif during == "create":
        cloud.answer("describe", *states("ABSENT", "WAITING_FOR_RESOURCES"))
    else:
        cloud.answer("describe", own("ACTIVE"))
    cloud.answer("nodes", "READY")
    for topic, answer in {"state": NEW, "start": workers("started"), "create": "", **stuck}.items():
        cloud.answer(topic, answer)
    result = cloud.interrupt("babysit.sh", *RUN, during=during)
    assert result.returncode == 130, result.stderr
    assert "the same command takes it up again" in result.stderr
    assert "and is kept" in result.stderr
    assert f"{SCRIPTS}/delete.sh {' '.join(ZONE)} nano" in result.stderr
    assert cloud.calls()[-1][4] == "describe"  # the last thing done was to look
    assert cloud.steps().count("delete") == (during == "delete")


def test_ctrl_c_while_waiting_is_answered_at_once(cloud: Cloud):
    cloud.answer("describe", *states("ABSENT", "WAITING_FOR_RESOURCES"))
    cloud.environment["LLMLAB_POLL_SECONDS"] = "25"
    result = cloud.interrupt("babysit.sh", *RUN, during="create")  # then it sleeps
    assert result.returncode == 130


@pytest.mark.parametrize("code", [0, 1])
def test_the_tpu_is_deleted_at_the_end_when_asked(cloud: Cloud, code: int):
    healthy(cloud, workers(f"exited {code}", f"exited {code}"))
    assert cloud.run("babysit.sh", "--delete-on-exit", *RUN).returncode == code
    assert cloud.steps() == [*START, "delete"]


def test_babysitting_needs_a_bucket(cloud: Cloud):
    result = cloud.run("babysit.sh", *RUN, "--out", "runs/nano")
    assert (result.returncode, cloud.calls()) == (2, [])
    assert "gs://" in result.stderr


def test_words_with_spaces_and_dollars_reach_the_workers(cloud: Cloud):
    healthy(cloud, DONE)
    cloud.run("babysit.sh", "nano", "my experiments/a $b.py", "--prompt", "it's $HOME")
    command = next(option(call, "--command") for call in cloud.calls() if "start nano" in " ".join(call))
    assert command == (
        "bash llmlab-worker.sh start nano llmlab train 'my experiments/a $b.py' --prompt 'it'\\''s $HOME'"
        " --out gs://bucket/runs/nano"
    )
