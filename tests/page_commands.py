"""Every command of every page: run here, run by another test, or why it is not run.

A command that is in no table fails `test_readme.py`, and so does one that no page has.
"""

PROMPT = (
    "--config.prompt=a red ring moves up on gray[1s] | a blue ring moves up on gray[1s]"
)

RUN = {
    "anchor-jax policies": (),
    "anchor-jax policies anchor_forcing": (),
    "anchor-jax doctor": (),
    "anchor-jax sample --config=configs/tiny.py --out=out/first": (PROMPT,),
    "anchor-jax replay out/first/000.json --check": (),
    'anchor-jax replay out/first/000.json --at=20 --prompt="a blue ring moves up on'
    ' black"': ("--at=6",),
    "anchor-jax sample --config=configs/tiny.py": (PROMPT,),
    "anchor-jax sample --config=configs/tiny.py --config.seed=1": (PROMPT,),
    "anchor-jax sample --config=tiny --seed=1": (PROMPT,),
    "anchor-jax sample --config=tiny --config.enlarge=6": (PROMPT,),
    "anchor-jax sample --config=configs/tiny.py --out=out/mine"
    ' --config.prompt="a red ring moves up on gray[4s] | a green ring moves left on'
    ' gray[6s]"': (),
    "anchor-jax sample --config=configs/tiny.py --config.prompt_file=prompts.txt": (),
    "anchor-jax sample --config=mine.py": (),
    "anchor-jax sample --config=configs/tiny.py:longlive": (PROMPT,),
    "anchor-jax sample --config=tiny:longlive": (PROMPT,),
    "anchor-jax sample --config=mine.py:longlive --config.seed=1": (),
    "anchor-jax compare --config=configs/tiny.py --policies=anchor_forcing,longlive": (
        PROMPT,
    ),
    "anchor-jax sample --config=configs/tiny.py:longlive --config.rope=bounded"
    " --config.on_switch=flush": (PROMPT,),
    "anchor-jax score --config=configs/tiny.py"
    " --metrics=temporal_flickering,world_match": (
        *("--count=2", "--batch=2", "--blocks=1"),
    ),
}
"""Commands with the flags that are added, in their order in one folder.

Segments of a prompt are cut to one second.
"""

_BENCH = "anchor-jax bench --config=configs/bench_medium.py --threads=1"

_BUCKET = "cli/test_buckets.py::test_a_run_in_a_bucket_resumes_and_is_sampled"
ELSEWHERE = {
    "anchor-jax train --config=configs/train_teacher.py"
    " --config.out=gs://my-bucket/runs/teacher"
    " --config.data.cache=/tmp/data": _BUCKET,
    "anchor-jax sample --config=configs/tiny.py"
    " --config.weights=gs://my-bucket/runs/teacher": _BUCKET,
    _BENCH: "perf/test_stream_bench.py::test_latencies_and_sizes_are_reported",
    f"{_BENCH} --out=bench.json": (
        "perf/test_stream_bench.py::test_every_program_is_traced_once"
    ),
    "anchor-jax verify tests/golden": "verify/test_verify.py::test_recorded_cases_pass",
    "anchor-jax export --weights=weights/anchor --out=export --layout=diffusers": (
        "cli/test_port.py::test_port_and_export"
    ),
    "anchor-jax plan --config=configs/train_streaming.py --config.batch=56"
    ' --config.mesh="(7,8,1,1)" --topology=h100:7x8,a100:7x8 --price=2.5 --nocompile': (
        "perf/test_train_plan.py::test_the_command_says_time_and_cost_beside_the_papers"
    ),
    "anchor-jax plan --config=configs/train_dmd.py --topology=v6e:8x8 --sweep": (
        "perf/test_train_sweep.py::test_the_command_ranks_and_plans_the_best_three"
    ),
    "python launch/chip_plans.py --nocompile": (
        "test_results.py::test_a_plan_is_kept_with_its_command"
    ),
    "touch OUT/profile": (
        "training/watch/test_profiles.py::test_the_file_makes_a_profile_once"
    ),
    "kill -USR1 PID": (
        "training/watch/test_profiles.py"
        "::test_a_signal_makes_a_profile_that_can_be_opened"
    ),
    "launch/tiny_ladder.sh runs/ladder": (
        "test_ladder.py::test_each_stage_begins_with_an_earlier_one"
    ),
}
"""Commands that another test runs, smaller or with stand-ins."""

