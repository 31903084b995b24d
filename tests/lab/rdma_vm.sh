#!/bin/bash
# A real RDMA device where the machine's kernel has none: SoftRoCE (rxe0 on eth0, 10.0.0.1) in Debian's kernel in a VM that is
# emulated in software.  usage: rdma_vm.sh [CMD]   runs CMD in the VM (default: an RC ping-pong), powers off; its exit status.
# What lies in the folder $RDMA_VM_ADD is in the VM, too, which has $RDMA_VM_MB of memory and $RDMA_VM_TIMEOUT seconds.
# Debian packages: qemu-system-x86 mmdebstrap cpio. The first run makes the VM (a minute or two); later ones boot in seconds.
set -euo pipefail
cmd=${1:-'ibv_rc_pingpong -d rxe0 -g 1 -n 200 >/dev/null & sleep 3; ibv_rc_pingpong -d rxe0 -g 1 -n 200 10.0.0.1'}
# The recipe below has a folder of its own, so that a changed one is made anew.
work=$(cd "$(dirname "$0")/../.." && pwd)/.pd/lab/rdma-vm-$(sha256sum "$0" | cut -c1-12)
if [ ! -e "$work/root.cpio" ]; then
    new=$work.new.$$; trap 'rm -rf "$new"' EXIT
    rm -rf "${work%-*}"-*; mkdir -p "$new"; cd "$new"
    # apt-get download runs as _apt
    chmod 755 .; mkdir deb; chmod 777 deb
    package=$(apt-cache depends linux-image-amd64 | sed -n 's/.*Depends: //p' | head -1)
    (cd deb && apt-get download -q "$package" >/dev/null 2>&1)
    dpkg-deb -x deb/linux-image-*.deb k; rm -r deb
    kv=$(ls k/lib/modules); cp "k/boot/vmlinuz-$kv" vmlinuz
    mmdebstrap -q --variant=minbase --include=kmod,iproute2,rdma-core,ibverbs-utils,ibverbs-providers,python3,libnuma1,libcurl4 \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt=force-unsafe-io \
        --aptopt='Acquire::Check-Valid-Until "false"' "$(. /etc/os-release; echo "$VERSION_CODENAME")" root \
        $(ls /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null | grep -E '\.(list|sources)$')
    mkdir -p "root/lib/modules/$kv/kernel"
    (cd "k/lib/modules/$kv/kernel" && cp -r --parents drivers/infiniband drivers/net/dummy.ko net/ipv4 net/ipv6 lib crypto \
        arch/x86/crypto "$new/root/lib/modules/$kv/kernel/")
    cp k/lib/modules/"$kv"/modules.{builtin,order,builtin.modinfo} "root/lib/modules/$kv/"
    chroot root depmod "$kv"
    # What the VM does without costs it seconds to unpack.
    rm -rf root/usr/share/* root/var/{cache,lib}/* root/usr/lib/*/{perl*,gconv} root/usr/bin/perl*
    cat > root/init <<'INIT'
#!/bin/sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
mount -t proc proc /proc; mount -t sysfs sys /sys
ip link set lo up
for m in rdma_rxe ib_uverbs dummy; do modprobe $m; done
ip link add eth0 type dummy; ip addr add 10.0.0.1/24 dev eth0; ip link set eth0 up
rdma link add rxe0 type rxe netdev eth0
mkdir -p /dev/infiniband
for d in /sys/class/infiniband_verbs/uverbs*; do
    IFS=: read major minor < $d/dev
    [ -e /dev/infiniband/${d##*/} ] || mknod /dev/infiniband/${d##*/} c $major $minor
done
sh /cmd; echo "rdma-vm: exit $?"
echo o > /proc/sysrq-trigger; sleep 9
INIT
    chmod +x root/init
    (cd root && find . -xdev | cpio -o -H newc --quiet) > root.cpio
    rm -rf root k; cd /; mv "$new" "$work"
fi
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
echo "$cmd" > "$tmp/cmd"
(cd "$tmp" && echo cmd | cpio -o -H newc --quiet) | cat "$work/root.cpio" - > "$tmp/initrd"
[ -z "${RDMA_VM_ADD:-}" ] || (cd "$RDMA_VM_ADD" && find -L . -mindepth 1 | cpio -o -L -H newc --quiet) >> "$tmp/initrd"
timeout "${RDMA_VM_TIMEOUT:-180}" qemu-system-x86_64 -accel tcg,thread=multi -machine q35 -cpu max -smp 2 -m "${RDMA_VM_MB:-2000}" -nographic -no-reboot \
    -nodefaults -serial stdio -kernel "$work/vmlinuz" -initrd "$tmp/initrd" -append 'console=ttyS0 quiet panic=-1' \
    < /dev/null | tee "$tmp/out"
grep -q 'rdma-vm: exit 0' "$tmp/out"
