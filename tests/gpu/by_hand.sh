#!/bin/bash
# 1p1d as the scripts start it: servers and router by their command lines, each in a session of its own.
#   by_hand.sh start DIR PREFILL_GPU DECODE_GPU PORT       PORT: the router's; servers get PORT+1 and PORT+2
#   by_hand.sh stop DIR
# Python, folder and model as inventory/h200-local takes them; ROUTER_PYTHON has sglang_router.
set -eu
action=$1 dir=$2
mkdir -p "$dir"

begin() { # NAME COMMAND...
  local name=$1
  shift
  printf '%s\0' "$@" >"$dir/$name.argv"
  setsid "$@" </dev/null >"$dir/$name.log" 2>&1 &
  echo $! >"$dir/$name.pid"
}

if [ "$action" = stop ]; then
  for name in router prefill decode; do
    [ -e "$dir/$name.pid" ] || continue
    pid=$(cat "$dir/$name.pid")
    kill -TERM "$pid" 2>/dev/null || true
    for _ in $(seq 450); do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
    kill -KILL -- "-$pid" 2>/dev/null || true
  done
  exit 0
fi

prefill_gpu=$3 decode_gpu=$4 port=$5
export PYTHONPATH=${PD_ENGINE_SITE:-/opt/site} TVM_FFI_CACHE_DIR=${PD_ENGINE_KERNELS:-/opt/tvmcache}
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1 UCX_PROTO_INFO=y
python=${PD_ENGINE_PYTHON:-/usr/bin/python3}
common="--model-path ${PD_MODEL:-/opt/model} --dtype bfloat16 --attention-backend triton --sampling-backend pytorch
  --grammar-backend none --enable-metrics --host 127.0.0.1 --max-total-tokens 1000000 --mem-fraction-static ${MEM_FRACTION:-0.85}
  --cuda-graph-backend-prefill disabled --cuda-graph-max-bs-decode 256 --random-seed 1"
pd="--disaggregation-transfer-backend nixl --disaggregation-mode"
# shellcheck disable=SC2086  # flags, one word each
begin prefill "$python" -m sglang.launch_server $common --base-gpu-id "$prefill_gpu" --port $((port + 1)) $pd prefill \
  --disaggregation-bootstrap-port $((port + 3))
# shellcheck disable=SC2086
begin decode "$python" -m sglang.launch_server $common --base-gpu-id "$decode_gpu" --port $((port + 2)) $pd decode
unset PYTHONPATH
begin router "$ROUTER_PYTHON" -m sglang_router.launch_router --pd-disaggregation --policy round_robin \
  --prefill "http://127.0.0.1:$((port + 1))" $((port + 3)) --decode "http://127.0.0.1:$((port + 2))" \
  --host 127.0.0.1 --port "$port" --prometheus-host 127.0.0.1 --prometheus-port $((port + 4)) --worker-startup-check-interval 1