_CLUSTER = "python launch/cluster.py "
_V5P = " --name=long --topology=v5p:4x4x4"
_IMAGE = "us-docker.pkg.dev/my-project/images/anchor-jax"
_ZONE = " --name=long --zone=us-east5-a"
_HOSTS = " --hosts=alpha,me@beta"
_LONG = (
    " -- train --config=train_streaming --config.rules=release"
    "{batch} --config.weights={0}/anchor --config.teacher={0}/wan14b"
    " --config.critic={0}/wan"
).format
_PROMPTS = " --config.data.path=gs://bucket/prompts.txt --config.data.cache=/tmp/data"
_DMD = (
    " -- train --config=train_dmd{batch} --config.weights={0}/causal"
    " --config.teacher={0}/wan14b --config.critic={0}/wan --config.out={1}/dmd"
).format
_56 = " --config.batch=56"

ELSEWHERE |= {
    _CLUSTER + line: "launch/test_cluster.py::test_a_command_of_the_page"
    for line in (
        "slurm --nodes=7 --partition=h100"
        + _LONG("/shared/weights", batch=_56)
        + " --config.data.path=/shared/prompts.txt --config.out=/shared/runs/long",
        "slurm --nodes=8 -- sample --config=interactive"
        " --config.weights=/shared/anchor --config.prompt_file=/shared/prompts.jsonl"
        " --out=/shared/batch",
        "gke cluster --name=long --cluster=mine --topology=v5p:4x4x4"
        " --project=my-project --zone=us-east5-a --reservation=my-reservation",
        f"gke run{_V5P} --image={_IMAGE}:tpu --service_account=trainer"
        + _LONG("gs://bucket", batch="")
        + " --config.out=gs://bucket/long"
        + _PROMPTS,
        f"gke run --name=long --topology=h100:7x8 --image={_IMAGE}:gpu"
        " --claim=shared:/mnt/shared"
        + _DMD("/mnt/shared", "/mnt/shared", batch=_56)
        + " --config.data.path=/mnt/shared/prompts.txt",
        "gke logs --name=long",
        "gke stop --name=long",
        f"gke xpk --name=long --cluster=mine --topology=v6e:8x8 --image={_IMAGE}:tpu"
        + _DMD("gs://bucket", "gs://bucket", batch="")
        + _PROMPTS,
        f"tpu create{_ZONE} --topology=v5p:4x4x4 --spot",
        f"tpu setup{_ZONE}",
        f"tpu run{_ZONE}" + _DMD("gs://bucket", "gs://bucket", batch="") + _PROMPTS,
        f"tpu logs{_ZONE}",
        f"tpu stop{_ZONE}",
        f"tpu delete{_ZONE}",
        f"ssh run{_HOSTS} --coordinator=10.0.0.1:8476 --directory=/shared/work"
        " --program=/shared/venv/bin/anchor-jax"
        + _DMD("weights", "runs", batch="")
        + " --config.data.path=prompts.txt",
        f"ssh logs{_HOSTS}",
        f"ssh stop{_HOSTS}",
    )
}
_BUILD = "docker build --file=launch/Dockerfile --target="

_PUBLISHED = "needs published weights (3 to 57 GB)"
_ACCELERATOR = "needs an accelerator"
_ENGINE = "needs a container engine; tests/launch/test_images.py reads the file"
_NODES = "needs the shared disk of a cluster"
_GOOGLE = "needs a project of Google Cloud"
_TWO_HOSTS = "needs two hosts; cli/test_jobs.py runs two processes on one"
_SHARED = "needs several hosts; cli/test_shared_jobs.py runs two processes on one"
_COMPILER = "needs the compiler of a TPU or GPU, and minutes"
_HOURS = "trains for minutes to hours; tests/cli and tests/training run short ones"
_MINUTES = "takes minutes; the command runs in another test with smaller sizes"
_MATRIX = (
    "takes 20 to 70 minutes; tests/training runs some meshes, tests/cli two processes"
)
_LADDER = (
    " --config.weights=launch/ladder/guided --config.teacher=launch/ladder/teacher"
)
_TRAIN = "anchor-jax train --config=configs/"
_OTHERS = (
    " --config.teacher=/shared/wan14b --config.critic=/shared/wan"
    " --config.data.path=/shared/prompts.txt --config.out=/shared/dmd"
)
_PORT = "anchor-jax port --wan=Wan2.1-T2V-1.3B "
_RED_FIVE = ' --config.prompt="a red square moves left on black[5s]"'

