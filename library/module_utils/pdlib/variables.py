"""Every public variable: its type, default, unit and meaning, in one place.

``docs/variables.md`` is made from this table; extra-vars and inventories are checked against it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Dict, Tuple

from .transfer import BUILDS
from .transfer_table import KNOBS

CLUSTER, HOST, BENCH, VERB = "cluster", "host", "bench", "verb"

#: What one router or another can do; which one has which stands in routers.py.
POLICIES = (
    *("random", "round_robin", "cache_aware", "power_of_two", "least_load", "manual", "passthrough"),
    *("consistent_hashing", "prefix_hash", "consistent_hash", "sticky_least_loaded"),
)

SCOPES = {
    CLUSTER: "The deployment: one value for all hosts (`group_vars/all.yml`, the inventory's `all: vars:`, or `-e`).",
    HOST: "Per host, group or for all: a value of its own for every host (`host_vars/`, group vars, or `-e`).",
    BENCH: "The load that `bench.yml` sends.",
    VERB: "Arguments of one command, given with `-e`.",
}


@dataclass(frozen=True)
class Variable:
    """One variable that a user may set.

    ``type``: str, int, float, bool, list (comma-separated text is one, too), dict, ints (list of int), gpus (a count,
    a list of indices, or ``auto``), span (``512`` or ``256-1024``), networks (a list of IP addresses and networks), ports (a list
    of ports and ranges). A default of None means "not set"; ``otherwise``: what the
    engine does then. ``env``: the environment variable that it becomes, as it is.
    """

    name: str
    type: str
    default: Any
    scope: str
    doc: str
    choices: Tuple[str, ...] = ()
    minimum: Any = None
    maximum: Any = None
    unit: str = ""
    secret: bool = False
    otherwise: str = ""
    env: str = ""


def _table() -> Dict[str, Variable]:
    v = Variable
    rows = [
        # -- the deployment
        v(
            "ratio",
            "str",
            "1p1d",
            CLUSTER,
            "Workers of each role: `3p1d`, `agg` (one aggregated worker) or `4agg`; for `bench.yml`, `auto`, too.",
        ),
        v("engine", "str", "sglang", CLUSTER, "The engine; `emulated` needs no GPU and says so everywhere."),
        v("engine_version", "str", None, CLUSTER, "The engine's version; not set: the engine's default."),
        v("model", "str", None, CLUSTER, "Model path or hub name, as the engine takes it."),
        v(
            "model_source",
            "str",
            "path",
            CLUSTER,
            "`path`: hosts have the model (or the engine downloads a hub name); `hub`: downloaded before the engine starts; "
            "`rsync`: hosts without it get it from the first host that has it.",
            choices=("path", "hub", "rsync"),
        ),
        v("model_revision", "str", None, CLUSTER, "With `model_source: hub`: a commit, tag or branch; not set: the newest."),
        v(
            "model_sha256",
            "str",
            None,
            CLUSTER,
            "The model's checksum, which hosts must agree with (docs/hosts.md says how it is made).",
        ),
        v("model_endpoint", "str", None, CLUSTER, "With `model_source: hub`: a mirror's URL."),
        v(
            "hf_token",
            "str",
            None,
            CLUSTER,
            "The hub's token (vault, or a lookup of a file), with `model_source: hub` and where the engine downloads the model.",
            secret=True,
        ),
        v("served_model_name", "str", None, CLUSTER, "Name in requests; not set: the value of `model`."),
        v("tensor_parallel_size", "int", 1, CLUSTER, "GPUs of one worker, over all its hosts.", minimum=1),
        v("prefill_tensor_parallel_size", "int", None, CLUSTER, "The same for prefill workers only.", minimum=1),
        v("decode_tensor_parallel_size", "int", None, CLUSTER, "The same for decode workers only.", minimum=1),
        v("nodes_per_worker", "int", 1, CLUSTER, "Whole hosts of one worker (multi-node).", minimum=1),
        v("prefill_nodes_per_worker", "int", None, CLUSTER, "The same for prefill workers only.", minimum=1),
        v("decode_nodes_per_worker", "int", None, CLUSTER, "The same for decode workers only.", minimum=1),
        v(
            "transfer_backend",
            "str",
            "auto",
            CLUSTER,
            "KV transfer engine. `auto`: nixl when every pair is on one host, mooncake on one RDMA fabric, else nixl over TCP.",
        ),
        v("worker_port_base", "int", 30000, CLUSTER, "First HTTP port of workers on a host.", minimum=1, maximum=65535),
        v("prefill_worker_port_base", "int", None, CLUSTER, "The same for prefill workers only.", minimum=1, maximum=65535),
        v("decode_worker_port_base", "int", None, CLUSTER, "The same for decode workers only.", minimum=1, maximum=65535),
        v(
            "bootstrap_port_base",
            "int",
            8998,
            CLUSTER,
            "First KV bootstrap port of prefill workers on a host.",
            minimum=1,
            maximum=65535,
        ),
        v(
            "side_channel_port_base",
            "int",
            5600,
            CLUSTER,
            "First port at which vLLM workers of a host tell each other where their KV cache lies.",
            minimum=1,
            maximum=65535,
        ),
        v("dist_init_port_base", "int", 5757, CLUSTER, "First rendezvous port of multi-node workers.", minimum=1, maximum=65535),
        v(
            "api_key",
            "str",
            None,
            CLUSTER,
            "Key that clients, router and workers share: from a vault, or `generate` for one of ours; not set: `PD_API_KEY` of the "
            "controller's environment, if any (docs/security.md).",
            secret=True,
        ),
        v(
            "admin_api_key",
            "str",
            None,
            CLUSTER,
            "Key that workers want, and no other, for slow_down, profiles, caches and roles: likewise, or `PD_ADMIN_API_KEY`.",
            secret=True,
        ),
        v("ready_timeout", "int", 1800, CLUSTER, "Longest wait for workers and router to become ready.", minimum=1, unit="s"),
        v(
            "router",
            "str",
            "sglang-router",
            CLUSTER,
            "The router in front of the workers: `sglang-router`, `smg`, `vllm-router`, or for debugging `mini-lb`.",
        ),
        v(
            "router_tls_cert",
            "str",
            None,
            CLUSTER,
            "The router speaks HTTPS with this certificate: a PEM file of the controller, relative to the checkout, that names the "
            "router's `address` (docs/security.md).",
        ),
        v("router_tls_key", "str", None, CLUSTER, "Its private key: a PEM file (0600) of the controller, or one in a vault."),
        v(
            "router_tls_ca",
            "str",
            None,
            CLUSTER,
            "What clients of ours trust: a PEM file of the controller; not set: `router_tls_cert`, which is then its own CA.",
        ),
        v("router_port", "int", 8000, CLUSTER, "The router's port for clients.", minimum=1, maximum=65535),
        v("router_prometheus_port", "int", 29000, CLUSTER, "The router's metrics port.", minimum=1, maximum=65535),
        v("router_policy", "str", "round_robin", CLUSTER, "How the router chooses a worker.", choices=POLICIES),
        v("router_prefill_policy", "str", None, CLUSTER, "The same for prefill workers only.", choices=(*POLICIES, "bucket")),
        v(
            "router_decode_policy",
            "str",
            None,
            CLUSTER,
            "The same for decode workers only. With equal counts round_robin on both sides uses only some of the pairs.",
            choices=POLICIES,
        ),
        v("router_health_check_interval", "int", 5, CLUSTER, "Between the router's checks of a worker.", minimum=1, unit="s"),
        v("router_args", "dict", {}, CLUSTER, "More flags of the router: `{request-timeout-secs: 600}`."),
        v(
            "firewall_clients",
            "networks",
            [],
            CLUSTER,
            "With `firewall`: who may reach the router, beside `bench_clients`: `[10.0.0.0/16]`.",
        ),
        v(
            "firewall_monitors",
            "networks",
            [],
            CLUSTER,
            "With `firewall`: who may reach the HTTP ports of workers and the router's metrics, beside `bench_clients` (Prometheus).",
        ),
        # -- hosts
        v("address", "str", None, HOST, "The IPv4 address at which the other hosts reach this one."),
        v("listen_address", "str", None, HOST, "What workers and router bind to; not set: `address`."),
        v(
            "firewall",
            "bool",
            False,
            HOST,
            "An nftables table of our own lets only hosts of the plan open connections to workers and router (docs/security.md).",
        ),
        v(
            "firewall_spared_ports",
            "ports",
            [],
            HOST,
            "With `firewall`: ports of other programs in the ranges that engines take ports from, open as before: `[32803, 50051-50060]`.",
        ),
        v(
            "gpus",
            "gpus",
            None,
            HOST,
            "GPUs lent to the deployment: a count, a list of indices (as nvidia-smi counts), or `auto` (found at deploy).",
        ),
        v("prefill_gpus", "ints", None, HOST, "The indices that prefill workers may use; not set: all of `gpus`."),
        v("decode_gpus", "ints", None, HOST, "The indices that decode workers may use; not set: all of `gpus`."),
        v(
            "gpus_shared",
            "bool",
            False,
            HOST,
            "Let a prefill and a decode worker share GPUs by memory fraction (`mem_fraction` of both at most 1 together).",
        ),
        v("rdma_fabric", "str", "auto", HOST, "The RDMA fabric of the host.", choices=("infiniband", "roce", "none", "auto")),
        v("rdma_devices", "list", None, HOST, "RDMA devices to use: `[mlx5_0, mlx5_1]`; not set: found at deploy."),
        v("rdma_devices_excluded", "list", [], HOST, "All active RDMA devices of the fabric but these: `[mlx5_2]`."),
        v("rdma_device_per_gpu", "bool", False, HOST, "Mooncake: give each GPU its nearest RDMA devices only, not all of them."),
        v("rdma_gid_index", "int", None, HOST, "RoCE: the GID index; not set: the RoCE v2 one found at deploy.", minimum=0),
        v(
            "tcp_device",
            "str",
            None,
            HOST,
            "Network device of KV transfers over TCP (UCX_NET_DEVICES); not set: the one that has `address`, found at deploy.",
        ),
        v("mem_fraction", "float", None, HOST, "Share of GPU memory for weights and KV cache.", minimum=0.01, maximum=1.0),
        v("engine_args", "dict", {}, HOST, "More engine flags, checked against the engine's own: `{page-size: 16}`."),
        v("prefill_engine_args", "dict", {}, HOST, "The same for prefill workers only."),
        v("decode_engine_args", "dict", {}, HOST, "The same for decode workers only."),
        v("engine_env", "dict", {}, HOST, "Environment of workers."),
        v("prefill_engine_env", "dict", {}, HOST, "The same for prefill workers only."),
        v("decode_engine_env", "dict", {}, HOST, "The same for decode workers only."),
        v(
            "engine_files",
            "list",
            [],
            HOST,
            "Files of the controller, relative to the checkout, for `engine_args` to name: `[files/experts.json]` and "
            "`{init-expert-location: experts.json}`.",
        ),
        v(
            "cache_dir",
            "str",
            None,
            HOST,
            "Where engines keep kernels that they compile on the host; not set: their own places. Made where it is not there, and then "
            "`teardown.yml -e purge=true` removes it; one that was there stays.",
        ),
        v("emulated_profile", "str", "tiny", HOST, "Performance profile of an emulated worker: a name or a file."),
        v(
            "runtime",
            "str",
            "venv",
            HOST,
            "`venv`: made by us from locked requirements; `existing`: `engine_python` as it is; `docker`, `podman`: `engine_image`.",
            choices=("venv", "existing", "docker", "podman"),
        ),
        v(
            "engine_python",
            "str",
            None,
            HOST,
            "The Python that has the engine: with `existing` a path, or the folder of its environment; in an image `python3`.",
        ),
        v(
            "engine_image",
            "str",
            None,
            HOST,
            "With `docker` or `podman`: the image by tag and digest: `lmsysorg/sglang:v0.5.23@sha256:...`.",
        ),
        v(
            "engine_image_archive",
            "str",
            None,
            HOST,
            "A file of `docker save` on the controller, relative to the checkout, for hosts that pull nothing; it pins the image.",
        ),
        v(
            "engine_image_min_free_gb",
            "float",
            50.0,
            HOST,
            "Free disk that must be there before an image is pulled or loaded.",
            minimum=0.0,
            unit="GB",
        ),
        v(
            "engine_shm_size",
            "str",
            None,
            HOST,
            "Shared memory of a container's own, such as `32g`; not set: the host's, which CUDA IPC between workers needs.",
        ),
        v("engine_container_args", "list", [], HOST, "More options of `docker run`: `[--device, /dev/gdrdrv]`."),
        v(
            "engine_requirements",
            "list",
            None,
            HOST,
            "Requirement files of the engine's virtualenv, installed in turn; `no-deps:FILE` leaves dependencies out.",
        ),
        v(
            "engine_build",
            "str",
            "auto",
            HOST,
            "What the engine in `engine_requirements` is built for: the transfer engines that fit it are installed beside it. `auto`: "
            "what our own locks are for (CUDA 13); to files of yours nothing is added (docs/fabric.md).",
            choices=("auto", *BUILDS),
        ),
        v(
            "nixl_source",
            "str",
            None,
            HOST,
            "Folder on the host with NIXL's sources: built against `ucx_prefix`, instead of a wheel.",
        ),
        v("ucx_prefix", "str", None, HOST, "What UCX was installed to on the host: `/opt/ucx`, with its `include` and `lib`."),
        *(v(k.name, k.type, None, HOST, k.doc, k.choices, k.minimum, unit=k.unit, otherwise=k.default, env=k.env) for k in KNOBS),
        v("venv_python", "str", None, HOST, "Python that makes virtualenvs on the host; not set: the one Ansible uses there."),
        v(
            "service_manager",
            "str",
            "auto",
            HOST,
            "`auto`: systemd where it is PID 1 and we may become root, else supervisord.",
            choices=("auto", "systemd", "supervisord"),
        ),
        v(
            "service_user",
            "str",
            "pd",
            HOST,
            "Under systemd: who services and load generator run as; made where it does not exist. supervisord: who deploys.",
        ),
        v(
            "wheelhouse",
            "bool",
            False,
            HOST,
            "The host reaches no package registry: the controller fetches the wheels for its Python and machine, and pushes them.",
        ),
        v("model_dir", "str", "/var/lib/pd-models", HOST, "Where downloaded models go; nothing of ours ever deletes them."),
        v("install_dir", "str", "/opt/pd", HOST, "Virtualenvs and wheels; teardown leaves them, purge does not."),
        v("state_dir", "str", "/var/lib/pd", HOST, "Configuration, logs, sockets and records; teardown removes it."),
        # -- load
        v("bench_api", "str", "completions", BENCH, "Endpoint to load.", choices=("completions", "chat", "generate")),
        v("bench_concurrency", "ints", [32], BENCH, "Requests in flight, one load point each: `32,64,128`.", minimum=1),
        v("bench_request_rate", "list", None, BENCH, "Open loop instead: requests a second, one load point each.", unit="1/s"),
        v(
            "bench_arrival",
            "str",
            "poisson",
            BENCH,
            "Arrivals of the open loop: `poisson`, `constant`, or `gamma:B` with burstiness B (below 1 comes in bursts).",
        ),
        v("bench_batch", "ints", None, BENCH, "One batch instead: so many requests at once, one load point each.", minimum=1),
        v("bench_num_requests", "int", 200, BENCH, "Requests of a load point.", minimum=1),
        v(
            "bench_duration",
            "float",
            None,
            BENCH,
            "Of an open loop, instead: the requests that are due in this time.",
            minimum=0.001,
            unit="s",
        ),
        v(
            "bench_input_len",
            "span",
            "512",
            BENCH,
            "Prompt length: `512`, uniform `256-1024`, and more (docs/load.md).",
            unit="tokens",
        ),
        v("bench_output_len", "span", "128", BENCH, "Output length, forced; written as `bench_input_len`.", unit="tokens"),
        v("bench_prefix_len", "int", None, BENCH, "A system prompt of this length before all prompts.", minimum=1, unit="tokens"),
        v("bench_trace", "str", None, BENCH, "Lengths from a trace in Mooncake's format (a file on the controller)."),
        v(
            "bench_time_scale",
            "float",
            None,
            BENCH,
            "Send at the trace's own times, multiplied by this (0.5: twice as fast).",
            minimum=0.000001,
        ),
        v("bench_share_prefixes", "bool", False, BENCH, "Prompts share the prefixes that the trace's `hash_ids` name."),
        v("bench_length_scale", "float", 1.0, BENCH, "Factor on the trace's lengths, for a smaller context.", minimum=0.0001),
        v(
            "bench_max_input_len",
            "int",
            None,
            BENCH,
            "Cut longer prompts at this (those of `bench_dataset` are left out).",
            minimum=1,
            unit="tokens",
        ),
        v("bench_max_output_len", "int", None, BENCH, "Cut longer outputs at this.", minimum=1, unit="tokens"),
        v(
            "bench_dataset",
            "str",
            None,
            BENCH,
            "Prompts from a file on the controller: JSON lines, or ShareGPT (docs/load.md); it says how long outputs are.",
        ),
        v(
            "bench_tokenizer",
            "str",
            None,
            BENCH,
            "The model's `tokenizer.json`, or a folder with it, on the controller: lengths of text are exact.",
        ),
        v(
            "bench_load",
            "dict",
            {},
            BENCH,
            "What no other variable says (stages, ramps, conversations): the keys of a load file (docs/load.md).",
        ),
        v("bench_warmup", "int", None, BENCH, "Requests before each load point that are not measured.", minimum=0),
        v("bench_seed", "int", 1, BENCH, "Seed of prompts, lengths and arrivals.", minimum=0),
        v(
            "bench_verify_outputs",
            "int",
            0,
            BENCH,
            "Before the first load point, check with so many prompts over every prefill-decode pair that the KV cache arrives "
            "right; 0: do not. 8 take seconds.",
            minimum=0,
        ),
        v(
            "bench_selfcheck",
            "bool",
            True,
            BENCH,
            "Calibrate the load generator before the load: some seconds on the client host against a server of known timing "
            "(docs/validity.md).",
        ),
        v(
            "bench_stop_saturated",
            "bool",
            False,
            BENCH,
            "Of a list of `bench_request_rate`, measure none above the first that is over-saturated.",
        ),
        v(
            "bench_meet_port",
            "int",
            8890,
            BENCH,
            "Port at which the first of several `bench_clients` listens to the others, on its `address` alone.",
            minimum=1,
            maximum=65535,
        ),
        v("bench_timeout", "int", 600, BENCH, "Longest time of one request.", minimum=1, unit="s"),
        v(
            "bench_max_error_rate",
            "float",
            0.0,
            BENCH,
            "Share of failed requests a valid run may have.",
            minimum=0.0,
            maximum=1.0,
        ),
        v(
            "bench_max_client_delay_ms",
            "float",
            100.0,
            BENCH,
            "How late the load generator may read and send, p99, in a valid run.",
            minimum=0.001,
            unit="ms",
        ),
        v("bench_min_free_mb", "int", 200, BENCH, "Free disk that must be there for records and results.", minimum=1, unit="MB"),
        v("bench_slo_ttft_ms", "float", None, BENCH, "Goodput: a good request's longest TTFT.", minimum=0.001, unit="ms"),
        v("bench_slo_tpot_ms", "float", None, BENCH, "Goodput: a good request's longest TPOT.", minimum=0.001, unit="ms"),
        v(
            "bench_slo_e2e_ms",
            "float",
            None,
            BENCH,
            "Goodput: a good request's longest end-to-end time.",
            minimum=0.001,
            unit="ms",
        ),
        v(
            "bench_tool",
            "str",
            "pdbench",
            BENCH,
            "`sglang` or `vllm`: their own bench client after pdbench, at the same load points, and its figures beside ours.",
            choices=("pdbench", "sglang", "vllm"),
        ),
        # -- verbs
        v(
            "advise_profile",
            "list",
            [],
            VERB,
            "How fast the GPUs are, for `bench.yml -e ratio=auto`: a profile by name or file, or `HOST=PROFILE,HOST=PROFILE`.",
        ),
        v("run_label", "str", "", VERB, "Words for the run's folder name and report."),
        v("results_dir", "str", "results", VERB, "Where runs go on the controller, relative to the checkout."),
        v(
            "role",
            "str",
            None,
            VERB,
            "Of `profile.yml`, with `-e` only: whose forward steps are recorded.",
            choices=("prefill", "decode"),
        ),
        v("profile_steps", "int", 10, VERB, "`profile.yml`: forward steps to record on every worker of the role.", minimum=1),
        v(
            "profile_slow_down",
            "float",
            5.0,
            VERB,
            "`profile.yml`, role decode: sleep before every step while a batch is gathered; 0: do not.",
            minimum=0.0,
            unit="s",
        ),
        v(
            "profile_batch",
            "int",
            None,
            VERB,
            "`profile.yml`, role decode: requests that every worker gathers; not set: all of the load that fit into it.",
            minimum=1,
        ),
        v("profile_timeout", "int", 600, VERB, "`profile.yml`: for gathering the batch.", minimum=1, unit="s"),
        v(
            "profile_activities",
            "list",
            ["CPU", "GPU"],
            VERB,
            "`profile.yml`: what SGLang records: `CPU` and `GPU` are torch's profiler, `CUDA_PROFILER` starts and stops NVIDIA's.",
        ),
        v("plan_dir", "str", ".pd/plan", VERB, "Where `plan.yml` writes, relative to the checkout."),
        v("current_plan", "str", None, VERB, "A deployed plan.json that `plan.yml` starts from, so that placement is sticky."),
        v(
            "purge",
            "bool",
            False,
            VERB,
            "`teardown.yml` removes virtualenvs, wheels, compiled kernels and the user that we made, too (never model weights).",
        ),
        v(
            "kv_probe",
            "str",
            "auto",
            VERB,
            "Move real bytes between prefill and decode hosts before workers start (docs/fabric.md). `auto`: over paths that no "
            "deploy has tried as they are now; `always`: over all; `report`: as `always`, and what is found stops nothing; `never`.",
            choices=("auto", "always", "report", "never"),
        ),
        v(
            "drain_timeout",
            "int",
            600,
            VERB,
            "Longest wait of `rebalance.yml` for the requests that a worker still has when it leaves the router.",
            minimum=1,
            unit="s",
        ),
        v(
            "steal_lock",
            "bool",
            False,
            VERB,
            "Take over a lock whose command is dead, where this controller cannot tell; `teardown.yml` also takes another deployment off its hosts.",
        ),
        v(
            "manifest",
            "dict",
            {},
            VERB,
            "What a run's manifest.json records beside its variables; only its schema number is looked at.",
        ),
    ]
    return {row.name: row for row in rows}


VARIABLES: Dict[str, Variable] = _table()
#: Names that people give to variables of their own, too: of these only an ``-e`` is meant for us.
ONLY_TYPED = ("role",)
