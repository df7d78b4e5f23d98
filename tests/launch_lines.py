"""Command lines of `launch/cluster.py` that several tests use."""

TRAIN = ("--", "train", "--config=train_dmd", "--config.out=gs://bucket/run")
# Each must arrive unchanged, and run nothing.
HOSTILE = (
    "--config.prompt=a; touch pwned",
    "--config.out=gs://runs/$(touch pwned)/`touch pwned`",
    '--config.weights=it\'s "here" & there | > pwned',
    "--x=$HOME $$ $(JOB_COMPLETION_INDEX) ${PATH} \\ * ? ~ # é 雪",
    "-- --dry_run",
    "",
)
GKE = ("gke", "run", "--name=dmd", "--image=europe-docker.pkg.dev/p/r/anchor-jax:gpu")
TPU = ("--name=dmd", "--zone=us-east5-a")
LINES = {
    "slurm": ("slurm", "--nodes=7", "--partition=h100", *TRAIN),
    "slurm per node": ("slurm", "--nodes=2", "--task_per=node", *TRAIN),
    "gke tpu": (*GKE, "--topology=v5p:4x4x4", *TRAIN),
    "gke gpu": (*GKE, "--topology=h100:7x8", "--claim=disk:/mnt/data", *TRAIN),
    "gke cluster": (
        *("gke", "cluster", "--name=dmd", "--cluster=mine", "--topology=v6e:8x8"),
        *("--spot", "--project=p", "--zone=us-east5-b"),
    ),
    "gke gpu cluster": (
        *("gke", "cluster", "--name=dmd", "--cluster=mine", "--topology=h100:7x8"),
        "--reservation=r1",
    ),
    "gke xpk": (
        *("gke", "xpk", "--name=dmd", "--cluster=mine", "--topology=v6e:8x8"),
        *("--image=a/b:tpu", *TRAIN),
    ),
    "gke logs": ("gke", "logs", "--name=dmd"),
    "gke stop": ("gke", "stop", "--name=dmd"),
    "tpu create": ("tpu", "create", *TPU, "--topology=v5p:4x4x4", "--spot"),
    "tpu plain": ("tpu", "create", *TPU, "--topology=v6e:8x8", "--plain"),
    "tpu setup": ("tpu", "setup", *TPU),
    "tpu run": ("tpu", "run", *TPU, "--internal_ips", *TRAIN),
    "tpu logs": ("tpu", "logs", *TPU, "--worker=3"),
    "tpu stop": ("tpu", "stop", *TPU),
    "tpu delete": ("tpu", "delete", *TPU),
    "ssh run": ("ssh", "run", "--hosts=alpha,me@beta", *TRAIN),
    "ssh stop": ("ssh", "stop", "--hosts=alpha,me@beta"),
}
