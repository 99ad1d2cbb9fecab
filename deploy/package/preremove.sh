#!/bin/sh
# Stops what runs when the package goes, and not when it is upgraded. Capture
# goes first: without a sidecar its rules would cut the workloads off.
set -e
[ -z "$DPKG_ROOT" ] || exit 0
case "$1" in upgrade | 1) exit 0 ;; esac
if [ -d /run/systemd/system ]; then
	systemctl stop 'sallyport-capture@*.service' 'sallyport-sidecar@*.service' sallyport-gateway.service sallyport-issuer.service || true
fi