NOT_RUN = {
    "anchor-jax port --wan=Wan2.1-T2V-14B --out=weights/wan14b": _PUBLISHED,
    f"{_PORT}--out=weights/wan": _PUBLISHED,
    f"{_PORT}--generator=base.pt --lora=final.pt --method=anchor_forcing"
    " --out=weights/anchor": _PUBLISHED,
    f"{_PORT}--generator=self_forcing_dmd.pt --method=self_forcing"
    " --out=weights/self_forcing": _PUBLISHED,
    f"{_PORT}--generator=longlive_base.pt --lora=lora.pt --method=longlive"
    " --out=weights/longlive": _PUBLISHED,
    "anchor-jax sample --config=configs/interactive.py"
    " --config.weights=weights/anchor": _PUBLISHED,
    f"{_TRAIN}train_finetune.py --config.weights=weights/wan"
    " --config.data.path=videos/list.jsonl --config.out=runs/mine": _PUBLISHED,
    "anchor-jax sample --config=configs/interactive.py --config.weights=runs/mine"
    ' --config.prompt="a red fox in the snow[5s]"': _PUBLISHED,
    f"{_TRAIN}train_streaming.py --config.rules=release"
    " --config.weights=weights/anchor --config.teacher=weights/wan14b"
    " --config.critic=weights/wan --config.data.path=prompts.txt"
    " --config.data.switch_path=switched.txt --config.out=runs/anchor": _PUBLISHED,
    "anchor-jax sample --config=configs/interactive.py"
    " --config.weights=runs/anchor": _PUBLISHED,
    f"{_TRAIN}train_dmd.py:tiny{_LADDER} --config.steps=10"
    " --config.out=runs/try": _HOURS,
    f"anchor-jax sample --config=configs/interactive.py --config.weights=runs/try"
    f"{_RED_FIVE}": _HOURS,
    f"anchor-jax train --config=train_dmd:tiny --dry_run{_LADDER}"
    " --config.optimizer.learning_rate=5e-5": _HOURS,
    f"{_TRAIN}train_teacher.py --config.out=runs/teacher6": _HOURS,
    f"{_TRAIN}train_teacher.py:21 --config.weights=runs/teacher6"
    " --config.out=runs/teacher21": _HOURS,
    f"{_TRAIN}train_teacher.py:more --config.weights=runs/teacher21"
    " --config.out=runs/teacher": _HOURS,
    f"{_TRAIN}train_causal.py --config.weights=runs/teacher"
    " --config.out=runs/causal": _HOURS,
    f"{_TRAIN}train_causal.py:guided --config.weights=runs/causal"
    " --config.teacher=runs/causal --config.out=runs/guided": _HOURS,
    f"{_TRAIN}train_dmd.py:tiny --config.out=runs/dmd": _HOURS,
    f"{_TRAIN}train_streaming.py:tiny --config.out=runs/streaming": _HOURS,
    "anchor-jax sample --config=configs/tiny.py"
    " --config.weights=runs/streaming": _HOURS,
    "anchor-jax trajectories --config=configs/trajectories.py"
    " --config.weights=runs/teacher": _HOURS,
    "anchor-jax trajectories --config=configs/trajectories.py"
    " --config.weights=runs/teacher --process=0 --processes=8": _HOURS,
    f"{_TRAIN}train_ode.py:tiny --config.out=runs/causal_ode": _HOURS,
    f"anchor-jax sweep --config=configs/train_dmd.py:tiny --config.steps=100{_LADDER}"
    " --vary=optimizer.learning_rate=5e-5,1e-4 --config.out=runs/sweep": _HOURS,
    "anchor-jax sweep --config=configs/train_dmd.py:tiny --config.out=runs/steps"
    f"{_LADDER} --vary=optimizer.learning_rate=5e-5,1e-4"
    ' --vary="distillation.steps=(1000,500),(1000,750,500,250)"': _HOURS,
    "anchor-jax ablate --config=configs/tiny.py": _HOURS,
    "anchor-jax ablate --config=configs/tiny.py --part=trained --steps=700"
    " --out=runs/arms --config.weights=launch/ladder/dmd"
    " --teacher=launch/ladder/teacher": _HOURS,
    "anchor-jax score --config=configs/tiny.py --count=240": _MINUTES,
    "anchor-jax verify tests/golden --dtype=bfloat16": _MINUTES,
    "anchor-jax bench --config=configs/train_dmd.py:tiny --threads=1"
    " --config.weights=launch/ladder/causal"
    " --config.teacher=launch/ladder/teacher": _MINUTES,
    "anchor-jax bench --config=configs/bench_full.py": _ACCELERATOR,
    "anchor-jax plan --target=v5e": _COMPILER,
    'anchor-jax plan --config=configs/train_dmd.py --config.mesh="(4,16,1,1)"'
    " --target=h100 --chips=64 --remat=none,nothing_saveable": _COMPILER,
    "sbatch --nodes=7 launch/clusters/slurm.sbatch train --config=train_dmd"
    " --config.batch=56 --config.weights=/shared/weights/causal"
    " --config.teacher=/shared/weights/wan14b --config.critic=/shared/weights/wan"
    " --config.data.path=/shared/prompts.txt --config.out=/shared/runs/dmd": (
        "needs Slurm; tests/launch/test_slurm.py runs the script in a simulated job"
    ),
    "anchor-jax plan --config=train_dmd --config.batch=56 --topology=h100:7x8"
    " --nocompile": "tests/perf/test_train_plan.py runs it with another config",
    "python3.11 -m venv /shared/venv": _NODES,
    "/shared/venv/bin/pip install '.[gpu,train]'": _NODES,
    "export ANCHOR_JAX=/shared/venv/bin/anchor-jax": _NODES,
    "gcloud container clusters describe mine --location=us-east5"
    ' --format="value(networkConfig.datapathProvider)"': _GOOGLE,
    "gcloud storage cp --recursive weights/causal weights/wan14b weights/wan"
    " gs://bucket": _GOOGLE,
    "gcloud storage cp prompts.txt gs://bucket": _GOOGLE,
    "gcloud compute tpus tpu-vm ssh long --zone=us-east5-a --worker=3"
    """ --command='kill -USR1 "$(cat anchor_jax_jobs/long/"$(uname -n)"/pid)"'""": (
        _GOOGLE
    ),
    f"{_BUILD}gpu --tag={_IMAGE}:gpu .": _ENGINE,
    f"{_BUILD}tpu --tag={_IMAGE}:tpu .": _ENGINE,
    f"docker push {_IMAGE}:gpu": _ENGINE,
    f"docker run --gpus=all --shm-size=8g {_IMAGE}:gpu doctor": _ENGINE,
    "python launch/endurance.py --blocks=2000": _MINUTES,
    "python launch/two_jobs.py --commands=sample,train --times=20": _HOURS,
    "python launch/interrupts.py --presses=60": _HOURS,
    "python launch/kill_training.py --kills=7": _HOURS,
    "python launch/kill_processes.py --sigterms=20 --kills=20 --stops=5"
    " --resumes=50": _HOURS,
    "python launch/kill_samples.py --videos=30 --processes=3": _MINUTES,
    "anchor-jax sample --config=configs/interactive.py --config.weights=/shared/anchor"
    " --config.prompt_file=prompts.jsonl --out=/shared/batch"
    " --coordinator=10.0.0.1:1234 --num_processes=3 --process_id=0": _SHARED,
    f"{_TRAIN}train_dmd.py --config.weights=/shared/causal{_OTHERS}"
    " --coordinator=10.0.0.1:1234 --num_processes=2 --process_id=0": _TWO_HOSTS,
    f"{_TRAIN}train_dmd.py --config.weights=/shared/causal{_OTHERS}"
    " --coordinator=10.0.0.1:1234 --num_processes=2 --process_id=1": _TWO_HOSTS,
    "python launch/process_matrix.py": _MATRIX,
    "python launch/mesh_matrix.py": _MATRIX,
    "python launch/fuzz.py --count=10000": _MINUTES,
    "python launch/port_memory.py --folder=scratch": "needs 23 GB of disk",
    "python launch/result_pages.py record stream_1_thread bench.json"
    ' "anchor-jax bench --config=configs/bench_medium.py --threads=1"': (
        "changes the checkout; tests/test_results.py runs it in a folder"
    ),
}
"""Commands that no test runs as they stand, with the reason.

Their flags and configs are read by the commands' own parsers.
"""

TOOLS = ("pip install", "python -m pytest", "ruff", ".ci/run")
"""First words of commands that install the package or run the tests themselves."""
