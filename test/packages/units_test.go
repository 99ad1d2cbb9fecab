package packages

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"sallyport/internal/meshtest"
)

// TestUnits holds the units to what is promised of them, also where nothing of
// systemd is installed.
func TestUnits(t *testing.T) {
	units, err := filepath.Glob("../../deploy/systemd/*.service")
	if err != nil || len(units) != 4 {
		t.Fatalf("%v %v", units, err)
	}
	for _, u := range units {
		b, err := os.ReadFile(u)
		if err != nil {
			t.Fatal(err)
		}
		has := map[string]string{}
		for l := range strings.Lines(string(b)) {
			if k, v, ok := strings.Cut(strings.TrimSpace(l), "="); ok && !strings.HasPrefix(k, "#") {
				has[k] = v
			}
		}
		want := map[string]string{
			"NoNewPrivileges": "yes", "ProtectSystem": "strict", "CapabilityBoundingSet": "", "SystemCallArchitectures": "native",
			"Type": "notify", "WatchdogSec": "30", "MemoryDenyWriteExecute": "yes",
		}
		if strings.Contains(u, "capture") { // the one that may do something
			want["CapabilityBoundingSet"], want["AmbientCapabilities"], want["Type"] = "CAP_NET_ADMIN", "CAP_NET_ADMIN", "oneshot"
			delete(want, "WatchdogSec")
		}
		for k, v := range want {
			if got, ok := has[k]; !ok || got != v {
				t.Errorf("%s: %s=%s, want %q", u, k, got, v)
			}
		}
		if user := has["User"]; user == "" || user == "root" {
			t.Errorf("%s runs as %q", u, user)
		}
		if _, ok := has["AmbientCapabilities"]; ok && !strings.Contains(u, "capture") {
			t.Errorf("%s has a privilege", u)
		}
	}
}

// TestCaptureIsRequired enables capture in a root of its own, and looks at who
// then cannot start without it.
func TestCaptureIsRequired(t *testing.T) {
	systemctl, err := exec.LookPath("systemctl")
	if err != nil {
		meshtest.Missing(t, "systemd")
	}
	root := t.TempDir()
	units := filepath.Join(root, "usr/lib/systemd/system")
	b, err := os.ReadFile("../../deploy/systemd/sallyport-capture@.service")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(units, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(units, "sallyport-capture@.service"), b, 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(systemctl, "--root="+root, "enable", "sallyport-capture@payment.service").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if _, err := os.Readlink(filepath.Join(root, "etc/systemd/system/payment.service.requires/sallyport-capture@payment.service")); err != nil {
		t.Error(err)
	}
	if !strings.Contains(string(b), "\nBefore=sallyport-sidecar@%i.service %i.service\n") {
		t.Error("the workload does not wait for it")
	}
}

// TestRemoval asks what the package does when it is to go: with capture in force
// it stays, and stops nothing.
func TestRemoval(t *testing.T) {
	b, err := os.ReadFile("../../deploy/package/preremove.sh")
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name, arg, captured string
		stays, stops        bool
	}{
		{"capture is in force", "remove", "sallyport-capture@payment.service loaded active exited x", true, false},
		{"capture is in force, of the .rpm", "0", "sallyport-capture@payment.service loaded active exited x", true, false},
		{"nothing is captured", "remove", "", false, true},
		{"an upgrade", "upgrade", "sallyport-capture@payment.service loaded active exited x", false, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			stopped := filepath.Join(dir, "stopped")
			fake := "#!/bin/sh\ncase \"$1\" in list-units) echo '" + tt.captured + "' | sed '/^$/d' ;; stop) echo \"$@\" > " + stopped + " ;; esac\n"
			script := strings.ReplaceAll(string(b), "/run/systemd/system", dir)
			for name, text := range map[string]string{"systemctl": fake, "preremove.sh": script} {
				if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o700); err != nil {
					t.Fatal(err)
				}
			}
			cmd := exec.Command("sh", filepath.Join(dir, "preremove.sh"), tt.arg)
			cmd.Env = []string{"PATH=" + dir + ":" + os.Getenv("PATH")}
			out, err := cmd.CombinedOutput()
			if (err != nil) != tt.stays || tt.stays && !strings.Contains(string(out), "disable --now sallyport-capture@payment.service") {
				t.Errorf("%v: %s", err, out)
			}
			if _, err := os.Stat(stopped); (err == nil) != tt.stops {
				t.Errorf("stopped: %v, want %v", err == nil, tt.stops)
			}
		})
	}
}
