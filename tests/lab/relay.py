"""A process that delays every frame between a host and the bridge."""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import socket
import struct
import time
from collections import deque

from lab.common import BRIDGE, SWITCH, ip, namespace, port
from lab.network import inside

TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
SIOCETHTOOL = 0x8946
#: ethtool's "set": segmentation and checksum offloads (TSO, TX checksum, scatter-gather, GSO, GRO).
OFFLOADS = (0x1F, 0x17, 0x19, 0x24, 0x2C)
SOL_PACKET, PACKET_ADD_MEMBERSHIP, PACKET_MR_PROMISC, PACKET_OUTGOING, ETH_P_ALL = 263, 1, 1, 4, 3


def _whole_frames(device: str) -> None:
    """Turn offloads off, so that the frames that a packet socket sees are complete."""
    libc = ctypes.CDLL(None, use_errno=True)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for offload in OFFLOADS:
            value = ctypes.create_string_buffer(struct.pack("II", offload, 0))
            request = ctypes.create_string_buffer(struct.pack("16sP", device.encode(), ctypes.addressof(value)), 40)
            libc.ioctl(sock.fileno(), ctypes.c_ulong(SIOCETHTOOL), request)


def relay(host: str, delay_ms: float) -> None:
    """Take the place of the host's port on the bridge, and hold every frame for ``delay_ms``; runs until killed."""
    cable, tap = port(host), f"t{port(host)}"

    def attach() -> tuple[int, socket.socket]:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", tap.encode(), IFF_TAP | IFF_NO_PI))
        _whole_frames(cable)
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        sock.bind((cable, 0))
        membership = struct.pack("iHH8s", socket.if_nametoindex(cable), PACKET_MR_PROMISC, 0, b"")
        sock.setsockopt(SOL_PACKET, PACKET_ADD_MEMBERSHIP, membership)
        sock.setblocking(False)
        return fd, sock

    inside(namespace(host), lambda: _whole_frames("eth0"))
    fd, sock = inside(SWITCH, attach)
    ip("link", "set", cable, "nomaster", ns=SWITCH)
    ip("link", "set", tap, "master", BRIDGE, "up", ns=SWITCH)
    print("ready", flush=True)
    os.close(1)
    held: deque[tuple[float, bool, bytes]] = deque()
    while True:
        wait = max(0.0, held[0][0] - time.monotonic()) if held else None
        ends: list[int | socket.socket] = [fd, sock]
        for readable in select.select(ends, [], [], wait)[0]:
            due = time.monotonic() + delay_ms / 1000
            for _ in range(64):
                try:
                    if readable is sock:
                        frame, origin = sock.recvfrom(65536)
                        if origin[2] != PACKET_OUTGOING:
                            held.append((due, True, frame))
                    else:
                        held.append((due, False, os.read(fd, 65536)))
                except BlockingIOError:
                    break
        while held and held[0][0] <= time.monotonic():
            _, from_host, frame = held.popleft()
            try:
                if from_host:
                    os.write(fd, frame)
                else:
                    sock.send(frame)
            except OSError:
                continue  # the cable is out: the frame is lost, as it would be
