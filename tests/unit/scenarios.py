"""The old commands of every setup, word for word up to addresses and folders, which are those of our inventories."""

from __future__ import annotations

from dataclasses import dataclass, field

Words = dict[str, str]


@dataclass(frozen=True)
class Case:
    """One setup: the inventory, what is typed behind it, and the old command of every rank ((worker, rank) -> command).

    ``router``: its command, or what it was given; ``transport``: what the KV cache should go over;
    ``extra_flags``/``extra_env``: what the inventory adds to every worker, and the old setup had otherwise.
    """

    name: str
    inventory: str
    typed: tuple[str, ...]
    commands: dict[tuple[str, int], str]
    router: str
    hosts: dict[tuple[str, int], str]
    router_host: str
    backend: str
    transport: str
    extra_flags: Words = field(default_factory=dict)
    extra_env: dict[str, Words] = field(default_factory=dict)
    engine: str = "sglang"


SERVER = "python -m sglang.launch_server"
ROUTER = "python -m sglang_router.launch_router"


def _qwen(port: int, role: str = "", more: str = "") -> str:
    """The servers of the GH200 scripts, from what their configuration says (the scripts themselves are not to be had)."""
    mode = f"--disaggregation-mode {role}" if role else ""
    return f"{SERVER} --model-path Qwen/Qwen2.5-3B-Instruct {mode} --port {port} --mem-fraction-static 0.45 {more}"


def _h200(role: str, number: int, bootstrap: int | None = None) -> str:
    boot = f"--disaggregation-bootstrap-port {bootstrap}" if bootstrap else ""
    return (
        f"CUDA_VISIBLE_DEVICES={2 * number},{2 * number + 1} {SERVER} --model-path openai/gpt-oss-120b"
        f" --disaggregation-mode {role} --disaggregation-transfer-backend nixl --base-gpu-id 0 --tp-size 2"
        f" --port {30000 + number} {boot}"
    )


def _h200_case(prefill: int) -> Case:
    """Prefill workers first, then decode workers, two GPUs each, on ports and bootstrap ports that count up."""
    decode = 4 - prefill
    members = [f"--prefill http://127.0.0.1:{30000 + i} {9000 + i}" for i in range(prefill)]
    members += [f"--decode http://127.0.0.1:{30000 + i}" for i in range(prefill, 4)]
    commands = {(f"prefill-{i}", 0): _h200("prefill", i, 9000 + i) for i in range(prefill)}
    commands |= {(f"decode-{i}", 0): _h200("decode", prefill + i) for i in range(decode)}
    return Case(
        name=f"h200x8-{prefill}p{decode}d", inventory="h200x8", typed=("-e", f"ratio={prefill}p{decode}d"), commands=commands,
        router=f"{ROUTER} --pd-disaggregation {' '.join(members)} --policy round_robin --host 0.0.0.0 --port 8000",
        hosts=dict.fromkeys(commands, "h200"), router_host="h200", backend="nixl", transport="cuda_ipc",
    )  # fmt: skip


def _r1(role: str, nodes: int, rank: int, flags_of_role: str, env: str = "") -> str:
    master = "192.0.2.80" if role == "prefill" else "192.0.2.83"
    return (
        f"{env} MC_TE_METRIC=true SGLANG_TBO_DEBUG=1 python3 -m sglang.launch_server --model-path /ssd/DeepSeek-R1"
        f" --disaggregation-ib-device mlx5_0,mlx5_1,mlx5_3,mlx5_4 --disaggregation-mode {role} --dist-init-addr {master}:5757"
        f" --nnodes {nodes} --node-rank {rank} --tp-size {8 * nodes} --dp-size {8 * nodes} --enable-dp-attention"
        " --decode-log-interval 1 --enable-deepep-moe --page-size 1 --host 0.0.0.0 --trust-remote-code --moe-dense-tp-size 1"
        f" --enable-dp-lm-head --disable-radix-cache --watchdog-timeout 1000000 {flags_of_role}"
    )


