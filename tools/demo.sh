#!/bin/bash
# make demo: deploy 3p1d on two emulated hosts behind the real router, benchmark, show where the report is, tear down.
set -eu -o pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH" ANSIBLE_LOCALHOST_WARNING=false

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
finish() {
  code=$?
  say "ansible-playbook teardown.yml"
  ansible-playbook teardown.yml || code=$?
  [ "$code" -eq 0 ] && say "The report is at $PWD/results/latest/report.html   (an emulated engine: no GPU was used)"
  exit "$code"
}
trap finish EXIT

say "ansible-playbook deploy_pd.yml"
ansible-playbook deploy_pd.yml
say "ansible-playbook bench.yml -e ratio=3p1d -e bench_concurrency=8,16,32 -e bench_num_requests=96 -e bench_output_len=64 -e run_label=demo"
ansible-playbook bench.yml -e ratio=3p1d -e bench_concurrency=8,16,32 -e bench_num_requests=96 -e bench_output_len=64 -e run_label=demo
