#!/bin/sh
# Make sure that FFCV can be built: its system packages are there, or are installed where that is possible.
# Exits 1, after saying what to run, where they are missing and this user cannot install them.
set -u
packages="libopencv-dev libturbojpeg0-dev pkg-config g++"
for python in "${PYTHON:-python3}" python3; do
  include=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))' 2>/dev/null) && break
done
[ -f "${include:-}/Python.h" ] || packages="$packages python3-dev"

complete() {
  command -v pkg-config >/dev/null && command -v g++ >/dev/null && pkg-config --exists opencv4 libturbojpeg
}
complete && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "installing what FFCV is built with: $packages"
  # shellcheck disable=SC2086  # a list of words
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $packages; } \
    >/dev/null && complete && exit 0
fi
echo "FFCV is left out, and its tests with it: its system packages are missing. To add it, run" >&2
echo "  sudo apt-get install $packages && make clean test" >&2
exit 1
