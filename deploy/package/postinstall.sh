#!/bin/sh
# Makes the users. Into another root (DPKG_ROOT) nothing is to be started.
set -e
[ -z "$DPKG_ROOT" ] || exit 0
if command -v systemd-sysusers >/dev/null; then
	systemd-sysusers /usr/lib/sysusers.d/sallyport.conf
fi
if [ -d /run/systemd/system ]; then
	systemctl daemon-reload
	# What ran before the upgrade goes on with the new program: proxies without
	# a failed request, the issuer by a restart.
	systemctl reload 'sallyport-gateway.service' 'sallyport-sidecar@*.service' || true
	systemctl try-restart sallyport-issuer.service || true
fi
