#!/bin/busybox sh
# Called by udhcpc with what the network offered.
[ "$1" = bound ] || exit 0
ip addr add "$ip/${mask:-24}" dev "$interface"
ip route add default via "$router"