_MASK = "NVSHMEM_HCA_LIST=mlx5_0,mlx5_1,mlx5_3,mlx5_4"
_R1_PREFILL = (
    "--deepep-mode normal --mem-fraction-static 0.85 --chunked-prefill-size 393216 --max-running-requests 6144"
    " --max-total-tokens 131072 --context-length 8192 --enable-two-batch-overlap --ep-num-redundant-experts 32"
    " --ep-dispatch-algorithm dynamic --eplb-algorithm deepseek"
    " --init-expert-location /ssd/attachment_ep_statistics/prefill_in4096.json"
)
_R1_DECODE = (
    "--disable-overlap-schedule --deepep-mode low_latency --mem-fraction-static 0.835 --max-running-requests 2048"
    " --context-length 4500 --cuda-graph-bs 256"
)
_R1_LB = "python3 -m sglang.srt.disaggregation.mini_lb --prefill http://192.0.2.80:30000 --decode http://192.0.2.83:30000"
_R1_REVERSE_PREFILL = (
    "--deepep-mode normal --mem-fraction-static 0.85 --chunked-prefill-size 131072 --max-running-requests 2048"
    " --max-total-tokens 131072 --context-length 8192 --disable-overlap-schedule"
)
_R1_REVERSE_DECODE = (
    "--enable-two-batch-overlap --deepep-mode low_latency --mem-fraction-static 0.8 --max-running-requests 6144"
    " --context-length 4500 --cuda-graph-bs 128 --ep-num-redundant-experts 32"
)
#: The same mask for NCCL, which the old commands left to itself on workers of several hosts.
_NCCL = {"NCCL_IB_HCA": "=mlx5_0:1,mlx5_1:1,mlx5_3:1,mlx5_4:1"}
#: The fork that was used has the number of layers in its code.
_LAYERS = {"--json-model-override-args": '{"num_hidden_layers":20}'}


def _llama(role: str, how: str) -> str:
    gpu = "--base-gpu-id 1" if role == "decode" else ""
    port = 30000 if role == "prefill" else 30001
    return f"{SERVER} --model-path meta-llama/Llama-3.1-8B-Instruct --disaggregation-mode {role} --port {port} {gpu} {how}"


def _llama_case(name: str, how: str, backend: str, transport: str) -> Case:
    commands = {(f"{role}-0", 0): _llama(role, how) for role in ("prefill", "decode")}
    return Case(
        name=f"llama-{name}", inventory="llama-single-node", typed=("-e", f"transfer_backend={backend}"), commands=commands,
        router=f"{ROUTER} --pd-disaggregation --prefill http://192.0.2.31:30000 --decode http://192.0.2.31:30001"
        " --host 0.0.0.0 --port 8000",
        hosts=dict.fromkeys(commands, "llama"), router_host="llama", backend=backend, transport=transport,
        # Told nothing, UCX would open every card of the host.
        extra_env=dict.fromkeys(("prefill-0", "decode-0"), {"UCX_NET_DEVICES": "mlx5_roce0:1,eth0"} if backend == "nixl" else {}),
    )  # fmt: skip


def _v3(role: str, rank: int, how: str) -> str:
    master, port, more = ("192.0.2.50", 30000, "") if role == "prefill" else ("192.0.2.52", 30001, "--max-running-requests 128")
    local = f"192.0.2.{(50 if role == 'prefill' else 52) + rank}"
    return (
        f"{SERVER} --model-path deepseek-ai/DeepSeek-V3-0324 {how} --disaggregation-mode {role} --host {local} --port {port}"
        f" --trust-remote-code --dist-init-addr {master}:5000 --nnodes 2 --node-rank {rank} --tp-size 16 --dp-size 8"
        f" --enable-dp-attention --moe-a2a-backend deepep --mem-fraction-static 0.8 {more}"
    )


def _v3_case(how: str, backend: str) -> Case:
    # One mask for everything that opens RDMA devices; the page tells the transfer engine alone.
    env = {"NCCL_IB_HCA": "=mlx5_0:1", "NVSHMEM_HCA_LIST": "mlx5_0"}
    env |= {"UCX_NET_DEVICES": "mlx5_0:1,eth0"} if backend == "nixl" else {}
    places = {("prefill", 0): "p0", ("prefill", 1): "p1", ("decode", 0): "d0", ("decode", 1): "d1"}
    return Case(
        name=f"deepseek-v3-{backend}", inventory="deepseek-v3", typed=("-e", f"transfer_backend={backend}"),
        commands={(f"{role}-0", rank): _v3(role, rank, how) for role, rank in places},
        # The page starts no router for it; ours is where every inventory has one.
        router=f"{ROUTER} --pd-disaggregation --prefill http://192.0.2.50:30000 --decode http://192.0.2.52:30001 --port 8000",
        hosts={(f"{role}-0", rank): host for (role, rank), host in places.items()}, router_host="p0",
        backend=backend, transport="rdma", extra_env=dict.fromkeys(("prefill-0", "decode-0"), env),
    )  # fmt: skip


