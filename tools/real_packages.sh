#!/bin/bash
# System libraries that Mooncake and SGLang link to, from Debian's packages; as an ordinary user: says which are missing.
set -eu
packages="libibverbs1 libnuma1 libcurl4"
missing=""
for package in $packages; do
  dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'install ok' || missing="$missing $package"
done
[ -z "$missing" ] && exit 0
if [ "$(id -u)" = 0 ]; then
  echo "Installing$missing"
  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
else
  echo "make test-real needs$missing: sudo apt-get install$missing   (its tests are skipped without)"
fi
