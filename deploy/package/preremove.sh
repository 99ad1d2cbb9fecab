#!/bin/sh
# Stops what runs when the package goes, and not when it is upgraded. While a
# workload is captured the package stays: without the rules it would run free, and
# with them and no sidecar it would be cut off.
set -e
[ -z "$DPKG_ROOT" ] || exit 0
case "$1" in upgrade | 1) exit 0 ;; esac
if [ -d /run/systemd/system ]; then
	captured=$(systemctl list-units --plain --no-legend --state=active,activating,reloading,deactivating 'sallyport-capture@*.service' | cut -d ' ' -f 1)
	if [ -n "$captured" ]; then
		echo "sallyport: still in force:" $captured >&2
		echo "sallyport: the package is not removed. Stop what they capture, then: systemctl disable --now" $captured >&2
		exit 1
	fi
	systemctl stop 'sallyport-sidecar@*.service' sallyport-gateway.service sallyport-issuer.service || true
fi
