#!/bin/sh
# Compiles the kernels with their self-check for other processors, and runs them emulated. On Debian:
#   apt-get install g++-aarch64-linux-gnu g++-powerpc64le-linux-gnu qemu-user
# Usage: check.sh [TRIPLET ...]; without any: all of the above and this processor's.
set -eu
here=$(dirname "$0")
flags="-std=c++17 -O2 -fno-math-errno -fno-trapping-math -Wno-psabi -fopenmp -static"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

[ $# -gt 0 ] || set -- native aarch64-linux-gnu powerpc64le-linux-gnu
for triplet; do
    case $triplet in
        native) compiler=${CXX:-c++} run= ;;
        powerpc64le-*) compiler=$triplet-g++ run=qemu-ppc64le ;;
        *) compiler=$triplet-g++ run=qemu-${triplet%%-*} ;;
    esac
    $compiler $flags -DSUFFIX=generic -I "$here/../src/dovetail_cpu/native" \
        "$here/check.cpp" -o "$folder/check"
    printf '%s: ' "$triplet"
    OMP_NUM_THREADS=2 $run "$folder/check"
done