#: What ASCEND_MF_STORE_URL is exported as, before every server.
_STORE = "ASCEND_MF_STORE_URL=tcp://192.0.2.60:24667"


def _ascend(role: str) -> str:
    host, port = ("192.0.2.60", 30000) if role == "prefill" else ("192.0.2.61", 30001)
    return (
        f"{_STORE} {SERVER} --model-path deepseek-ai/DeepSeek-V3-0324 --disaggregation-transfer-backend ascend"
        f" --disaggregation-mode {role} --host {host} --port {port} --trust-remote-code --dist-init-addr {host}:5000"
        " --nnodes 1 --node-rank 0 --tp-size 16"
    )


def _vllm(role: str, gpu: int, port: int, channel: int) -> str:
    """A server of the vLLM suite, from its variables (its scripts are not to be had); its connector is gone."""
    transfer = f'{{"kv_connector":"P2pNcclConnector","kv_role":"{role}","kv_port":{channel}}}'
    return (
        f"CUDA_VISIBLE_DEVICES={gpu} vllm serve Qwen/Qwen2.5-7B-Instruct --port {port} --gpu-memory-utilization 0.8"
        f" --download-dir /dev/shm/vllm_cache" + (f" --kv-transfer-config '{transfer}'" if role else "")
    )


CASES = [
    Case(
        name="gh200-aggregated", inventory="gh200", typed=("-e", "ratio=agg"), commands={("aggregated-0", 0): _qwen(30000)},
        router=f"{ROUTER} --worker-urls http://192.0.2.79:30000 --port 8000",
        hosts={("aggregated-0", 0): "gh200"}, router_host="gh200", backend="none", transport="",
    ),
    Case(
        name="gh200-intra-node", inventory="gh200", typed=("-e", "ratio=1p1d"),
        commands={
            ("prefill-0", 0): _qwen(30000, "prefill", "--disaggregation-ib-device mlx5_0"),
            ("decode-0", 0): _qwen(30001, "decode", "--disaggregation-ib-device mlx5_0"),
        },
        router=f"{ROUTER} --pd-disaggregation --prefill http://192.0.2.79:30000 --decode http://192.0.2.79:30001 --port 8000",
        hosts={("prefill-0", 0): "gh200", ("decode-0", 0): "gh200"}, router_host="gh200", backend="mooncake", transport="rdma",
    ),
    Case(
        name="gh200-pair", inventory="gh200-pair", typed=(),
        commands={
            ("prefill-0", 0): _qwen(30000, "prefill", "--disaggregation-ib-device mlx5_0"),
            ("decode-0", 0): _qwen(30001, "decode", "--disaggregation-ib-device mlx5_0"),
        },
        router=f"{ROUTER} --pd-disaggregation --prefill http://192.0.2.79:30000 --decode http://192.0.2.80:30001 --port 8000",
        hosts={("prefill-0", 0): "gh200a", ("decode-0", 0): "gh200b"}, router_host="gh200a",
        backend="mooncake", transport="rdma",
    ),
    Case(
        name="gh200-a100-inter-node", inventory="gh200-a100", typed=(),
        commands={
            ("prefill-0", 0): _qwen(30000, "prefill", "--disaggregation-transfer-backend nixl"),
            ("decode-0", 0): _qwen(30000, "decode", "--disaggregation-transfer-backend nixl"),
        },
        router=f"{ROUTER} --pd-disaggregation --prefill http://192.0.2.79:30000 --decode http://192.0.2.99:30000"
        " --host 0.0.0.0 --port 8000",
        hosts={("prefill-0", 0): "gh200", ("decode-0", 0): "a100"}, router_host="a100", backend="nixl", transport="tcp",
        # Without a device for TCP beside it, the HCA would be all that UCX may use, and it leads nowhere.
        extra_env={
            "prefill-0": {"UCX_NET_DEVICES": "mlx5_0:1,eth0"}, "decode-0": {"UCX_NET_DEVICES": "mlx5_4:1,eth0"}
        },
    ),
    *(_h200_case(prefill) for prefill in (3, 2, 1)),
    Case(
        name="deepseek-r1", inventory="deepseek-r1", typed=(),
        commands={
            **{("prefill-0", rank): _r1("prefill", 3, rank, _R1_PREFILL, _MASK) for rank in range(3)},
            ("decode-0", 0): _r1("decode", 1, 0, _R1_DECODE, f"{_MASK} SGLANG_NUM_RESERVED_DECODE_TOKENS=130"),
        },
        router=_R1_LB, hosts={("prefill-0", 0): "n1", ("prefill-0", 1): "n2", ("prefill-0", 2): "n3", ("decode-0", 0): "n4"},
        router_host="n1", backend="mooncake", transport="rdma", extra_flags=_LAYERS, extra_env={"prefill-0": _NCCL},
    ),
    Case(
        name="deepseek-r1-reverse", inventory="deepseek-r1-reverse", typed=(),
        commands={
            ("prefill-0", 0): _r1("prefill", 1, 0, _R1_REVERSE_PREFILL),
            **{
                ("decode-0", rank): _r1(
                    "decode", 3, rank, _R1_REVERSE_DECODE, f"{_MASK} SGLANG_NUM_RESERVED_DECODE_TOKENS=102"
                )
                for rank in range(3)
            },
        },
        router=_R1_LB, hosts={("prefill-0", 0): "n1", ("decode-0", 0): "n4", ("decode-0", 1): "n2", ("decode-0", 2): "n3"},
        router_host="n1", backend="mooncake", transport="rdma", extra_flags=_LAYERS,
        # The old prefill worker is one host and left out the mask, which DeepEP needs wherever it starts.
        extra_env={"prefill-0": dict([_MASK.split("=")]), "decode-0": _NCCL},
    ),
    _llama_case("mooncake", "--disaggregation-ib-device mlx5_roce0", "mooncake", "rdma"),
    _llama_case("nixl", "--disaggregation-transfer-backend nixl", "nixl", "cuda_ipc"),
    _v3_case("--disaggregation-ib-device mlx5_0", "mooncake"),
    _v3_case("--disaggregation-transfer-backend nixl", "nixl"),
    Case(
        name="ascend", inventory="ascend", typed=(),
        commands={("prefill-0", 0): _ascend("prefill"), ("decode-0", 0): _ascend("decode")},
        router=f"{ROUTER} --pd-disaggregation --prefill http://192.0.2.60:30000 --decode http://192.0.2.61:30001 --port 8000",
        hosts={("prefill-0", 0): "npu0", ("decode-0", 0): "npu1"}, router_host="npu0", backend="ascend", transport="hccs",
    ),
    Case(
        name="ascend-single-node", inventory="ascend-single-node", typed=(),
        commands={
            (f"{role}-0", 0): f"{_STORE} " + _llama(role, "--disaggregation-transfer-backend ascend")
            for role in ("prefill", "decode")
        },
        router=f"{ROUTER} --pd-disaggregation --prefill http://192.0.2.60:30000 --decode http://192.0.2.60:30001"
        " --host 0.0.0.0 --port 8000",
        hosts={("prefill-0", 0): "npu0", ("decode-0", 0): "npu0"}, router_host="npu0", backend="ascend", transport="hccs",
    ),
    Case(
        name="vllm-disaggregated", inventory="vllm-xpyd", typed=("-e", "ratio=1p1d"),
        commands={
            ("prefill-0", 0): _vllm("kv_producer", 1, 8100, 14580), ("decode-0", 0): _vllm("kv_consumer", 2, 8200, 14579),
        },
        router="disagg_proxy_p2p_nccl_xpyd.py --prefill http://192.0.2.20:8100 --decode http://192.0.2.20:8200 --port 10001",
        hosts={("prefill-0", 0): "vllm", ("decode-0", 0): "vllm"}, router_host="vllm", backend="nixl", transport="cuda_ipc",
        engine="vllm",
    ),
    Case(
        name="vllm-aggregated", inventory="vllm-xpyd", typed=("-e", "ratio=agg"),
        commands={("aggregated-0", 0): _vllm("", 1, 9000, 0)},
        # The old server had no router; ours is where every inventory has one, so that both modes are measured alike.
        router="none --worker-urls http://192.0.2.20:9000 --port 10001",
        hosts={("aggregated-0", 0): "vllm"}, router_host="vllm", backend="none", transport="",
        engine="vllm",
    ),
]  # fmt: skip
